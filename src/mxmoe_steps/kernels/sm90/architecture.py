"""Hopper GPUs: what their kernels are made of, and which of them a launch takes. Stdlib only."""

from collections.abc import Mapping
from typing import ClassVar

from mxmoe_steps.kernels.architecture import Architecture
from mxmoe_steps.kernels.codes.format import GROUP, HALF_ROWS, TILE_ROWS, Format
from mxmoe_steps.kernels.sm90.config import (
    LATENCY_TOKENS,
    ROW_BYTES,
    KernelConfig,
    Tile,
    block_features,
    by_warp,
    decoded_to_bf16,
)

TOKEN_LIMIT = 24 * 1024  # bytes of tokens in the slots of an SM at one time, unless one group has more
WEIGHT_LIMIT = 18 * 1024 + 512  # the same of weights: what one bf16 row block or two 4-bit groups take
LATENCY_SPLIT = 4
LARGEST_DECODE = {1: 64, 2: 48}  # tokens of the decode kernel's largest tile, by blocks per SM
LARGEST_DECODED = 192  # more accumulators leave no registers for fragments and sums of one group
TOKEN_TILES = (16, 32, 48, 64, 96, 128, 192, 256)

# Tokens of an expert, on average, up to which latency and decode kernels are ahead
MOST_LATENCY = 4
MOST_DECODE = 32
LATENCY_GAP = (1, 1.5)  # rounds of latency tiles that `wgmma` multiplies which take longer than one of decode tiles


class Hopper(Architecture):
    """Kernels, and the weight rows of their tiles. A few tokens: small, split tiles; some: small tiles; many: large
    tiles."""

    name: ClassVar[str] = "Hopper"
    gpus: ClassVar[str] = "H100, H200"
    capability: ClassVar[tuple[int, int]] = (9, 0)
    target: ClassVar[str] = "sm_90a"
    phase_rows: ClassVar[Mapping[str, int]] = {"latency": HALF_ROWS, "decode": TILE_ROWS, "prefill": TILE_ROWS}
    configuration: ClassVar[type] = KernelConfig
    generator: ClassVar[str] = f"{__package__}.group_gemm"
    operands: ClassVar[tuple[str, ...]] = ("bf16", "fp8", "int8")  # of `wgmma`

    def config(
        self, formats: tuple[Format, ...], phase: str, max_problems: int = 128, gated: bool = False
    ) -> KernelConfig:
        """Measured: two blocks per SM help to decode to bf16 in registers, and slow other formats down a little;
        clusters help w16a16 with many tokens, and nothing else. A few tokens leave SMs without tiles, or with one:
        tiles of 64 rows, each by four warpgroups, are more and shorter.
        """
        self.check(formats)
        blocks = self._blocks_per_sm(formats, phase)
        cluster = 2 if phase == "prefill" and all(format_.original for format_ in formats) else 1
        split = LATENCY_SPLIT if phase == "latency" else 1
        tiles = tuple(tile for format_ in formats for tile in _tiles(format_, phase, blocks))
        return KernelConfig(tiles, max_problems, cluster, blocks, split, gated)

    def token_tiles(self, format_: Format, phase: str) -> tuple[int, ...]:
        """As the base class says."""
        return tuple(tile.tokens for tile in _tiles(format_, phase, self._blocks_per_sm((format_,), phase)))

    def phase_for(self, rows: int, experts: int, slices: int, strips: int, sms: int, by_warp: bool) -> str:
        """Measured on an H100 (docs/measurements/gemm.md): decode kernels are ahead up to 32 tokens an expert, latency
        kernels up to four, unless their tiles, multiplied by warpgroups, just need a second round: those of the decode
        kernel are half as many and need one.
        """
        if rows <= MOST_LATENCY * experts:
            rounds = (min(rows, experts) + slices) * strips / sms
            return "decode" if not by_warp and LATENCY_GAP[0] < rounds <= LATENCY_GAP[1] else "latency"
        return "decode" if rows <= MOST_DECODE * experts else "prefill"

    def by_warp(self, formats: tuple[Format, ...]) -> bool:
        """As the base class says."""
        return all(by_warp(format_) for format_ in formats)

    @staticmethod
    def _blocks_per_sm(formats: tuple[Format, ...], phase: str) -> int:
        return 2 if phase == "decode" and all(decoded_to_bf16(format_) for format_ in formats) else 1


HOPPER = Hopper()


def _tiles(format_: Format, phase: str, blocks_per_sm: int) -> tuple[Tile, ...]:
    """The tiles of ``format_`` in the kernel of ``phase``."""
    if phase == "latency":
        blocks = GROUP // block_features(format_) if format_.decoded else 1
        return (Tile(format_, LATENCY_TOKENS, blocks, HOPPER.phase_rows[phase]),)
    largest = LARGEST_DECODE[blocks_per_sm] if phase == "decode" else TOKEN_TILES[-1]
    if format_.decoded:
        largest = min(largest, LARGEST_DECODED)
    return tuple(Tile(format_, n, _depth(format_, n, blocks_per_sm)) for n in TOKEN_TILES if n <= largest)


def _depth(format_: Format, tokens: int, blocks_per_sm: int) -> int:
    """Blocks per slot that fill it: as many groups as fit both limits, at least one."""
    if not format_.decoded:
        return 1
    per_group = GROUP // block_features(format_)
    fits = [
        groups * per_group
        for groups in (1, 2)  # with four, a mixture's loops lose uniform registers (docs/measurements/ring.md)
        if groups * format_.chunk_bytes * blocks_per_sm <= WEIGHT_LIMIT
        and groups * per_group * tokens * ROW_BYTES * blocks_per_sm <= TOKEN_LIMIT
    ]
    return max(fits, default=per_group)
