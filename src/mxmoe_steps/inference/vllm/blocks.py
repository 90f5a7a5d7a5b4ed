"""A rank's share of the packed blocks of a layer: how it is cut, named and collected, whether it is whole.

Nothing here knows an engine. An engine hands over whole tensors of the checkpoint, in any order, and those of all
experts; what another rank keeps is dropped. The tensors are kept as they come, views of a mapped file as a rule: their
bytes are read when the layer is made of them.
"""

import re
from collections.abc import Collection
from dataclasses import dataclass

import torch

from mxmoe_steps.errors import UserError
from mxmoe_steps.kernels.stacks import Place
from mxmoe_steps.models.adapters import Family
from mxmoe_steps.models.packed import DTYPES, StoredBlock
from mxmoe_steps.schemes import CODES_PER_UNIT, SHARED, Scheme

_FIX = "run the quantize step again"
_BLOCK = r"(gate|up|down)_proj\.(\w+)"


def place_of(name: str, family: Family, layers: Collection[int]) -> tuple[int, int, str, str] | None:
    """Layer, expert, block and part of a tensor, by the end of its ``name``; None if it is of no packed block.

    ``name`` is that of `mxmoe_steps.models.shards.packed_name`, or what is left of it inside of an engine's model.
    Layers of multi-token prediction (``mtp.layers.0``), which are named like others, have no packed blocks.
    """
    moe = re.escape(f"{family.moe}." if family.moe else "")
    expert = r"experts\.(\d+)" + (f"|{re.escape(family.shared)}" if family.shared else "")
    found = re.fullmatch(rf"(?:.*(?<!mtp)\.)?layers\.(\d+)\.{moe}(?:{expert})\.{_BLOCK}", name)
    if found is None or int(found[1]) not in layers:
        return None
    return int(found[1]), SHARED if found[2] is None else int(found[2]), found[3], found[4]


def place_in_experts(name: str) -> tuple[int, str, str]:
    """Expert, block and part, by a name inside of the experts of a layer; `UserError` if it is none."""
    found = re.fullmatch(rf"(\d+)\.{_BLOCK}", name)
    if found is None:
        raise UserError(f"experts.{name} is no part of a packed block; {_FIX}")
    return int(found[1]), found[2], found[3]


