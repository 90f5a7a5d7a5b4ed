"""A consumer warpgroup's tile: its main loop, then scales, rounding and the store (CuTe DSL)."""

from dataclasses import dataclass
from typing import Any

import cutlass
import cutlass.utils.hopper_helpers as hopper
from cutlass import BFloat16, Boolean, Float32, Int8, Int32, Int64, const_expr, cute
from cutlass._mlir.dialects import llvm
from cutlass.cute.nvgpu import OperandMajorMode, warp, warpgroup
from cutlass.cutlass_dsl import T

from mxmoe_steps.kernels.codes.format import HALF_ROWS, Format
from mxmoe_steps.kernels.codes.w16a16 import W16A16
from mxmoe_steps.kernels.limits import GATE_ROWS
from mxmoe_steps.kernels.rounding import sigmoid
from mxmoe_steps.kernels.sm90.config import EPILOGUE_TOKENS, LATENCY_TOKENS, by_warp
from mxmoe_steps.kernels.sm90.main_loops import MainLoops
from mxmoe_steps.kernels.sm90.ring import OPERAND_TYPES, Partials, Ring
from mxmoe_steps.kernels.sm90.schedule import Place

STORED = 16  # tokens that a warpgroup stores at once: 16 bytes a thread


def opaque(value: Int32) -> Int32:
    """The same value, unknown to the compiler: what is derived from it is computed here, not kept in registers
    across tiles for every configuration. Emits no instruction."""
    return Int32(llvm.inline_asm(T.i32(), [value.ir_value()], "", "=r,0", has_side_effects=True))


def store_if(wanted: Boolean, words: cute.Tensor, target: Int64) -> None:
    """Write two or four words to the global address ``target``, if ``wanted``: behind a branch, every store would wait
    for its own words."""
    count = cute.size(words)
    names = ", ".join(f"{{$r{i + 1}}}" for i in range(count))
    cute.arch.inline_ptx(
        f"st.global.v{count}.b32 [{{$r0}}], {{{names}}};",
        read_only_args=[target, *(words[i] for i in range(count))],
        predicate=wanted,
    )


def store_matrices(address: Int32, first: Int32, second: Int32) -> None:
    """Two 8 x 8 matrices of 16-bit elements, transposed, to shared memory: a lane has two elements of a row of each;
    lanes 8 i to 8 i + 7 have the addresses of the columns of matrix i."""
    cute.arch.inline_ptx(
        "stmatrix.sync.aligned.m8n8.x2.trans.shared.b16 [{$r0}], {{$r1}, {$r2}};",
        read_only_args=[address, first, second],
    )


def multiply_gated(gate: cute.Tensor, up: cute.Tensor) -> cute.Tensor:
    """silu(gate) * up in float32, rounded to bfloat16, as `activations.SwiGlu` does."""
    values = cute.make_rmem_tensor((cute.size(gate),), Float32)
    for e in range(cute.size(gate)):
        value = Float32(gate[e])
        values[e] = value * sigmoid(value) * Float32(up[e])
    made = cute.make_fragment_like(values, BFloat16)
    made.store(values.load().to(BFloat16))
    return made


@dataclass(frozen=True)
class Factors:
    """What a thread multiplies the sums by: factors of rows and of tokens, on their way while its tile is multiplied.
    Nothing is done with them before: it would wait for them."""

    channels: cute.Tensor
    tokens: cute.Tensor


