"""``pack-quantized`` of compressed-tensors, as Kimi publishes int4: signed integers in words of 32 bits.

``weight_packed`` int32 [N, K / 8], the first code in the lowest bits and 8 added to each; ``weight_scale`` [N, G], G
groups of input features or 1; ``weight_shape`` [2]. 8-bit codes, four a word with 128 added, are read as well.
"""

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from mxmoe_steps.models.raw import FLOATING, RawTensor
from mxmoe_steps.models.sources.format import CODES, SCALES, SourceFormat
from mxmoe_steps.schemes import Scheme, packed_width

if TYPE_CHECKING:
    import torch

_SHAPE = "shape"


class PackQuantized(SourceFormat):
    """``weight_packed``, ``weight_scale`` and ``weight_shape``."""

    stored: ClassVar = {CODES: "_packed", SCALES: "_scale", _SHAPE: "_shape"}
    types: ClassVar = {CODES: ("I32",), SCALES: FLOATING, _SHAPE: ("I64", "I32")}

    def shape(self, weight: str, parts: Mapping[str, RawTensor]) -> tuple[int, ...]:
        codes, scales, stated = (parts[part].shape for part in (CODES, SCALES, _SHAPE))
        if stated != (2,) or len(codes) != 2:
            raise self.error(weight, parts, f"codes {list(codes)} with a shape {list(stated)} are no matrix")
        found = np.frombuffer(parts[_SHAPE].read(), "i8" if parts[_SHAPE].dtype == "I64" else "i4")
        rows, columns = map(int, found)
        groups = math.prod(scales[1:])
        fits = rows == codes[0] and (scales[0] == rows or math.prod(scales) == 1) and groups and not columns % groups
        if not fits or self._bits(columns, codes[1]) is None:
            raise self.error(
                weight,
                parts,
                f"a shape {rows} x {columns} does not fit codes {list(codes)} of 4 or 8 bits and scales {list(scales)}",
            )
        return rows, columns

    def decode(self, parts: "Mapping[str, torch.Tensor]") -> "torch.Tensor":
        import torch

        from mxmoe_steps.models.sources.arithmetic import OFFSET_INT4, OFFSET_INT8, numbers, of_scales, times_scales

        rows, columns = parts[_SHAPE].tolist()
        bits = self._bits(columns, parts[CODES].shape[1])
        codes = numbers(parts[CODES].view(torch.uint8), OFFSET_INT4 if bits == 4 else OFFSET_INT8)[:, :columns]
        scales = of_scales(parts[SCALES])
        scales = scales.view(1, 1) if scales.numel() == 1 else scales.view(rows, -1)
        weight = times_scales(codes, scales, rows // len(scales), columns // scales.shape[1])
        return weight.to(parts[SCALES].dtype)

    def scheme_of(self, group: Mapping[str, Any]) -> str:
        size = -1 if group.get("strategy") == "channel" else group.get("group_size")
        if size is None:
            raise self.unkept("no scheme has one scale for a whole tensor")
        return f"w{group.get('num_bits')}a16_g{size}_sym"

    def check_kept(self, weight: str, parts: Mapping[str, RawTensor], scheme: Scheme) -> None:
        rows, columns = self.shape(weight, parts)
        scales = parts[SCALES]
        if scales.dtype != "BF16":
            raise self.unkept(f"scales of {weight} are {scales.dtype}, and those of {scheme} bfloat16")
        groups = (rows, math.ceil(columns / scheme.group_size(columns)))
        if scales.shape != groups or self._bits(columns, parts[CODES].shape[1]) != scheme.weight_bits:
            raise self.unkept(f"{weight} is stored otherwise than config.json says, under which it would be {scheme}")

    def kept(self, parts: "Mapping[str, torch.Tensor]", scheme: Scheme) -> "dict[str, torch.Tensor]":
        import torch

        codes = parts[CODES].view(torch.uint8)  # words are a multiple of 4 bytes long, rows of ours of 8 codes
        more = packed_width(int(parts[_SHAPE][1]), scheme.weight_bits) - codes.shape[1]
        return {"qweight": torch.nn.functional.pad(codes, (0, more)), "scales": parts[SCALES]}

    @staticmethod
    def _bits(columns: int, words: int) -> int | None:
        """Of a code, where rows of ``columns`` codes take so many words."""
        return next((bits for bits in (4, 8) if -(-columns * bits // 32) == words), None)
