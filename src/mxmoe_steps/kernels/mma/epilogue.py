"""The epilogue of a warp's tile: scales, SwiGLU, rounding and the store (CuTe DSL).

Sums x token scale x channel scale -> bfloat16 -> transposed by ``movmatrix`` -> the warp's own staged tokens in shared
memory -> 16-byte stores, predicated by the expert's rows and by N. Sums of a split's parts are added first.
"""

from dataclasses import dataclass
from typing import Any

import cutlass
from cutlass import BFloat16, Boolean, Float32, Int32, Int64, const_expr, cute

from mxmoe_steps.kernels.mma.asynchronous import meet
from mxmoe_steps.kernels.mma.config import MMA_ROWS, MMA_TOKENS, ROW_WARPS, STAGED_TOKENS, MmaConfig
from mxmoe_steps.kernels.mma.fragments import transpose
from mxmoe_steps.kernels.mma.main_loops import Warp
from mxmoe_steps.kernels.rounding import swiglu
from mxmoe_steps.kernels.sm90.config import Tile
from mxmoe_steps.kernels.sm90.registers import row_of
from mxmoe_steps.kernels.sm90.scheduler import Place

WRITTEN, READ = 1, 2  # named barriers: the parts' sums are in shared memory; they are added


def store_if(condition: Boolean, words: cute.Tensor, target: Int64) -> None:
    """16 bytes to global memory, on ``condition``: behind a branch, every store would wait for its own words."""
    cute.arch.inline_ptx(
        "st.global.v4.b32 [{$r0}], {{$r1}, {$r2}, {$r3}, {$r4}};",
        read_only_args=[target, *(words[i] for i in range(4))],
        predicate=condition,
    )


@dataclass(frozen=True)
class Factors:
    """What a warp multiplies the sums by, on its way while its tile is multiplied: of the thread's rows (row of two,
    row block); of the warp's tokens (word), token ``32 w + l`` in word w of lane l, since all of a thread's own would
    not fit beside the sums of large tiles."""

    channels: cute.Tensor
    tokens: cute.Tensor