@dataclass(frozen=True)
class Share:
    """What tensor-parallel ``rank`` of ``ranks`` keeps of a block [N, K]: rows of gate and up, columns of down."""

    rank: int = 0
    ranks: int = 1

    def check(self, block: str, scheme: Scheme, shape: tuple[int, int], rotated: bool) -> None:
        """`UserError` unless the whole block, of that ``shape``, can be cut: in bytes, groups and rotation."""
        if self.ranks == 1:
            return
        features = shape[block == "down"]
        width, rest = divmod(features, self.ranks)
        why = None
        if rest:
            why = f"{features} features do not divide by {self.ranks} ranks"
        elif block != "down" and width % scheme.scale_rows:
            why = f"{scheme.scale_rows} rows share scales, and the {width} output features of a rank cut through them"
        elif block == "down" and not scheme.is_original:
            group = scheme.group_size(features)
            if rotated:
                why = "its inputs are rotated as a whole"
            elif width % CODES_PER_UNIT:
                why = f"{width} input features of a rank fill no whole bytes"
            elif width % group and group % width:
                why = f"groups of {group} and the {width} input features of a rank do not nest"
        if why is not None:
            raise UserError(
                f"a {block} block under {scheme} cannot be cut for tensor parallelism: {why}; use expert parallelism,"
                " which keeps experts whole (--enable-expert-parallel, with --data-parallel-size instead of"
                " --tensor-parallel-size where there is a shared expert)"
            )

    def of(self, tensor: torch.Tensor, part: str, block: str, scheme: Scheme, in_features: int) -> torch.Tensor:
        """This rank's share of a ``part`` of a whole block with ``in_features`` inputs."""
        if self.ranks == 1:
            return tensor
        if block != "down":
            return tensor.chunk(self.ranks)[self.rank]
        if part == "bias":  # ranks' results are added
            return tensor if self.rank == 0 else torch.zeros_like(tensor)
        width = in_features // self.ranks
        first, last = self.rank * width, (self.rank + 1) * width
        if part == "qweight":
            first, last = first * scheme.weight_bits // 8, last * scheme.weight_bits // 8
        elif part in ("scales", "zeros"):
            group = scheme.group_size(in_features)
            size = tensor.shape[1] // -(-in_features // group)  # bytes of a float32 that is stored so, or 1
            first, last = size * (first // group), size * -(-last // group)
        return tensor[:, first:last]


_Parts = dict[str, tuple[torch.dtype | None, tuple[int, ...]]]  # type, None for any float, and shape


@dataclass(frozen=True)
class _Block:
    shape: tuple[int, int]  # in the checkpoint
    expected: _Parts  # there
    stored: StoredBlock  # this rank's share


class Blocks:
    """Blocks of one layer that wait for their tensors."""

    def __init__(self, layer: int, share: Share) -> None:
        self._layer, self._share = layer, share
        self._blocks: dict[Place, _Block] = {}
        self._missing: dict[tuple[int, str, str], None] = {}  # in order

    def add(
        self, expert: int, block: str, scheme: Scheme, shape: tuple[int, int], rotated: bool, biased: bool = False
    ) -> None:
        """A block of that ``shape``, of which this rank has its share. `UserError` unless it can be cut."""
        try:
            self._share.check(block, scheme, shape, rotated and not scheme.is_original)
        except UserError as error:
            raise UserError(f"layer {self._layer}: {error}") from None
        (rows, columns), ranks = shape, self._share.ranks
        own = (rows, columns // ranks) if block == "down" else (rows // ranks, columns)
        expected: _Parts = {"weight": (None, shape)}
        if not scheme.is_original:
            expected = {part: (DTYPES[dtype], size) for part, (dtype, size) in scheme.parts(*shape).items()}
        if biased:
            expected["bias"] = None, shape[:1]
        name = f"layer {self._layer}, {'the shared expert' if expert == SHARED else f'expert {expert}'}, {block}"
        stored = StoredBlock(name, scheme, *own, rotated and not scheme.is_original, {})
        self._blocks[expert, block] = _Block(shape, expected, stored)
        self._missing |= dict.fromkeys((expert, block, part) for part in expected)

    def have(self, expert: int, block: str) -> bool:
        """Whether it was added."""
        return (expert, block) in self._blocks

    def load(self, expert: int, block: str, part: str, tensor: torch.Tensor) -> None:
        """Keep this rank's share of a whole ``tensor``, no copy; `UserError` for one that is not what it should be."""
        found = self._blocks[expert, block]
        where, scheme = f"{found.stored.name}: {part}", found.stored.scheme
        if (expert, block, part) not in self._missing:
            stored = ", ".join(found.expected)
            raise UserError(f"{where} comes twice, or is no part of a block under {scheme} ({stored})")
        dtype, shape = found.expected[part]
        right_type = tensor.is_floating_point() if dtype is None else tensor.dtype == dtype
        if tuple(tensor.shape) != shape or not right_type:
            raise UserError(
                f"{where} is {tensor.dtype} {list(tensor.shape)}, expected {dtype or 'floats'} {list(shape)}; {_FIX}"
            )
        found.stored.parts[part] = self._share.of(tensor, part, block, scheme, found.shape[1])
        del self._missing[expert, block, part]

    def finish(self) -> dict[Place, StoredBlock]:
        """The blocks, by expert and kind; `UserError` unless all tensors have come."""
        if self._missing:
            expert, block, part = next(iter(self._missing))
            first = f"{self._blocks[expert, block].stored.name}: {part}"
            if len(self._missing) == sum(len(found.expected) for found in self._blocks.values()):
                raise UserError(
                    f"no packed tensor has come for {first}, nor any other: the checkpoint lacks them, or vLLM's model"
                    " class reads its files past the quantization method"
                )
            more = f" and {len(self._missing) - 1} others are" if len(self._missing) > 1 else " is"
            raise UserError(f"the checkpoint lacks tensors: {first}{more} missing; {_FIX}")
        return {place: found.stored for place, found in self._blocks.items()}
