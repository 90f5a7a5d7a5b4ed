"""What feeds the grouped GEMM: routed tokens sorted by expert, gathered and quantized (CuTe DSL).

`SortByExpert` is one block: count the routed entries of every expert in shared memory, scan, and hand every
entry its row. The order of rows inside an expert is not defined; no result depends on it.

`GatherTokens` gives one block a row: a first pass over it finds the largest magnitude (16-bit schemes skip it),
a second one, from L1, divides, rounds and stores. The arithmetic is that of `reference.quantize_tokens` on a
CPU, bit for bit: one float32 scale per row, correctly rounded division, round to nearest even.
"""

from typing import Any

import cutlass
from cutlass import BFloat16, Float32, Int32, Uint8, const_expr, cute
from cutlass.memory import SmemAllocator

SORT_THREADS = 1024
MAX_EXPERTS = 1024
GATHER_THREADS = 256
VECTOR = 8  # elements a lane moves at once: 16 bytes of bfloat16

LARGEST = {"fp8": 448.0, "int8": 127.0}


class SortByExpert:
    """Counting sort of the router's choices, at most `MAX_EXPERTS` experts.

    ``experts``: int32 [entries], expert of entry ``token * top_k + choice``. Writes ``offsets`` int32 [experts + 1],
    ``source`` int32 [entries], the token of every row, and ``row`` int32 [entries], the row of every entry.
    """

    @cute.jit
    def __call__(
        self,
        experts: cute.Tensor,
        offsets: cute.Tensor,
        source: cute.Tensor,
        row: cute.Tensor,
        top_k: Int32,
        stream: Any,
    ) -> None:
        @cute.struct
        class Shared:
            counts: cute.struct.MemRange[Int32, MAX_EXPERTS]
            sums: cute.struct.MemRange[Int32, SORT_THREADS // 32]

        self.Shared = Shared
        self.kernel(experts, offsets, source, row, top_k).launch(
            grid=(1, 1, 1), block=(SORT_THREADS, 1, 1), stream=stream
        )

    @cute.kernel
    def kernel(
        self, experts: cute.Tensor, offsets: cute.Tensor, source: cute.Tensor, row: cute.Tensor, top_k: Int32
    ) -> None:
        thread, _, _ = cute.arch.thread_idx()
        lane, warp = cute.arch.lane_idx(), cute.arch.warp_idx()
        shared = SmemAllocator().allocate(self.Shared)
        counts = shared.counts.get_tensor(cute.make_layout(MAX_EXPERTS))
        sums = shared.sums.get_tensor(cute.make_layout(SORT_THREADS // 32))
        entries, experts_count = experts.shape[0], offsets.shape[0] - 1
        rounds = (entries + (SORT_THREADS - 1)) // SORT_THREADS
        counts[thread] = Int32(0)
        cute.arch.sync_threads()
        for i in cutlass.range(rounds, unroll=1):
            entry = thread + i * SORT_THREADS
            if entry < entries:
                cute.arch.atomic_add(counts.iterator + experts[entry], Int32(1))
        cute.arch.sync_threads()
        mine = counts[thread]
        upto = self.scan(mine, lane)
        if lane == 31:
            sums[warp] = upto
        cute.arch.sync_threads()
        if warp == 0:
            sums[lane] = self.scan(sums[lane], lane)
        cute.arch.sync_threads()
        if warp > 0:
            upto += sums[warp - 1]
        counts[thread] = upto - mine  # next row of the expert
        if thread < experts_count:
            offsets[thread + 1] = upto
        if thread == 0:
            offsets[0] = Int32(0)
        cute.arch.sync_threads()
        for i in cutlass.range(rounds, unroll=1):
            entry = thread + i * SORT_THREADS
            if entry < entries:
                at = cute.arch.atomic_add(counts.iterator + experts[entry], Int32(1))
                source[at] = entry // top_k
                row[entry] = at

    @cute.jit
    def scan(self, value: Int32, lane: Int32) -> Int32:
        """Inclusive sum over the lanes of a warp."""
        for step in (1, 2, 4, 8, 16):
            below = cute.arch.shuffle_sync_up(value, step)
            if lane >= step:
                value += below
        return value


class GatherTokens:
    """Rows ``source[r]`` of ``x``, bfloat16 [tokens, K], as ``operand``.

    Writes ``values`` [rows, K], bfloat16 or uint8 bits, and for 8-bit operands ``scales`` float32 [rows].
    """

    def __init__(self, operand: str) -> None:
        self.operand = operand

    @cute.jit
    def __call__(
        self, x: cute.Tensor, source: cute.Tensor, values: cute.Tensor, scales: cute.Tensor, stream: Any
    ) -> None:
        @cute.struct
        class Shared:
            largest: cute.struct.MemRange[Int32, GATHER_THREADS // 32]

        self.Shared = Shared
        self.kernel(x, source, values, scales).launch(
            grid=(source.shape[0], 1, 1), block=(GATHER_THREADS, 1, 1), stream=stream
        )

    @cute.kernel
    def kernel(self, x: cute.Tensor, source: cute.Tensor, values: cute.Tensor, scales: cute.Tensor) -> None:
        row, _, _ = cute.arch.block_idx()
        thread, _, _ = cute.arch.thread_idx()
        steps = x.shape[1] // VECTOR
        width = cute.make_layout((VECTOR, steps), stride=(1, VECTOR))
        given = cute.make_tensor(x[source[row], None].iterator, width)
        taken = cute.make_tensor(values[row, None].iterator, width)
        eight = cute.make_rmem_tensor((VECTOR,), BFloat16)
        if const_expr(self.operand == "bf16"):
            for i in cutlass.range(thread, steps, GATHER_THREADS, unroll=1):
                cute.autovec_copy(given[None, i], eight)
                cute.autovec_copy(eight, taken[None, i])
        else:
            pairs = cute.make_tensor(cute.recast_ptr(eight.iterator, dtype=Int32), cute.make_layout(VECTOR // 2))
            codes = cute.make_rmem_tensor((VECTOR,), Uint8)
            packed = cute.make_tensor(cute.recast_ptr(codes.iterator, dtype=Int32), cute.make_layout(2))
            largest = Int32(0)  # a pair of bfloat16 magnitudes
            for i in cutlass.range(thread, steps, GATHER_THREADS, unroll=1):
                cute.autovec_copy(given[None, i], eight)
                for j in cutlass.range_constexpr(VECTOR // 2):
                    largest = self.larger(largest, pairs[j])
            scale = self.divide(self.magnitude(self.of_block(largest)), Float32(LARGEST[self.operand]))
            if thread == 0:
                scales[row] = scale
            inverse = self.divide(Float32(1.0), scale)
            for i in cutlass.range(thread, steps, GATHER_THREADS, unroll=1):
                cute.autovec_copy(given[None, i], eight)
                scaled = [self.quotient(Float32(eight[j]), scale, inverse) for j in range(VECTOR)]
                for j in cutlass.range_constexpr(2):
                    packed[j] = self.rounded(scaled[4 * j : 4 * j + 4])
                cute.autovec_copy(codes, taken[None, i])

    @cute.jit
    def of_block(self, largest: Int32) -> Int32:
        """The largest pair of the block, in every thread."""
        for step in (16, 8, 4, 2, 1):
            largest = self.larger(largest, cute.arch.shuffle_sync_bfly(largest, step))
        warps, mine = GATHER_THREADS // 32, cute.arch.warp_idx()  # a warp-wide exchange: not inside a branch
        shared = SmemAllocator().allocate(self.Shared).largest.get_tensor(cute.make_layout(warps))
        if cute.arch.lane_idx() == 0:
            shared[mine] = largest
        cute.arch.sync_threads()
        for warp in cutlass.range_constexpr(warps):
            largest = self.larger(largest, shared[warp])
        return largest

    @staticmethod
    def larger(pair: Int32, other: Int32) -> Int32:
        """Larger magnitudes of two bfloat16 pairs; NaN wins."""
        return cute.arch.inline_ptx(
            "{ .reg .b32 t; abs.bf16x2 t, {$r1}; max.NaN.bf16x2 {$w0}, {$r0}, t; }",
            write_only_types=[Int32],
            read_only_args=[pair, other],
        )

    @staticmethod
    def magnitude(pair: Int32) -> Float32:
        """The larger half of a pair of magnitudes as float32, at least 1e-30."""
        return cute.arch.inline_ptx(
            "{ .reg .b32 l, h; .reg .f32 a, b; shl.b32 l, {$r0}, 16; and.b32 h, {$r0}, 0xFFFF0000; mov.b32 a, l; "
            "mov.b32 b, h; max.NaN.f32 a, a, b; mov.b32 b, 0x0DA24260; max.NaN.f32 {$w0}, a, b; }",
            write_only_types=[Float32],
            read_only_args=[pair],
        )

    @staticmethod
    def divide(value: Float32, by: Float32) -> Float32:
        """IEEE division."""
        return cute.arch.inline_ptx(
            "div.rn.f32 {$w0}, {$r0}, {$r1};", write_only_types=[Float32], read_only_args=[value, by]
        )

    @staticmethod
    def quotient(value: Float32, by: Float32, inverse: Float32) -> Float32:
        """``value / by``, correctly rounded: one Newton step from the product with the rounded inverse."""
        return cute.arch.inline_ptx(
            "{ .reg .f32 q, e; mul.rn.f32 q, {$r0}, {$r2}; neg.f32 e, q; fma.rn.f32 e, e, {$r1}, {$r0}; "
            "fma.rn.f32 {$w0}, e, {$r2}, q; }",
            write_only_types=[Float32],
            read_only_args=[value, by, inverse],
        )

    def rounded(self, four: list[Float32]) -> Int32:
        """Four values to the nearest codes, first in the low byte."""
        if self.operand == "fp8":
            text = (
                "{ .reg .b16 l, h; cvt.rn.satfinite.e4m3x2.f32 l, {$r1}, {$r0}; "
                "cvt.rn.satfinite.e4m3x2.f32 h, {$r3}, {$r2}; mov.b32 {$w0}, {l, h}; }"
            )
        else:
            text = (
                "{ .reg .b32 a, b, c, d; cvt.rni.s32.f32 a, {$r0}; cvt.rni.s32.f32 b, {$r1}; "
                "cvt.rni.s32.f32 c, {$r2}; cvt.rni.s32.f32 d, {$r3}; cvt.pack.sat.s8.s32.b32 c, d, c, 0; "
                "cvt.pack.sat.s8.s32.b32 {$w0}, b, a, c; }"
            )
        return cute.arch.inline_ptx(text, write_only_types=[Int32], read_only_args=four)
