"""What a grouped GEMM kernel can multiply, and how one kernel is configured. Stdlib only.

A `Format` is the weight format of one scheme; a `Tile` is one of its main loops; a `KernelConfig` is a
list of tiles that share one persistent kernel. The kernel computes the transpose, ``Y^T = W X^T``:
weights are the 128-row side of a tile, tokens the 8- to 256-row side.
"""

import dataclasses
from dataclasses import dataclass

from mxmoe_steps.errors import UserError
from mxmoe_steps.schemes import Scheme

TILE_ROWS = 128  # weight rows of a chunk in kernel order, and of most tiles
HALF_ROWS = 64  # weight rows of one `wgmma`: a warpgroup's
ROW_BYTES = 128  # bytes of one row of a token block: the widest shared memory swizzle
GROUP = 128  # input features that share a scale in every grouped format
SHRINK = 16  # weights of fewer than 8 bits are decoded to bfloat16 2**-16 times as large, so that factors are finite
EDGE = 64  # output and input features must be multiples of this

SHARED_BYTES = {1: 227 * 1024, 2: 113 * 1024}  # shared memory a block may use on sm_90, by blocks per SM
# Registers of a producer's and of a consumer's thread, by blocks per SM and consumer warpgroups: all there are
REGISTERS = {(1, 2): (40, 232), (1, 4): (24, 112), (2, 2): (32, 104)}
UNIT = 1024  # bytes: slots of the ring start at multiples, as swizzled rows need
MAX_STAGES = 5  # slots of a ring in use at a time: more hold work that others could do
EPILOGUE_TOKENS = 64  # tokens staged at once on their way out
GATE_ROWS = 8  # of gate, then of up: a thread has the sums of row r and r + 8
LATENCY_TOKENS = 8  # of a split tile: with more, tokens would take as long to fetch as 4-bit weights

OPERAND_MASKS = {"bf16": 1, "fp8": 2, "int8": 4}  # what an expert reads, one bit per type
MAX_EXPERTS = 1024  # of a layer, slices of the shared expert included
MAX_ENTRIES = 64  # rows of one token

_OPERAND_BITS = {"bf16": 16, "fp8": 8, "int8": 8}


@dataclass(frozen=True, order=True)
class Format:
    """The weight format of one scheme.

    ``operand``: what the tensor cores multiply (``bf16``, ``fp8`` e4m3, ``int8``); activations have this type.
    ``bits``: stored bits per weight; fewer than the operand's means codes are decoded in registers.
    ``grouped``: one bfloat16 scale per 128 input features; otherwise one per row, applied at the end.
    ``zeros``: a bfloat16 zero point beside every scale.
    """

    operand: str
    bits: int
    grouped: bool = False
    zeros: bool = False

    @property
    def name(self) -> str:
        """Canonical scheme name of the format, e.g. ``w4a16_g128_asym``."""
        if self.bits == 16:
            return "w16a16"
        act = 16 if self.operand == "bf16" else 8
        tail = "_fp8" if self.operand == "fp8" else ""
        return f"w{self.bits}a{act}_g{GROUP if self.grouped else -1}_{'asym' if self.zeros else 'sym'}{tail}"

    @property
    def decoded(self) -> bool:
        """Whether codes become operands in registers (``wgmma`` reads W from registers)."""
        return self.bits < _OPERAND_BITS[self.operand]

    @property
    def block_features(self) -> int:
        """Input features in one 128-byte token row."""
        return ROW_BYTES * 8 // _OPERAND_BITS[self.operand]

    @property
    def token_scaled(self) -> bool:
        """Whether activations carry one float32 scale per token."""
        return self.operand != "bf16"

    @property
    def channel_scaled(self) -> bool:
        """Whether the weights carry one float32 scale per row."""
        return self.bits < 16 and not self.grouped

    @property
    def grown(self) -> bool:
        """Whether the bfloat16 weights, and so the sums, lack a constant factor (`decode.GROW`)."""
        return self.decoded and self.operand == "bf16"

    @property
    def by_warp(self) -> bool:
        """Whether every warp multiplies its rows of a split tile on its own (`MainLoops.multiply_few`)."""
        return self.decoded and self.operand != "fp8"

    @property
    def chunk_bytes(self) -> int:
        """Bytes of 128 rows x 128 input features in kernel order."""
        return 2 * self.half_bytes

    @property
    def half_bytes(self) -> int:
        """Bytes of half a chunk, 64 rows: codes, then scales, then zero points."""
        return HALF_ROWS * GROUP * self.bits // 8 + 2 * HALF_ROWS * (self.grouped + self.zeros)


