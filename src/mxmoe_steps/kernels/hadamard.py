"""The fast Walsh-Hadamard transform of a row, in the kernel that quantizes it (CuTe DSL).

The arithmetic is that of `quantizers.hadamard.rotate` in float32, bit for bit: the same sums in the same order, strides
of 1, 2, 4, ... features up to half of the transform's span, and one product with span^-1/2 at the end.

    strides 1, 2, 4       eight neighbouring features of a row are a thread's: in its registers
    strides 8 .. 128      its neighbours' in the warp: shuffles
    strides from 256 on   of other warps: through shared memory, up to three strides each time; or, where a warp holds
                          the whole row, in registers: lane l has vectors l, l + 32, ...

Transforms of a row that spans several lie beside each other, and a warp or a block makes them all at once.
"""

from typing import Any

import cutlass
from cutlass import BFloat16, Float32, Int32, const_expr, cute

from mxmoe_steps.kernels import rounding
from mxmoe_steps.kernels.rotation import CHUNK
from mxmoe_steps.kernels.rounding import VECTOR

OF_WARP = 32 * VECTOR  # features that the lanes of a warp hold, a vector each
CHUNK_VECTORS = CHUNK // VECTOR
PASSES = (  # through shared memory: stride, numbers of a thread, least and greatest span that takes it
    (OF_WARP, 2, 2 * OF_WARP, 2 * OF_WARP),
    (OF_WARP, 4, 4 * OF_WARP, 4 * OF_WARP),
    (OF_WARP, 8, 8 * OF_WARP, CHUNK),
    (8 * OF_WARP, 2, 16 * OF_WARP, 16 * OF_WARP),
    (8 * OF_WARP, 4, 32 * OF_WARP, CHUNK),
)
SMALLEST = 1e-30  # magnitude that a scale is made of


def butterflies(values: Any, count: int) -> None:
    """All sums and differences of ``count`` registers, a power of two: strides 1, 2, 4, ... of them."""
    step = 1
    while step < count:
        for i in range(count):
            if i & step == 0:
                first, second = values[i], values[i + step]
                values[i], values[i + step] = first + second, first - second
        step *= 2


def apart(i: Any, stride: int, radix: int) -> Any:
    """The first feature of the i-th ``radix`` that lie ``stride`` apart."""
    return i // stride * (stride * radix) + i % stride


@cute.jit
def within_warp(values: cute.Tensor, span: Int32) -> None:
    """The strides below `OF_WARP` of ``values``, float32 [8] in every lane of a warp: neighbours of its neighbours'."""
    butterflies(values, VECTOR)
    for step in (1, 2, 4, 8, 16):
        if step * VECTOR < span:
            sign = Float32(1.0)
            if (cute.arch.lane_idx() & step) != 0:
                sign = Float32(-1.0)
            for e in cutlass.range_constexpr(VECTOR):
                values[e] = cute.arch.shuffle_sync_bfly(values[e], step) + sign * values[e]


@cute.jit
def between_vectors(values: cute.Tensor, span: Int32) -> None:
    """The strides from `OF_WARP` on of ``values``, float32 [8, vectors] of a row of at most eight vectors a lane."""
    for step in (1, 2, 4):
        if step * OF_WARP < span:
            for j in cutlass.range_constexpr(cute.size(values, mode=[1])):
                if const_expr(j & step == 0 and j + step < cute.size(values, mode=[1])):
                    for e in cutlass.range_constexpr(VECTOR):
                        first, second = values[e, j], values[e, j + step]
                        values[e, j], values[e, j + step] = first + second, first - second


