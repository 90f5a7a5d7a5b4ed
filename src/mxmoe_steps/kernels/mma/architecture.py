"""``mma.sync`` GPUs: what their kernels are made of, and which of them a launch takes. Stdlib only."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from mxmoe_steps.kernels.architecture import Architecture
from mxmoe_steps.kernels.codes.format import GROUP, HALF_ROWS, TILE_ROWS, Format
from mxmoe_steps.kernels.mma.config import A100, MMA_TOKENS, Ada, Ampere, Blackwell, MmaConfig, OnHopper
from mxmoe_steps.kernels.sm90.architecture import HOPPER
from mxmoe_steps.kernels.sm90.config import Tile, block_features

MOST_GROUPED = 6  # token blocks of a warp where sums of a group have registers of their own
MOST_DECODED = 8  # token blocks of a warp that decodes weights
MUCH_SHARED = 160 * 1024  # bytes of an SM, from which on it runs two blocks of large tiles

# Tokens of an expert, on average, up to which latency and decode kernels are ahead
MOST_LATENCY = 4
MOST_DECODE = 96


@dataclass(frozen=True)
class Shape:
    """What the tiles of a phase have in common, see `MmaConfig`."""

    tokens: tuple[int, ...]
    columns: int
    split: int
    blocks: int


class MmaSync(Architecture):
    """A few tokens: small, split tiles; some: small tiles; many: large tiles.

    A warp multiplies 32 rows of weights with all tokens of its tile where an SM has shared memory for two blocks, which
    overlap one's tile's end with the other's middle, else with half of them.

    ``multiplies_nibbles``: whether int4 instructions are the GPU's own, not a subroutine of two of int8.
    """

    phase_rows: ClassVar[Mapping[str, int]] = {"latency": HALF_ROWS, "decode": TILE_ROWS, "prefill": TILE_ROWS}
    configuration: ClassVar[type[MmaConfig]]
    multiplies_nibbles: ClassVar[bool] = True
    generator: ClassVar[str] = f"{__package__}.group_gemm"
    overlaps: ClassVar[bool] = False
    clusters: ClassVar[bool] = False

    def config(
        self, formats: tuple[Format, ...], phase: str, max_problems: int = 128, gated: bool = False
    ) -> MmaConfig:
        """As the base class says."""
        self.check(formats)
        shape = self._shape(phase)
        common = max_problems, shape.blocks, shape.columns, shape.split, gated
        smallest = tuple(self._tile(format_, shape.tokens[0], phase) for format_ in formats)
        units = self.configuration(smallest, *common).ring_units
        tiles = (self._tile(format_, n, phase) for format_ in formats for n in self._tokens(format_, shape))
        return self.configuration(tuple(tile for tile in tiles if 2 * tile.slot_units <= units), *common)

    def token_tiles(self, format_: Format, phase: str) -> tuple[int, ...]:
        """As the base class says."""
        return tuple(tile.tokens for tile in self.config((format_,), phase).tiles)

    def phase_for(self, rows: int, experts: int, slices: int, strips: int, sms: int, by_warp: bool) -> str:
        """As the base class says."""
        if rows <= MOST_LATENCY * experts:
            return "latency"
        return "decode" if rows <= MOST_DECODE * experts else "prefill"

    def by_warp(self, formats: tuple[Format, ...]) -> bool:
        """As the base class says: always."""
        return True

    def _shape(self, phase: str) -> Shape:
        if phase == "latency":
            return Shape((8,), 1, 2, 2)
        if self.configuration.shared_bytes >= MUCH_SHARED:
            return Shape((16, 32, 48, 64) if phase == "decode" else (16, 32, 48, 64, 128), 1, 1, 2)
        return Shape((16, 32, 64) if phase == "decode" else (16, 32, 64, 96, 128), 2, 1, 1)

    def _tokens(self, format_: Format, shape: Shape) -> tuple[int, ...]:
        if not format_.decoded:
            return shape.tokens
        largest = MOST_DECODED if format_.operand == "bf16" else MOST_GROUPED
        return tuple(n for n in shape.tokens if n <= largest * MMA_TOKENS * shape.columns)

    def _tile(self, format_: Format, tokens: int, phase: str) -> Tile:
        depth = max(1, GROUP // block_features(format_)) if format_.decoded else 1
        return Tile(format_, tokens, depth, self.phase_rows[phase])


class Sm80(MmaSync):
    name: ClassVar[str] = "A100"
    gpus: ClassVar[str] = "A100, A30"
    capability: ClassVar[tuple[int, int]] = (8, 0)
    target: ClassVar[str] = "sm_80"
    configuration: ClassVar[type[MmaConfig]] = A100
    operands: ClassVar[tuple[str, ...]] = ("bf16", "int8", "int4")


class Sm86(MmaSync):
    name: ClassVar[str] = "Ampere"
    gpus: ClassVar[str] = "RTX 3090, A40, A10"
    capability: ClassVar[tuple[int, int]] = (8, 6)
    target: ClassVar[str] = "sm_86"
    configuration: ClassVar[type[MmaConfig]] = Ampere
    operands: ClassVar[tuple[str, ...]] = ("bf16", "int8", "int4")


class Sm89(MmaSync):
    name: ClassVar[str] = "Ada"
    gpus: ClassVar[str] = "RTX 4090, L40S, L4"
    capability: ClassVar[tuple[int, int]] = (8, 9)
    target: ClassVar[str] = "sm_89"
    configuration: ClassVar[type[MmaConfig]] = Ada


class Sm120(MmaSync):
    name: ClassVar[str] = "consumer Blackwell"
    gpus: ClassVar[str] = "RTX 5090"
    capability: ClassVar[tuple[int, int]] = (12, 0)
    target: ClassVar[str] = "sm_120a"
    configuration: ClassVar[type[MmaConfig]] = Blackwell
    multiplies_nibbles: ClassVar[bool] = False


class MmaOnHopper(MmaSync):
    """No GPU picks it: it is there to check numbers and times of this room's kernels on a Hopper GPU."""

    name: ClassVar[str] = "Hopper by mma.sync"
    gpus: ClassVar[str] = HOPPER.gpus
    capability: ClassVar[tuple[int, int]] = HOPPER.capability
    target: ClassVar[str] = HOPPER.target
    configuration: ClassVar[type[MmaConfig]] = OnHopper
    multiplies_nibbles: ClassVar[bool] = False


GPUS: tuple[MmaSync, ...] = (Sm80(), Sm86(), Sm89(), Sm120())
ON_HOPPER = MmaOnHopper()