def kernel_format(scheme: Scheme) -> Format:
    """The format that multiplies ``scheme``; `UserError` if no kernel does.

    Per-channel schemes below 8 bits run as grouped ones with repeated scales, 1-bit codes as 2-bit codes.
    """
    scheme = scheme.kernel_scheme
    if scheme.is_original:
        return Format("bf16", 16)
    weight, act, operand = scheme.weight_bits, scheme.act_bits, scheme.compute_type
    per_channel = scheme.group == -1
    if act == 8 and weight == 8 and per_channel:
        return Format(operand, 8)
    if act == 8 and weight == 4 and scheme.group in (-1, GROUP):
        return Format(operand, 4, grouped=True)
    if act == 16 and weight == 8 and per_channel and scheme.symmetric:
        return Format("bf16", 8)
    if act == 16 and weight < 8 and scheme.group in (-1, GROUP):
        return Format("bf16", weight, grouped=True, zeros=not scheme.symmetric)
    raise UserError(
        f"scheme {scheme.name}: no GPU kernel; there are kernels for w16a16, w8a8 and w8a16 per channel,"
        f" w4a16, w3a16, w2a16, w1a16 and w4a8 (g128 or g-1)"
    )


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
        return self.depth * self.format.block_features

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
        return dataclasses.asdict(self)


FORMATS = (
    Format("bf16", 16),
    Format("bf16", 8),
    *(Format("bf16", bits, True, zeros) for bits in (4, 3, 2) for zeros in (False, True)),
    Format("fp8", 8),
    Format("fp8", 4, True),
    Format("int8", 8),
    Format("int8", 4, True),
)

TOKEN_LIMIT = 24 * 1024  # bytes of tokens in the slots of an SM at one time, unless one group has more
WEIGHT_LIMIT = 18 * 1024 + 512  # the same of weights: what one bf16 row block or two 4-bit groups take
# Kernels, and the weight rows of their tiles. A few tokens: small, split tiles; some: small tiles; many: large tiles
PHASE_ROWS = {"latency": HALF_ROWS, "decode": TILE_ROWS, "prefill": TILE_ROWS}
PHASES = tuple(PHASE_ROWS)
LATENCY_SPLIT = 4
LARGEST_DECODE = {1: 64, 2: 48}  # tokens of the decode kernel's largest tile, by blocks per SM
_TOKENS = (16, 32, 48, 64, 96, 128, 192, 256)  # token tiles
_LARGEST_DECODED = 192  # more accumulators leave no registers for fragments and sums of one group


def default_tiles(format_: Format, phase: str, blocks_per_sm: int) -> tuple[Tile, ...]:
    """The tiles of ``format_`` in the kernel of ``phase``."""
    if phase == "latency":
        blocks = GROUP // format_.block_features if format_.decoded else 1
        return (Tile(format_, LATENCY_TOKENS, blocks, PHASE_ROWS[phase]),)
    largest = min(
        LARGEST_DECODE[blocks_per_sm] if phase == "decode" else 256, _LARGEST_DECODED if format_.decoded else 256
    )
    return tuple(Tile(format_, n, _depth(format_, n, blocks_per_sm)) for n in _TOKENS if n <= largest)


def default_config(formats: tuple[Format, ...], phase: str, max_problems: int = 128) -> KernelConfig:
    """The kernel of ``phase`` that runs any mixture of ``formats``.

    Measured: two blocks per SM help to decode to bf16 in registers, and slow other formats down a little;
    clusters help w16a16 with many tokens, and nothing else. A few tokens leave SMs without tiles, or with one: tiles of
    64 rows, each by four warpgroups, are more and shorter.
    """
    blocks = 2 if phase == "decode" and all(format_.grown for format_ in formats) else 1
    cluster = 2 if phase == "prefill" and formats == (Format("bf16", 16),) else 1
    tiles = tuple(tile for format_ in formats for tile in default_tiles(format_, phase, blocks))
    return KernelConfig(tiles, max_problems, cluster, blocks, LATENCY_SPLIT if phase == "latency" else 1)


def _depth(format_: Format, tokens: int, blocks_per_sm: int) -> int:
    """Blocks per slot that fill it: as many groups as fit both limits, at least one."""
    if not format_.decoded:
        return 1
    per_group = GROUP // format_.block_features
    fits = [
        groups * per_group
        for groups in (1, 2)  # with four, a mixture's loops take their addresses from few registers (docs/kernels.md)
        if groups * format_.chunk_bytes * blocks_per_sm <= WEIGHT_LIMIT
        and groups * per_group * tokens * ROW_BYTES * blocks_per_sm <= TOKEN_LIMIT
    ]
    return max(fits, default=per_group)