class Consumer(MainLoops):
    """Multiplies and stores with the configuration that the tile takes."""

    def mma_of(self, format_: Format, tokens: int) -> cute.TiledMma:
        operand = OPERAND_TYPES[format_.operand]
        source = warpgroup.OperandSource.RMEM if format_.decoded else warpgroup.OperandSource.SMEM
        major = OperandMajorMode.K
        accumulator = Int32 if operand is Int8 else Float32
        return hopper.make_trivial_tiled_mma(
            operand, operand, major, major, accumulator, (self.groups, 1, 1), (64, tokens), source
        )

    @cute.jit
    def consume_one_of(
        self,
        first: cutlass.Constexpr,
        last: cutlass.Constexpr,
        mmas: tuple,
        ring: Ring,
        partials: Partials,
        staging: Any,
        shared_scales: cute.Tensor,
        token_scales: tuple,
        channel_scales: tuple,
        thread: Int32,
        group: Int32,
        place: Place,
        stored: Boolean,
        features: Int32,
        out: cute.Tensor,
        stage: Int32,
        phase: Int32,
        end: Int32,
    ) -> tuple[Int32, Int32, Int32]:
        """`consume` with the one of the configurations ``first .. last - 1`` that the tile takes."""
        if const_expr(last - first == 1):
            format_ = self.tiles[first].format
            stage, phase, end = self.consume(
                first, mmas[first], ring, partials, staging, shared_scales,
                token_scales[self.operands.index(format_.operand)], channel_scales[self.formats.index(format_)],
                thread, group, place, stored, features, out, stage, phase, end,
            )  # fmt: skip
        else:
            middle = (first + last) // 2
            if self.before(middle, place):
                stage, phase, end = self.consume_one_of(
                    first, middle, mmas, ring, partials, staging, shared_scales, token_scales, channel_scales, thread,
                    group, place, stored, features, out, stage, phase, end,
                )  # fmt: skip
            else:
                stage, phase, end = self.consume_one_of(
                    middle, last, mmas, ring, partials, staging, shared_scales, token_scales, channel_scales, thread,
                    group, place, stored, features, out, stage, phase, end,
                )  # fmt: skip
        return stage, phase, end

    @cute.jit
    def consume(
        self,
        i: cutlass.Constexpr,
        mma: cute.TiledMma,
        ring: Ring,
        partials: Partials,
        staging: Any,
        shared_scales: cute.Tensor,
        token_scales: cute.Tensor,
        channel_scales: cute.Tensor,
        thread: Int32,
        group: Int32,
        place: Place,
        stored: Boolean,
        features: Int32,
        out: cute.Tensor,
        stage: Int32,
        phase: Int32,
        end: Int32,
    ) -> tuple[Int32, Int32, Int32]:
        """Multiply one tile with configuration ``i`` and, if ``stored``, store this warpgroup's 64 rows."""
        tile = self.tiles[i]
        format_ = tile.format
        thread = opaque(thread)
        if const_expr(self.split == 1):
            factors = self.fetch_factors(tile, token_scales, channel_scales, thread, place)
        else:
            factors = self.fetch_quad_factors(tile, token_scales, channel_scales, thread, group, place)

        mma.set(warpgroup.Field.ACCUMULATE, True)
        mine = mma.get_slice(cute.make_layout(self.groups, stride=128)(group))
        token_blocks = self.blocks(ring, format_.operand, tile.tokens, tile.token_offset, tile.depth)
        tokens = mma.make_fragment_B(mine.partition_B(token_blocks))
        kind = Int32 if format_.operand == "int8" and not format_.decoded else Float32
        acc = cute.make_rmem_tensor(mma.partition_shape_C((self.rows, tile.tokens)), kind)
        acc.fill(0)
        slots = self.dealt(tile, features, partials.part)
        if const_expr(not format_.decoded):
            weight_blocks = self.blocks(ring, format_.operand, self.rows, 0, tile.depth)
            weights = mma.make_fragment_A(mine.partition_A(weight_blocks))
            stage, phase, end = self.multiply_rows(tile, mma, acc, ring, weights, tokens, slots, stage, phase, end)
        elif const_expr(self.split > 1 and by_warp(format_)):
            stage, phase, end = self.multiply_few(tile, acc, ring, thread, slots, stage, phase, end)
        elif const_expr(format_.operand == "bf16"):
            stage, phase, end = self.multiply_bf16(tile, mma, acc, ring, tokens, thread, slots, stage, phase, end)
        else:
            stage, phase, end = self.multiply_8bit(
                tile, mma, acc, ring, tokens, thread, features, slots, stage, phase, end
            )

        if const_expr(self.split == 1):
            store = self.store_product if self.config.gated else self.store
            store(i, acc, staging, shared_scales, factors, thread, group, place, stored, out)
        else:
            self.store_sum(i, acc, partials, factors, thread, group, place, stored, out)
        return stage, phase, end

    @cute.jit
    def fetch_factors(
        self,
        tile: cutlass.Constexpr,
        token_scales: cute.Tensor,
        channel_scales: cute.Tensor,
        thread: Int32,
        place: Place,
    ) -> Factors:
        """Of the thread's two rows, and of tokens thread, thread + 128, ..."""
        format_, in_group = tile.format, thread & 127
        row = place.row_tile * self.rows + (thread >> 5) * 16 + ((thread & 31) >> 2)
        channels = cute.make_rmem_tensor((2,), Float32)
        tokens = cute.make_rmem_tensor(((tile.tokens + 127) // 128,), Float32)
        for r in cutlass.range_constexpr(2):
            channels[r] = channel_scales[place.entry, row + 8 * r] if format_.channel_scaled else Float32(1.0)
        for j in cutlass.range_constexpr(cute.size(tokens)):
            tokens[j] = self.token_factor(format_, token_scales, in_group + 128 * j, place)
        return Factors(channels, tokens)

    @cute.jit
    def fetch_quad_factors(
        self,
        tile: cutlass.Constexpr,
        token_scales: cute.Tensor,
        channel_scales: cute.Tensor,
        thread: Int32,
        group: Int32,
        place: Place,
    ) -> Factors:
        """Of the rows and the token that `store_sum` adds up."""
        format_ = tile.format
        row, token = self.quad(thread, group)
        channels = cute.make_rmem_tensor((4, self.quads), Float32)
        tokens = cute.make_rmem_tensor((1,), Float32)
        channels.fill(1.0)
        if const_expr(format_.channel_scaled):
            for q in cutlass.range_constexpr(self.quads):
                at = place.entry * channel_scales.shape[1] + place.row_tile * self.rows + row + q * GATE_ROWS
                four = cute.make_tensor(channel_scales.iterator + cute.assume(at, divby=4), cute.make_layout(4))
                cute.autovec_copy(four, channels[None, q])
        tokens[0] = self.token_factor(format_, token_scales, token, place)
        return Factors(channels, tokens)

    @property
    def quads(self) -> int:
        """Runs of four rows that a thread adds up in `store_sum`: one, or one of gate and one of up."""
        return 2 if self.config.gated else 1

    def quad(self, thread: Int32, group: Int32) -> tuple[Int32, Int32]:
        """First row, of gate if ``gated``, in the tile, and token of a thread in `store_sum`. Gated tiles have as many
        for half of the threads; the others repeat them."""
        if self.config.gated:
            return group * HALF_ROWS + (thread & 6) * GATE_ROWS + (thread & 1) * 4, thread >> 3 & 7
        return group * HALF_ROWS + (thread & 15) * 4, (thread & 127) >> 4

    @cute.jit
    def token_factor(
        self, format_: cutlass.Constexpr, token_scales: cute.Tensor, token: Int32, place: Place
    ) -> Float32:
        """What the sums of a token of the tile are to be multiplied by; 0 past the last."""
        factor = Float32(0.0)
        if const_expr(format_.token_scaled):  # noqa: SIM102 (known when the kernel is compiled)
            if token < place.rows:
                factor = token_scales[place.first + token]
        return factor

    @cute.jit
    def store(
        self,
        i: cutlass.Constexpr,
        acc: cute.Tensor,
        staging: Any,
        shared_scales: cute.Tensor,
        factors: Factors,
        thread: Int32,
        group: Int32,
        place: Place,
        stored: Boolean,
        out: cute.Tensor,
    ) -> None:
        """Scale and round the sums of configuration ``i`` and, if ``stored``, store them."""
        tile, pitch = self.tiles[i], self.config.staging_pitch
        format_ = tile.format
        lane, in_group = thread & 31, thread & 127
        if const_expr(format_.growth != 1):
            factors.channels.store(factors.channels.load() * Float32(format_.growth))
        if const_expr(format_.token_scaled):
            for j in cutlass.range_constexpr(cute.size(factors.tokens)):
                if in_group + 128 * j < tile.tokens:
                    shared_scales[in_group + 128 * j, group] = factors.tokens[j]
        row8 = cute.assume(group * 64 + (in_group & 7) * 8, divby=8)  # of the 8 rows this thread stores
        token = in_group >> 3  # the first one
        source = cute.assume(token * pitch + row8, divby=8)
        target = Int64(place.first + token) * out.shape[1] + place.column + place.row_tile * self.rows + row8
        address = out.iterator.toint() + 2 * target
        pair = cute.make_rmem_tensor((2,), Float32)
        for start in cutlass.range_constexpr(0, tile.tokens, EPILOGUE_TOKENS):
            staged = min(tile.tokens - start, EPILOGUE_TOKENS)
            staging_tile = cute.make_tensor(staging, cute.make_layout((self.rows, staged), stride=(1, pitch)))
            staging_mma = self.mma_of(W16A16(), staged)
            store = cute.make_copy_atom(warp.StMatrix8x8x16bOp(True, min(4, staged // 4)), BFloat16)
            to_staging = cute.make_tiled_copy_C(store, staging_mma)
            values = cute.make_rmem_tensor(staging_mma.partition_shape_C((self.rows, staged)), Float32)
            rounded = cute.make_fragment_like(values, BFloat16)
            cute.arch.barrier(barrier_id=1 + group, number_of_threads=128)
            for e in cutlass.range_constexpr(cute.size(values)):
                value = Float32(acc[start // 2 + e])
                if const_expr(format_.channel_scaled or format_.growth != 1):
                    value = value * factors.channels[e // 2 % 2]
                if const_expr(format_.token_scaled):
                    if const_expr(e % 4 == 0):
                        at = cute.assume(start + 2 * e + 2 * (lane & 3), divby=2)
                        scale_pair = cute.make_tensor(shared_scales[None, group].iterator + at, cute.make_layout(2))
                        cute.autovec_copy(scale_pair, pair)
                    value = value * pair[e % 2]
                values[e] = value
            rounded.store(values.load().to(BFloat16))
            cute.copy(to_staging, to_staging.retile(rounded), to_staging.get_slice(thread).partition_D(staging_tile))
            cute.arch.barrier(barrier_id=1 + group, number_of_threads=128)
            words = cute.make_rmem_tensor((4, (staged + STORED - 1) // STORED), Int32)
            for j in cutlass.range_constexpr(cute.size(words, mode=[1])):
                staged_words = cute.recast_ptr(staging + source + STORED * j * pitch, dtype=Int32)
                cute.autovec_copy(cute.make_tensor(staged_words, cute.make_layout(4)), words[None, j])
            for j in cutlass.range_constexpr(cute.size(words, mode=[1])):
                store_if(stored & (start + token + STORED * j < place.rows), words[None, j], address)
                address += 2 * STORED * Int64(out.shape[1])

    @cute.jit
    def store_product(
        self,
        i: cutlass.Constexpr,
        acc: cute.Tensor,
        staging: Any,
        shared_scales: cute.Tensor,
        factors: Factors,
        thread: Int32,
        group: Int32,
        place: Place,
        stored: Boolean,
        out: cute.Tensor,
    ) -> None:
        """As `store`, of gate and up: a thread's first row and its second one, which become one."""
        tile, pitch = self.tiles[i], self.config.staging_pitch
        format_ = tile.format
        lane, in_group = thread & 31, thread & 127
        if const_expr(format_.growth != 1):
            factors.channels.store(factors.channels.load() * Float32(format_.growth))
        if const_expr(format_.token_scaled):
            for j in cutlass.range_constexpr(cute.size(factors.tokens)):
                if in_group + 128 * j < tile.tokens:
                    shared_scales[in_group + 128 * j, group] = factors.tokens[j]
        column8 = cute.assume(group * HALF_ROWS // 2 + (in_group & 3) * 8, divby=8)  # of the 8 that this thread stores
        token = in_group >> 2  # the first one
        source = cute.assume(token * pitch + column8, divby=8)
        target = Int64(place.first + token) * out.shape[1] + place.column + place.row_tile * (self.rows // 2) + column8
        address = out.iterator.toint() + 2 * target
        lines = (staging + ((lane & 15) * pitch + (thread >> 5) * GATE_ROWS)).toint()  # of the lane's token of a matrix
        pair = cute.make_rmem_tensor((2,), Float32)
        for start in cutlass.range_constexpr(0, tile.tokens, EPILOGUE_TOKENS):
            staged = min(tile.tokens - start, EPILOGUE_TOKENS)
            values = cute.make_rmem_tensor((staged // 4, 2), Float32)  # (token, gate or up)
            cute.arch.barrier(barrier_id=1 + group, number_of_threads=128)
            for e in cutlass.range_constexpr(cute.size(values)):
                value = Float32(acc[start // 2 + e])
                if const_expr(format_.channel_scaled or format_.growth != 1):
                    value = value * factors.channels[e // 2 % 2]
                if const_expr(format_.token_scaled):
                    if const_expr(e % 4 == 0):
                        at = cute.assume(start + 2 * e + 2 * (lane & 3), divby=2)
                        scale_pair = cute.make_tensor(shared_scales[None, group].iterator + at, cute.make_layout(2))
                        cute.autovec_copy(scale_pair, pair)
                    value = value * pair[e % 2]
                values[e // 4 * 2 + e % 2, e // 2 % 2] = value
            rounded = cute.make_fragment_like(values, BFloat16)
            rounded.store(values.load().to(BFloat16))
            made = multiply_gated(rounded[None, 0], rounded[None, 1])
            matrices = cute.make_tensor(cute.recast_ptr(made.iterator, dtype=Int32), cute.make_layout(staged // 8))
            for j in cutlass.range_constexpr(0, staged // 8, 2):
                store_matrices(lines + 2 * 8 * j * pitch, matrices[j], matrices[j + 1])
            cute.arch.barrier(barrier_id=1 + group, number_of_threads=128)
            words = cute.make_rmem_tensor((4, (staged + 31) // 32), Int32)
            for j in cutlass.range_constexpr(cute.size(words, mode=[1])):
                staged_words = cute.recast_ptr(staging + source + 32 * j * pitch, dtype=Int32)
                cute.autovec_copy(cute.make_tensor(staged_words, cute.make_layout(4)), words[None, j])
            for j in cutlass.range_constexpr(cute.size(words, mode=[1])):
                store_if(stored & (start + token + 32 * j < place.rows), words[None, j], address)
                address += 2 * 32 * Int64(out.shape[1])

    @cute.jit
    def store_sum(
        self,
        i: cutlass.Constexpr,
        acc: cute.Tensor,
        partials: Partials,
        factors: Factors,
        thread: Int32,
        group: Int32,
        place: Place,
        stored: Boolean,
        out: cute.Tensor,
    ) -> None:
        """Leave a part's sums in shared memory. Parts take turns to add those of all parts, in order, to scale, round
        and, if ``stored``, store them, while the others go on."""
        format_, pitch = self.tiles[i].format, self.config.staging_pitch
        lane = thread & 31
        size = LATENCY_TOKENS * pitch  # of a part's sums
        sums = cute.recast_ptr(partials.sums, dtype=acc.element_type)
        start = partials.part * size + 2 * (lane & 3) * pitch + (thread >> 5) * 16 + (lane >> 2)
        cute.arch.mbarrier_wait(partials.free, partials.turn & 1 ^ 1)
        for e in cutlass.range_constexpr(4):
            cute.make_tensor(sums + (start + e % 2 * pitch + e // 2 * 8), cute.make_layout(1)).fill(acc[e])
        cute.arch.sync_warp()
        if lane == 0:
            cute.arch.mbarrier_arrive(partials.full)
        if partials.turn & (self.split - 1) == partials.part:
            row, token = self.quad(thread, group)
            column = (row >> 4) * GATE_ROWS + (row & 4) if self.config.gated else row
            target = Int64(place.first + token) * out.shape[1] + place.column
            target += place.row_tile * (self.rows // self.quads) + column
            total = cute.make_rmem_tensor((4, self.quads), acc.element_type)
            other = cute.make_rmem_tensor((4,), acc.element_type)
            total.fill(0)
            if const_expr(format_.growth != 1):
                factors.channels.store(factors.channels.load() * Float32(format_.growth))
            cute.arch.mbarrier_wait(partials.full, partials.turn & 1)
            for part in cutlass.range_constexpr(self.split):
                for q in cutlass.range_constexpr(self.quads):
                    at = cute.assume(part * size + token * pitch + row + q * GATE_ROWS, divby=4)
                    cute.autovec_copy(cute.make_tensor(sums + at, cute.make_layout(4)), other)
                    for e in cutlass.range_constexpr(4):
                        total[e, q] = total[e, q] + other[e]
            cute.arch.sync_warp()
            if lane == 0:
                cute.arch.mbarrier_arrive(partials.free)
            values = cute.make_rmem_tensor((4, self.quads), Float32)
            rounded = cute.make_rmem_tensor((4, self.quads), BFloat16)
            for e in cutlass.range_constexpr(cute.size(values)):
                values[e] = Float32(total[e])
                if const_expr(format_.channel_scaled or format_.growth != 1):
                    values[e] = values[e] * factors.channels[e]
                if const_expr(format_.token_scaled):
                    values[e] = values[e] * factors.tokens[0]
            rounded.store(values.load().to(BFloat16))
            if const_expr(self.config.gated):
                rounded = multiply_gated(rounded[None, 0], rounded[None, 1])
            words = cute.make_tensor(cute.recast_ptr(rounded.iterator, dtype=Int32), cute.make_layout(2))
            wanted = stored & (token < place.rows)
            if const_expr(self.config.gated):
                wanted = wanted & ((thread & 64) == 0)
            store_if(wanted, words, out.iterator.toint() + 2 * target)
