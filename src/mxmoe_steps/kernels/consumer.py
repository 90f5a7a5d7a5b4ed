"""A consumer warpgroup's tile: its main loop, then scales, rounding and the store (CuTe DSL)."""

from typing import Any

import cutlass
import cutlass.utils.hopper_helpers as hopper
from cutlass import BFloat16, Boolean, Float32, Int8, Int32, Int64, const_expr, cute
from cutlass._mlir.dialects import llvm
from cutlass.cute.nvgpu import OperandMajorMode, warp, warpgroup
from cutlass.cutlass_dsl import T

from mxmoe_steps.kernels import decode
from mxmoe_steps.kernels.formats import EPILOGUE_TOKENS, Format
from mxmoe_steps.kernels.main_loops import MainLoops
from mxmoe_steps.kernels.ring import OPERAND_TYPES, Partials, Ring
from mxmoe_steps.kernels.schedule import Place

STORED = 16  # tokens that a warpgroup stores at once: 16 bytes a thread


def opaque(value: Int32) -> Int32:
    """The same value, unknown to the compiler: what is derived from it is computed here, not kept in registers
    across tiles for every configuration. Emits no instruction."""
    return Int32(llvm.inline_asm(T.i32(), [value.ir_value()], "", "=r,0", has_side_effects=True))


