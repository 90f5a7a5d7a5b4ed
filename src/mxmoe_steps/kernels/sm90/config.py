"""How one grouped GEMM kernel is configured. Stdlib only.

A `Tile` is one of the main loops of a `Format`; a `KernelConfig` is a list of tiles that share one persistent kernel.
The kernel computes the transpose, ``Y^T = W X^T``: weights are the 128-row side of a tile, tokens the 8- to 256-row
side.
"""

from dataclasses import dataclass

from mxmoe_steps.kernels.codes.format import GROUP, HALF_ROWS, OPERAND_BITS, TILE_ROWS, Format
from mxmoe_steps.kernels.limits import MAX_EXPERTS

ROW_BYTES = 128  # bytes of one row of a token block: the widest shared memory swizzle

SHARED_BYTES = {1: 227 * 1024, 2: 113 * 1024}  # shared memory a block may use on sm_90, by blocks per SM
# Registers of a producer's and of a consumer's thread, by blocks per SM and consumer warpgroups: all there are
REGISTERS = {(1, 2): (40, 232), (1, 4): (24, 112), (2, 2): (32, 104)}
UNIT = 1024  # bytes: slots of the ring start at multiples, as swizzled rows need
MAX_STAGES = 5  # slots of a ring in use at a time: more hold work that others could do
EPILOGUE_TOKENS = 64  # tokens staged at once on their way out
LATENCY_TOKENS = 8  # of a split tile: with more, tokens would take as long to fetch as 4-bit weights


def block_features(format_: Format) -> int:
    """Input features in one 128-byte token row."""
    return ROW_BYTES * 8 // OPERAND_BITS[format_.operand]


def decoded_to_bf16(format_: Format) -> bool:
    """Whether codes become bfloat16 in registers."""
    return format_.decoded and format_.operand == "bf16"


def by_warp(format_: Format) -> bool:
    """Whether every warp multiplies its rows of a split tile on its own (`MainLoops.multiply_few`): the ``mma.sync`` of
    fp8 is emulated."""
    return format_.decoded and format_.operand != "fp8"