@dataclass(frozen=True)
class Epilogue:
    """``staging``: shared memory, of all warps' tokens and then of parts' sums; ``token_scales``: [rows],
    ``channel_scales``: [entries, N], of the tile's operand and format."""

    config: MmaConfig
    tile: Tile
    warp: Warp
    staging: Any
    token_scales: cute.Tensor
    channel_scales: cute.Tensor

    @property
    def token_blocks(self) -> int:
        return self.config.token_blocks(self.tile)

    @property
    def first_token(self) -> Int32:
        """Of the warp, in the tile."""
        return self.warp.column * (self.token_blocks * MMA_TOKENS)

    @cute.jit
    def fetch(self, place: Place) -> Factors:
        """The factors of what the warp will store."""
        format_, warp = self.tile.format, self.warp
        channels = cute.make_rmem_tensor((2, self.config.row_blocks), Float32)
        channels.fill(1.0)
        if const_expr(format_.channel_scaled):
            first = place.row_tile * self.config.rows + warp.row * self.config.warp_rows + (warp.lane >> 2)
            for m in cutlass.range_constexpr(self.config.row_blocks):
                for r in cutlass.range_constexpr(2):
                    channels[r, m] = self.channel_scales[place.entry, first + m * MMA_ROWS + 8 * r]
        tokens = cute.make_rmem_tensor(((self.token_blocks * MMA_TOKENS + 31) // 32,), Float32)
        tokens.fill(1.0)
        if const_expr(format_.token_scaled):
            for word in cutlass.range_constexpr(cute.size(tokens)):
                token = self.first_token + 32 * word + warp.lane
                if token < place.rows:
                    tokens[word] = self.token_scales[place.first + token]
        return Factors(channels, tokens)

    def token_factors(self, factors: Factors, block: int) -> tuple[Float32, ...]:
        """Those of the thread's two tokens of a token block, from the lanes that hold them."""
        if not self.tile.format.token_scaled:
            return Float32(1.0), Float32(1.0)
        word, first = divmod(block * MMA_TOKENS, 32)
        lane = first + 2 * (self.warp.lane & 3)
        return tuple(cute.arch.shuffle_sync(factors.tokens[word], lane + i) for i in range(2))

    @cute.jit
    def finish(self, acc: cute.Tensor, factors: Factors, place: Place, out: cute.Tensor, stored: Boolean) -> None:
        """Add up parts, scale, round and store, if the rows are ``stored``."""
        if const_expr(self.config.split == 1):
            self.store(acc, factors, place, out, stored)
        else:
            self.leave(acc)
            meet(WRITTEN, 32 * self.config.warps)
            if self.warp.part == 0:
                self.add(acc)
            meet(READ, 32 * self.config.warps)
            if self.warp.part == 0:
                self.store(acc, factors, place, out, stored)

    def sums_of(self, acc: cute.Tensor, part: Any) -> cute.Tensor:
        """Where this thread's sums of a part lie: (element)."""
        threads = 32 * self.config.part_warps
        offset = self.config.staging_bytes - self.config.sums_bytes
        thread = (self.warp.column * ROW_WARPS + self.warp.row) * 32 + self.warp.lane
        pointer = cute.recast_ptr(self.staging + offset, dtype=acc.element_type)
        at = (part - 1) * (threads * cute.size(acc)) + thread
        return cute.make_tensor(pointer + at, cute.make_layout(cute.size(acc), stride=threads))

    @cute.jit
    def leave(self, acc: cute.Tensor) -> None:
        """The sums of a part but the first into shared memory."""
        if self.warp.part > 0:
            sums = self.sums_of(acc, self.warp.part)
            for e in cutlass.range_constexpr(cute.size(acc)):
                sums[e] = acc[e]

    @cute.jit
    def add(self, acc: cute.Tensor) -> None:
        """The sums of the other parts to those of the first, in order."""
        for part in cutlass.range_constexpr(1, self.config.split):
            sums = self.sums_of(acc, part)
            for e in cutlass.range_constexpr(cute.size(acc)):
                acc[e] = acc[e] + sums[e]

    @cute.jit
    def store(self, acc: cute.Tensor, factors: Factors, place: Place, out: cute.Tensor, stored: Boolean) -> None:
        """Scale, round and store the warp's tile."""
        config, lane = self.config, self.warp.lane
        pitch, columns = config.staging_pitch, config.stored_rows
        staged = min(STAGED_TOKENS, self.token_blocks * MMA_TOKENS)
        own_at = (self.warp.column * ROW_WARPS + self.warp.row) * (STAGED_TOKENS * pitch)
        own = self.staging + cute.assume(own_at, divby=16)
        lanes = columns // 8  # that store a token, 16 bytes each
        at_once = 32 // lanes  # tokens that the warp stores
        token, part = lane >> (lanes.bit_length() - 1), lane & (lanes - 1)
        column = place.column + (place.row_tile * ROW_WARPS + self.warp.row) * columns + part * 8
        first = Int64(place.first + self.first_token + token) * Int64(out.shape[1]) + Int64(column)
        address = out.iterator.toint() + 2 * first
        left = place.rows - self.first_token
        for start in cutlass.range_constexpr(0, self.token_blocks * MMA_TOKENS, staged):
            cute.arch.sync_warp()
            for n in cutlass.range_constexpr(staged // MMA_TOKENS):
                self.stage(acc, factors, start // MMA_TOKENS + n, own + n * MMA_TOKENS * pitch)
            cute.arch.sync_warp()
            for j in cutlass.range_constexpr(0, staged, at_once):
                words = cute.make_rmem_tensor((4,), Int32)
                at = cute.assume((token + j) * pitch + part * 16, divby=16)
                source = cute.recast_ptr(own + at, dtype=Int32)
                there = (token + j < staged) & (start + token + j < left)
                cute.autovec_copy(cute.make_tensor(source, cute.make_layout(4)), words)
                store_if(stored & there, words, address + Int64(2 * (start + j)) * Int64(out.shape[1]))

    @cute.jit
    def stage(self, acc: cute.Tensor, factors: Factors, n: cutlass.Constexpr, target: Any) -> None:
        """The token block ``n`` of the warp's tile to its staged tokens."""
        growth, lane = self.tile.format.growth, self.warp.lane
        at = cute.assume((lane >> 2) * self.config.staging_pitch + (lane & 3) * 4, divby=4)
        tokens = self.token_factors(factors, n)
        for m in cutlass.range_constexpr(self.config.row_blocks):
            values = cute.make_rmem_tensor((2, 2), Float32)  # token, row
            for e in cutlass.range_constexpr(4):
                factor = factors.channels[row_of(e), m] * Float32(growth)
                values[e] = Float32(acc[e, n, m]) * factor * tokens[e % 2]
            rounded = cute.make_fragment_like(values, BFloat16)
            rounded.store(values.load().to(BFloat16))
            if const_expr(self.config.gated):
                rounded = swiglu(rounded[None, 0], rounded[None, 1])
            pairs = cute.make_tensor(
                cute.recast_ptr(rounded.iterator, dtype=Int32), cute.make_layout(cute.size(rounded) // 2)
            )
            for r in cutlass.range_constexpr(cute.size(pairs)):
                place = target + at + (m * cute.size(pairs) + r) * 16
                cute.make_tensor(cute.recast_ptr(place, dtype=Int32), cute.make_layout(1))[0] = transpose(pairs[r])