def store_if(wanted: Boolean, words: cute.Tensor, target: Int64) -> None:
    """Write four words to the global address ``target``, if ``wanted``: behind a branch, every store would wait for its
    own words."""
    cute.arch.inline_ptx(
        "st.global.v4.b32 [{$r0}], {{$r1}, {$r2}, {$r3}, {$r4}};",
        read_only_args=[target, *(words[i] for i in range(4))],
        predicate=wanted,
    )


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
        lane, in_group = thread & 31, thread & 127
        row = (thread >> 5) * 16 + (lane >> 2)  # of the thread's two rows, row and row + 8, in the tile
        scale_row = place.row_tile * self.rows + row
        grow = decode.GROW[format_.bits] if format_.grown else 1.0
        channel0, channel1 = Float32(grow), Float32(grow)
        if const_expr(format_.channel_scaled):
            channel0 *= channel_scales[place.entry, scale_row]
            channel1 *= channel_scales[place.entry, scale_row + 8]
        fetched = cute.make_rmem_tensor(((tile.tokens + 127) // 128,), Float32)
        if const_expr(format_.token_scaled):
            for j in cutlass.range_constexpr(cute.size(fetched)):
                fetched[j] = Float32(0.0)
                if in_group + 128 * j < place.rows:
                    fetched[j] = token_scales[place.first + in_group + 128 * j]

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
        elif const_expr(format_.operand == "bf16"):
            stage, phase, end = self.multiply_bf16(tile, mma, acc, ring, tokens, thread, row, slots, stage, phase, end)
        else:
            stage, phase, end = self.multiply_8bit(
                tile, mma, acc, ring, tokens, thread, row, features, slots, stage, phase, end
            )

        store = (
            i, acc, staging, shared_scales, fetched, (channel0, channel1), thread, group, place, stored, out,
        )  # fmt: skip
        if const_expr(self.split == 1):
            self.store(*store)
        elif partials.part == 0:
            self.add_parts(acc, partials, thread)
            self.store(*store)
        else:
            self.send_part(acc, partials, thread)
        return stage, phase, end

    @cute.jit
    def store(
        self,
        i: cutlass.Constexpr,
        acc: cute.Tensor,
        staging: Any,
        shared_scales: cute.Tensor,
        fetched: cute.Tensor,
        channels: tuple,
        thread: Int32,
        group: Int32,
        place: Place,
        stored: Boolean,
        out: cute.Tensor,
    ) -> None:
        """Scale and round the sums of configuration ``i`` and, if ``stored``, store them.

        ``fetched``: scales of the tokens thread, thread + 128, ...; ``channels``: of the thread's two rows.
        """
        tile, pitch = self.tiles[i], self.config.staging_pitch
        format_ = tile.format
        lane, in_group = thread & 31, thread & 127
        channel0, channel1 = channels
        if const_expr(format_.token_scaled):
            for j in cutlass.range_constexpr(cute.size(fetched)):
                if in_group + 128 * j < tile.tokens:
                    shared_scales[in_group + 128 * j, group] = fetched[j]
        row8 = cute.assume(group * 64 + (in_group & 7) * 8, divby=8)  # of the 8 rows this thread stores
        token = in_group >> 3  # the first one
        source = cute.assume(token * pitch + row8, divby=8)
        target = Int64(place.first + token) * out.shape[1] + place.column + place.row_tile * self.rows + row8
        address = out.iterator.toint() + 2 * target
        pair = cute.make_rmem_tensor((2,), Float32)
        for start in cutlass.range_constexpr(0, tile.tokens, EPILOGUE_TOKENS):
            staged = min(tile.tokens - start, EPILOGUE_TOKENS)
            staging_tile = cute.make_tensor(staging, cute.make_layout((self.rows, staged), stride=(1, pitch)))
            staging_mma = self.mma_of(Format("bf16", 16), staged)
            store = cute.make_copy_atom(warp.StMatrix8x8x16bOp(True, min(4, staged // 4)), BFloat16)
            to_staging = cute.make_tiled_copy_C(store, staging_mma)
            values = cute.make_rmem_tensor(staging_mma.partition_shape_C((self.rows, staged)), Float32)
            rounded = cute.make_fragment_like(values, BFloat16)
            cute.arch.barrier(barrier_id=1 + group, number_of_threads=128)
            for e in cutlass.range_constexpr(cute.size(values)):
                value = Float32(acc[start // 2 + e])
                if const_expr(format_.channel_scaled or format_.grown):
                    value = value * (channel0 if (e // 2) % 2 == 0 else channel1)
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

    def part_vector(self, acc: cute.Tensor, part: Any, vector: int, thread: Int32, sums: Any) -> cute.Tensor:
        """Where vector ``vector`` of a thread's sums of part ``part`` (from 1) lies, four elements; warps in a row."""
        vectors, threads = cute.size(acc) // 4, 128 * self.groups
        at = cute.assume((((part - 1) * vectors + vector) * threads + thread) * 4, divby=4)
        return cute.make_tensor(cute.recast_ptr(sums, dtype=acc.element_type) + at, cute.make_layout(4))

    @cute.jit
    def send_part(self, acc: cute.Tensor, partials: Partials, thread: Int32) -> None:
        """Hand this part's sums to the first one."""
        cute.arch.mbarrier_wait(partials.free, partials.turn & 1 ^ 1)
        four = cute.make_rmem_tensor((4,), acc.element_type)
        for j in cutlass.range_constexpr(cute.size(acc) // 4):
            for e in cutlass.range_constexpr(4):
                four[e] = acc[4 * j + e]
            cute.autovec_copy(four, self.part_vector(acc, partials.part, j, thread, partials.sums))
        cute.arch.sync_warp()
        if thread & 31 == 0:
            cute.arch.mbarrier_arrive(partials.full)

    @cute.jit
    def add_parts(self, acc: cute.Tensor, partials: Partials, thread: Int32) -> None:
        """Add the other parts' sums, in order, to those of the first one."""
        cute.arch.mbarrier_wait(partials.full, partials.turn & 1)
        four = cute.make_rmem_tensor((4,), acc.element_type)
        for part in cutlass.range_constexpr(1, self.split):
            for j in cutlass.range_constexpr(cute.size(acc) // 4):
                cute.autovec_copy(self.part_vector(acc, part, j, thread, partials.sums), four)
                for e in cutlass.range_constexpr(4):
                    acc[4 * j + e] = acc[4 * j + e] + four[e]
        cute.arch.sync_warp()
        if thread & 31 == 0:
            cute.arch.mbarrier_arrive(partials.free)