@dataclass(frozen=True, order=True)
class Tile:
    """One main loop: ``rows``, 128 or 64, of weights times ``tokens`` rows of activations.

    ``depth``: 128-byte token blocks per ring slot; narrow weights and short token tiles take several, so
    that a slot is worth its barrier round trip.
    """

    format: Format
    tokens: int
    depth: int = 1
    rows: int = TILE_ROWS

    def __post_init__(self) -> None:
        if not (self.tokens == 8 or (self.tokens % 16 == 0 and 16 <= self.tokens <= 256)):
            raise ValueError(f"tile of {self.tokens} tokens: need 8 or a multiple of 16 up to 256")
        if self.format.decoded and self.slot_features not in (GROUP, 2 * GROUP):
            raise ValueError(
                f"tile of {self.format.name}: a slot must hold 1 or 2 groups of {GROUP}, depth {self.depth}"
            )

    @property
    def slot_features(self) -> int:
        """Input features in one ring slot."""
        return self.depth * block_features(self.format)

    @property
    def weight_bytes(self) -> int:
        """Bytes of weights in one ring slot."""
        if self.format.decoded:
            return self.slot_features // GROUP * self.format.half_bytes * self.rows // HALF_ROWS
        return self.depth * self.rows * ROW_BYTES

    @property
    def token_bytes(self) -> int:
        """Bytes of activations in one ring slot."""
        return self.depth * self.tokens * ROW_BYTES

    @property
    def token_offset(self) -> int:
        """Where activations start in a slot: after the weights, at the swizzle's alignment."""
        return -(-self.weight_bytes // UNIT) * UNIT

    @property
    def slot_units(self) -> int:
        """Units of `UNIT` bytes in one ring slot."""
        return -(-(self.token_offset + self.token_bytes) // UNIT)


@dataclass(frozen=True)
class KernelConfig:
    """The tiles of one persistent kernel, sorted, all of the same number of weight rows.

    ``max_problems`` bounds the problem table (a multiple of 32); ``cluster`` blocks, 1 or 2, share token tiles;
    an SM runs ``blocks_per_sm`` blocks, 1 or 2: two hide each other's latencies, and have half the registers.
    The slots of a tile are dealt to ``split`` times as many warpgroups, each with a producer and a ring of its own,
    which add up at the end: a few small tiles then keep a whole SM busy. ``gated``: weights are gate and up,
    `GATE_ROWS` rows of each in turn, and what is stored is silu(gate) * up, half as wide.
    """

    tiles: tuple[Tile, ...]
    max_problems: int = 128
    cluster: int = 1
    blocks_per_sm: int = 1
    split: int = 1
    gated: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "tiles", tuple(sorted(self.tiles)))
        pairs = [(tile.format, tile.tokens) for tile in self.tiles]
        if not pairs or len(set(pairs)) < len(pairs):
            raise ValueError("a kernel needs at least one tile, and each (format, tokens) once")
        if self.max_problems % 32 or self.max_problems <= 0:
            raise ValueError(f"max_problems is {self.max_problems}, need a positive multiple of 32")
        if self.cluster not in (1, 2) or self.blocks_per_sm not in (1, 2):
            raise ValueError(f"cluster is {self.cluster}, blocks_per_sm is {self.blocks_per_sm}; need 1 or 2")
        if len({tile.rows for tile in self.tiles}) > 1 or self.rows not in (HALF_ROWS, TILE_ROWS):
            raise ValueError(f"tiles of {self.rows} rows; need 64 in all of them or 128")
        if (self.blocks_per_sm, self.warpgroups) not in REGISTERS or (self.cluster > 1 and self.warpgroups != 2):
            raise ValueError(f"{self.warpgroups} warpgroups in clusters of {self.cluster}, {self.blocks_per_sm} an SM")
        if self.split > 1 and any(
            tile.tokens != LATENCY_TOKENS or (tile.format.decoded and tile.slot_features > GROUP) for tile in self.tiles
        ):
            raise ValueError(f"a split takes {LATENCY_TOKENS} tokens and deals slots of one group of {GROUP} features")
        if self.ring_units < 2 * self.largest_units:
            raise ValueError(f"a ring of {self.ring_units} KiB has no room for two slots of {self.largest_units} KiB")

    @property
    def formats(self) -> tuple[Format, ...]:
        """The formats, in the order of the problem table's format numbers."""
        return tuple(sorted({tile.format for tile in self.tiles}))

    @property
    def operands(self) -> tuple[str, ...]:
        """Activation types the kernel reads, in argument order."""
        return tuple(sorted({tile.format.operand for tile in self.tiles}))

    @property
    def largest_units(self) -> int:
        """Units of the largest ring slot."""
        return max(tile.slot_units for tile in self.tiles)

    @property
    def max_tokens(self) -> int:
        """Tokens of the largest tile."""
        return max(tile.tokens for tile in self.tiles)

    @property
    def staged_tokens(self) -> int:
        """Tokens of the staging tile."""
        return min(self.max_tokens, EPILOGUE_TOKENS)

    @property
    def rows(self) -> int:
        """Weight rows of a tile."""
        return self.tiles[0].rows

    @property
    def warpgroups(self) -> int:
        """Warpgroups of a block that multiply."""
        return self.rows // HALF_ROWS * self.split

    @property
    def threads(self) -> int:
        """Threads of a block: a warpgroup of producers, some of whose warps are idle, and those that multiply."""
        return 128 * (1 + self.warpgroups)

    @property
    def registers(self) -> tuple[int, int]:
        """Registers of a producer's and of a consumer's thread."""
        return REGISTERS[self.blocks_per_sm, self.warpgroups]

    @property
    def staging_pitch(self) -> int:
        """Elements of a token in the staging tile: one 16-byte step of padding, against bank conflicts."""
        return self.rows + (8 if self.split == 1 else 4)

    @property
    def staging_bytes(self) -> int:
        """Bytes of the staging tile, bfloat16, or of the sums of a split's parts, 32 bits; before the first tile, of
        the experts' row offsets."""
        tile = self.staged_tokens * 2 if self.split == 1 else self.split * self.max_tokens * 4
        return max(tile * self.staging_pitch, 4 * (MAX_EXPERTS + 1))

    @property
    def ring_units(self) -> int:
        """Units of a ring, one for each part of a split: what fits beside the staging tile, the problem table and
        scales."""
        table = 4 * (7 * self.max_problems + 1)
        fixed = self.staging_bytes + table + 2 * 4 * self.max_tokens + 4096  # barriers, alignment
        return (SHARED_BYTES[self.blocks_per_sm] - fixed) // UNIT // self.split

    @property
    def stages(self) -> int:
        """Slots of a ring that may be in use at a time."""
        return min(MAX_STAGES, self.ring_units // min(tile.slot_units for tile in self.tiles))

    @property
    def name(self) -> str:
        """Identifies the configuration, e.g. ``w4a16_g128_asym.16x4.64x2``."""
        parts = []
        for format_ in self.formats:
            tiles = [f"{tile.tokens}x{tile.depth}" for tile in self.tiles if tile.format == format_]
            parts.append(".".join([format_.name, *tiles]))
        shape = f"p{self.max_problems}c{self.cluster}b{self.blocks_per_sm}r{self.rows}s{self.split}"
        return "+".join([*parts, shape + ("g" if self.gated else "")])

    def spec(self) -> dict[str, object]:
        """The configuration as plain data, for cache keys and build records."""
        tiles = [{**vars(tile), "format": tile.format.name} for tile in self.tiles]
        return {**vars(self), "tiles": tiles}
