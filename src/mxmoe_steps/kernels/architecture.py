"""What a class of GPUs is to those who plan and launch: its names, its phases, its kernels. Stdlib only.

Every class has a room, a package beside this module with an `Architecture` and a generator; `architectures` and
`build` register them.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar, Protocol

from mxmoe_steps.errors import UserError
from mxmoe_steps.kernels.codes.format import OPERAND_BITS, Format
from mxmoe_steps.kernels.limits import OPERAND_MASKS

CLUSTER_SORT = "sort_8"  # by blocks of a cluster
TOKEN_KERNELS = (
    "sort_1", CLUSTER_SORT, "dispatch", "dispatch_gated", "swiglu", "quantize", "combine_bf16", "combine_float32",
)  # fmt: skip
ROTATED_KERNELS = ("dispatch_rotated", "dispatch_gated_rotated", "swiglu_rotated", "quantize_rotated")  # in their place


class Configuration(Protocol):
    """What is asked of one kernel's configuration: a frozen dataclass of the room.

    ``formats``, ``operands``: the weight formats and the types of activations, in argument order. ``max_problems``:
    rows of its problem table. ``blocks_per_sm``: blocks that a multiprocessor runs at once, in clusters of ``cluster``.
    """

    def __hash__(self) -> int: ...

    @property
    def formats(self) -> tuple[Format, ...]: ...
    @property
    def operands(self) -> tuple[str, ...]: ...
    @property
    def max_problems(self) -> int: ...
    @property
    def blocks_per_sm(self) -> int: ...
    @property
    def cluster(self) -> int: ...
    @property
    def name(self) -> str: ...
    def spec(self) -> dict[str, Any]:
        """Plain data that identifies it."""


class Architecture(ABC):
    """``name`` and ``gpus``: as users know it. ``capability``: compute capability of its GPUs. ``target``: its name for
    compilers. ``phase_rows``: weight rows of a tile by phase, those of the fewest tokens first.

    ``configuration``: class of its configurations. ``generator``: module whose `GroupGemm` generates its grouped GEMMs.
    ``operands``: types that its tensor cores multiply. ``overlaps``: whether a launch can begin while the one before it
    runs (programmatic dependent launch). ``clusters``: whether blocks can be launched in clusters.
    """

    name: ClassVar[str]
    gpus: ClassVar[str]
    capability: ClassVar[tuple[int, int]]
    target: ClassVar[str]
    phase_rows: ClassVar[Mapping[str, int]]
    configuration: ClassVar[type]
    generator: ClassVar[str]
    operands: ClassVar[tuple[str, ...]] = tuple(OPERAND_BITS)
    overlaps: ClassVar[bool] = True
    clusters: ClassVar[bool] = True

    @property
    def phases(self) -> tuple[str, ...]:
        """Kernels of a launch, for few tokens to many."""
        return tuple(self.phase_rows)

    @property
    def operand_mask(self) -> int:
        """Sum of `OPERAND_MASKS` of the types that an expert can read."""
        return sum(OPERAND_MASKS[operand] for operand in self.operands)

    @property
    def scaled_outputs(self) -> tuple[str, ...]:
        """Types with a scale per token that token kernels have outputs for, those of 8 bits on every GPU."""
        return tuple(one for one in OPERAND_MASKS if one in ("fp8", "int8") or (one != "bf16" and one in self.operands))

    @property
    def scaled_mask(self) -> int:
        """Sum of `OPERAND_MASKS` of `scaled_outputs`."""
        return sum(OPERAND_MASKS[operand] for operand in self.scaled_outputs)

    @property
    def unreadable_mask(self) -> int:
        """That of those types which no expert reads there."""
        return self.scaled_mask & ~self.operand_mask

    @property
    def token_kernels(self) -> tuple[str, ...]:
        """Kernels around the grouped GEMMs, by name."""
        return tuple(name for name in TOKEN_KERNELS if self.clusters or name != CLUSTER_SORT)

    def check(self, formats: Iterable[Format]) -> None:
        """`UserError` unless its tensor cores multiply all of ``formats``."""
        for format_ in formats:
            if format_.operand not in self.operands:
                raise UserError(
                    f"scheme {format_.name}: {self.gpus} ({self.target}) have no {format_.operand} tensor cores;"
                    f" kernels there multiply {', '.join(self.operands)}"
                )

    @abstractmethod
    def config(
        self, formats: tuple[Format, ...], phase: str, max_problems: int = 128, gated: bool = False
    ) -> Configuration:
        """The kernel of ``phase`` that multiplies any mixture of ``formats``.

        ``gated``: weights are gate and up, `GATE_ROWS` rows of each in turn, and what it stores is silu(gate) * up.
        """

    @abstractmethod
    def token_tiles(self, format_: Format, phase: str) -> tuple[int, ...]:
        """Tokens of the tiles in the kernel of ``phase`` that multiplies ``format_`` alone, ascending."""

    @abstractmethod
    def phase_for(self, rows: int, experts: int, slices: int, strips: int, sms: int, by_warp: bool) -> str:
        """The phase of a launch of ``rows`` tokens routed over ``experts`` experts, on ``sms`` multiprocessors.

        ``slices``: experts more that take every token; ``strips``: of 64 weight rows, in an expert; ``by_warp``: of the
        launch's formats.
        """

    @abstractmethod
    def by_warp(self, formats: tuple[Format, ...]) -> bool:
        """Whether warps multiply the tiles of the fewest tokens, each on its own, in all ``formats``."""