@cute.jit
def across_warps(row: cute.Tensor, features: Int32, span: Int32, thread: Int32, threads: int) -> None:
    """The strides from `OF_WARP` on of ``row``, float32 in shared memory; by a block, which meets after each pass."""
    for stride, radix, least, most in PASSES:
        if (span >= least) & (span <= most):
            for i in cutlass.range(thread, features // radix, threads, unroll=1):
                first = apart(i, stride, radix)
                values = cute.make_rmem_tensor((radix,), Float32)
                for j in cutlass.range_constexpr(radix):
                    values[j] = row[first + j * stride]
                butterflies(values, radix)
                for j in cutlass.range_constexpr(radix):
                    row[first + j * stride] = values[j]
            cute.arch.sync_threads()


def norm(span: Int32) -> Float32:
    """span^-1/2 of a power of two, rounded to float32."""
    return cute.arch.inline_ptx(
        "{ .reg .b32 e, h; .reg .f32 f; .reg .pred p; bfind.u32 e, {$r0}; shr.u32 h, e, 1; sub.u32 h, 127, h; "
        "shl.b32 h, h, 23; mov.b32 f, h; and.b32 e, e, 1; setp.ne.u32 p, e, 0; @p mul.rn.f32 f, f, 0f3F3504F3; "
        "mov.f32 {$w0}, f; }",
        write_only_types=[Float32],
        read_only_args=[span],
    )


def larger(largest: Float32, value: Float32) -> Float32:
    """The larger magnitude; NaN wins."""
    return cute.arch.inline_ptx(
        "{ .reg .f32 a; abs.f32 a, {$r1}; max.NaN.f32 {$w0}, {$r0}, a; }",
        write_only_types=[Float32],
        read_only_args=[largest, value],
    )


def largest_of_warp(largest: Float32) -> Float32:
    """The largest of a warp's magnitudes, in every lane."""
    for step in (16, 8, 4, 2, 1):
        largest = larger(largest, cute.arch.shuffle_sync_bfly(largest, step))
    return largest


@cute.jit
def largest_of_block(largest: Float32, shared: cute.Tensor) -> Float32:
    """The largest of a block's magnitudes, in every thread; ``shared``: float32, one per warp."""
    largest = largest_of_warp(largest)
    warp = cute.arch.warp_idx()
    if cute.arch.lane_idx() == 0:
        shared[warp] = largest
    cute.arch.sync_threads()
    for warp in cutlass.range_constexpr(cute.size(shared)):
        largest = larger(largest, shared[warp])
    return largest


def encode(values: cute.Tensor, vector: rounding.Vector, mask: Int32, scales: rounding.Scales) -> None:
    """Fill ``vector`` from eight float32: bfloat16, and the codes of the types in ``mask``."""
    rounding.encode(rounding.Vector(values, vector.fp8, vector.int8, vector.int4), mask, scales)
    vector.bf16.store(values.load().to(BFloat16))


class ByBlock:
    """A block of ``threads`` threads that rotates a row, `CHUNK` features at a time, from `load` into shared memory.

    A row of one chunk is transformed once, a longer one for its largest magnitude and again for its numbers, all but
    the first chunk.
    """

    threads: int

    def load(self, source: tuple, at: Int32, eight: cute.Tensor) -> None:
        """Vector ``at`` of the row that ``source`` tells into ``eight``, bfloat16."""
        raise NotImplementedError

    def buffer(self) -> cute.Tensor:
        """Shared memory of a chunk; once in a kernel."""
        return cute.make_tensor(cute.arch.alloc_smem(Float32, CHUNK, 16), cute.make_layout(CHUNK))

    @cute.jit
    def rotate(self, source: tuple, first: Int32, vectors: Int32, span: Int32, row: cute.Tensor) -> None:
        """Fill ``row`` with the transform, not normalised, of ``vectors`` vectors from the ``first`` on."""
        thread = cute.arch.thread_idx()[0]
        eight = cute.make_rmem_tensor((VECTOR,), BFloat16)
        values = cute.make_rmem_tensor((VECTOR,), Float32)
        eight.fill(0.0)
        stored = cute.make_tensor(row.iterator, cute.make_layout((VECTOR, CHUNK_VECTORS)))
        for j in cutlass.range((vectors + (self.threads - 1)) // self.threads, unroll=1):  # whole warps exchange
            at = thread + j * self.threads
            if at < vectors:
                self.load(source, first + at, eight)
            values.store(eight.load().to(Float32))
            within_warp(values, span)
            if at < vectors:
                cute.autovec_copy(values, stored[None, at])
        cute.arch.sync_threads()
        across_warps(row, vectors * VECTOR, span, thread, self.threads)

    @cute.jit
    def largest(self, source: tuple, vectors: Int32, span: Int32, row: cute.Tensor, of_warps: cute.Tensor) -> Float32:
        """The largest magnitude of the rotated row; ``row`` holds its first chunk after it. ``of_warps``: float32."""
        chunks = (vectors + (CHUNK_VECTORS - 1)) // CHUNK_VECTORS
        largest = Float32(0.0)
        for j in cutlass.range(chunks, unroll=1):
            first = (chunks - 1 - j) * CHUNK_VECTORS
            count = cutlass.min(vectors - first, CHUNK_VECTORS)
            if j > 0:
                cute.arch.sync_threads()  # all have read the chunk before
            self.rotate(source, first, count, span, row)
            for i in cutlass.range(cute.arch.thread_idx()[0], count * VECTOR, self.threads, unroll=4):
                largest = larger(largest, row[i])
        return larger(Float32(SMALLEST), largest_of_block(largest, of_warps) * norm(span))

    @cute.jit
    def again(self, source: tuple, chunk: Int32, vectors: Int32, span: Int32, row: cute.Tensor) -> Int32:
        """Have ``chunk`` of the row in ``row``, if `largest` has left the first one there; vectors of the chunk."""
        first = chunk * CHUNK_VECTORS
        count = cutlass.min(vectors - first, CHUNK_VECTORS)
        if chunk > 0:
            cute.arch.sync_threads()  # all have read the chunk before
            self.rotate(source, first, count, span, row)
        return count

    def numbers(self, row: cute.Tensor, at: Int32, scale: Float32) -> cute.Tensor:
        """Vector ``at`` of the chunk times ``scale``, float32 in registers."""
        values = cute.make_rmem_tensor((VECTOR,), Float32)
        stored = cute.make_tensor(row.iterator, cute.make_layout((VECTOR, CHUNK_VECTORS)))
        cute.autovec_copy(stored[None, at], values)
        values.store(values.load() * scale)
        return values
