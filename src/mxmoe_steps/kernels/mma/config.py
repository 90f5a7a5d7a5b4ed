"""How one grouped GEMM kernel for ``mma.sync`` GPUs is configured. Stdlib only.

Tiles are Hopper's: 128 or 64 weight rows times 8 to 256 tokens, ``Y^T = W X^T``, in a ring of slots of any size.
"""

from dataclasses import dataclass
from typing import ClassVar

from mxmoe_steps.kernels.codes.format import HALF_ROWS, TILE_ROWS, Format
from mxmoe_steps.kernels.limits import MAX_EXPERTS
from mxmoe_steps.kernels.sm90.config import UNIT, Tile

ROW_WARPS = 4  # warps that share the weight rows of a tile
PRODUCERS = 1  # warps that fill the ring
MMA_ROWS, MMA_TOKENS = 16, 8  # of one instruction
STEP_BYTES = 32  # of a row: the features of one instruction, whatever their type
MAX_STAGES = 7  # slots of the ring in use at a time: `Filled` has a byte for each
STAGED_TOKENS = 16  # that a warp stages at once on their way out
PADDING = 16  # bytes between staged tokens: 8 tokens x 4 words then lie in all 32 banks


@dataclass(frozen=True)
class MmaConfig:
    """The tiles of one persistent kernel, sorted, all of the same number of weight rows; a subclass says for which GPU.

    ``max_problems`` bounds the problem table (a multiple of 32). An SM runs ``blocks_per_sm`` blocks. ``columns``:
    groups of `ROW_WARPS` warps that share the tokens of a tile. The slots of a tile are dealt to ``split`` times as
    many warps, which add up at the end. ``gated``: weights are gate and up, `GATE_ROWS` rows of each in turn, and what
    is stored is silu(gate) * up, half as wide.

    ``shared_bytes``: shared memory of an SM. ``suspends``: whether a thread that waits for a barrier can sleep.
    """

    tiles: tuple[Tile, ...]
    max_problems: int = 128
    blocks_per_sm: int = 1
    columns: int = 1
    split: int = 1
    gated: bool = False

    shared_bytes: ClassVar[int]
    suspends: ClassVar[bool] = False
    cluster: ClassVar[int] = 1

    def __post_init__(self) -> None:
        object.__setattr__(self, "tiles", tuple(sorted(self.tiles)))
        pairs = [(tile.format, tile.tokens) for tile in self.tiles]
        if not pairs or len(set(pairs)) < len(pairs):
            raise ValueError("a kernel needs at least one tile, and each (format, tokens) once")
        if self.max_problems % 32 or self.max_problems <= 0:
            raise ValueError(f"max_problems is {self.max_problems}, need a positive multiple of 32")
        if len({tile.rows for tile in self.tiles}) > 1 or self.rows not in (HALF_ROWS, TILE_ROWS):
            raise ValueError(f"tiles of {self.rows} rows; need 64 in all of them or 128")
        for tile in self.tiles:
            if tile.tokens % (MMA_TOKENS * self.columns) or self.token_blocks(tile) not in (1, *range(2, 33, 2)):
                raise ValueError(f"tiles of {tile.tokens} tokens for {self.columns} columns of warps")
        if self.ring_units < 2 * max(tile.slot_units for tile in self.tiles):
            raise ValueError(f"a ring of {self.ring_units} KiB has no room for two slots of {self.name}")

    def token_blocks(self, tile: Tile) -> int:
        """Instructions that cover a warp's tokens of a tile."""
        return tile.tokens // (MMA_TOKENS * self.columns)

    @property
    def row_blocks(self) -> int:
        """Instructions that cover a warp's rows of a tile."""
        return self.warp_rows // MMA_ROWS

    @property
    def formats(self) -> tuple[Format, ...]:
        """The formats, in the order of the problem table's format numbers."""
        return tuple(sorted({tile.format for tile in self.tiles}))

    @property
    def operands(self) -> tuple[str, ...]:
        """Activation types the kernel reads, in argument order."""
        return tuple(sorted({tile.format.operand for tile in self.tiles}))

    @property
    def rows(self) -> int:
        """Weight rows of a tile."""
        return self.tiles[0].rows

    @property
    def warp_rows(self) -> int:
        """Weight rows of a warp."""
        return self.rows // ROW_WARPS

    @property
    def part_warps(self) -> int:
        """Warps that multiply a slot."""
        return ROW_WARPS * self.columns

    @property
    def warps(self) -> int:
        """Warps that multiply."""
        return self.part_warps * self.split

    @property
    def threads(self) -> int:
        """Threads of a block."""
        return 32 * (PRODUCERS + self.warps)

    @property
    def stored_rows(self) -> int:
        """Columns of the output that a warp's rows become."""
        return self.warp_rows // 2 if self.gated else self.warp_rows

    @property
    def staging_pitch(self) -> int:
        """Bytes of a staged token."""
        return 2 * self.stored_rows + PADDING

    @property
    def sums_bytes(self) -> int:
        """Bytes of the sums of a split's parts but the first."""
        return (self.split - 1) * 4 * self.rows * max(tile.tokens for tile in self.tiles)

    @property
    def staging_bytes(self) -> int:
        """Bytes of all warps' staged tokens; before the first tile, of the experts' row offsets."""
        staged = self.part_warps * STAGED_TOKENS * self.staging_pitch
        return -(-max(staged + self.sums_bytes, 4 * (MAX_EXPERTS + 1)) // 16) * 16

    @property
    def ring_units(self) -> int:
        """Units of the ring: what fits beside the staged tokens and the problem table."""
        table = 4 * (7 * self.max_problems + 1)
        block = self.shared_bytes // self.blocks_per_sm - 1024  # that the system keeps
        return (block - self.staging_bytes - table - 512 - UNIT) // UNIT  # barriers and queue; alignment

    @property
    def stages(self) -> int:
        """Slots of the ring that may be in use at a time."""
        return min(MAX_STAGES, self.ring_units // min(tile.slot_units for tile in self.tiles))

    @property
    def name(self) -> str:
        """Identifies the configuration, e.g. ``w4a16_g128_asym.16x1.64x1+p128...``."""
        parts = []
        for format_ in self.formats:
            tiles = [f"{tile.tokens}x{tile.depth}" for tile in self.tiles if tile.format == format_]
            parts.append(".".join([format_.name, *tiles]))
        shape = f"p{self.max_problems}b{self.blocks_per_sm}c{self.columns}r{self.rows}s{self.split}"
        return "+".join([*parts, shape + ("g" if self.gated else "")])

    def spec(self) -> dict[str, object]:
        """The configuration as plain data, for cache keys and build records."""
        tiles = [{**vars(tile), "format": tile.format.name} for tile in self.tiles]
        return {**vars(self), "tiles": tiles}


class A100(MmaConfig):
    """Of compute capability 8.0."""

    shared_bytes = 164 * 1024


class Ampere(MmaConfig):
    """Of compute capability 8.6."""

    shared_bytes = 100 * 1024


class Ada(MmaConfig):
    """Of compute capability 8.9."""

    shared_bytes = 100 * 1024


class Blackwell(MmaConfig):
    """Of compute capability 12.0."""

    shared_bytes = 100 * 1024
    suspends = True


class OnHopper(MmaConfig):
    """To check numbers and times on a GPU of compute capability 9.0."""

    shared_bytes = 228 * 1024
    suspends = True
