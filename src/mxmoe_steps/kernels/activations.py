"""Between and after the two grouped GEMMs of a layer (CuTe DSL): SwiGLU with quantization, and the weighted sum.

`SwiGlu` gives one block a row of gate and up: a first pass finds the largest magnitude of the product (unless the
expert's down block reads bfloat16), a second one rounds and stores it: from registers, or again from L1 where the row
is long. A shared expert may be cut into slices of the routed experts' size; one block then takes all slices of a
token, so that its scale covers the whole row as it does for one wide expert.

Where gate and up were multiplied by the grouped GEMM, the same kernel only quantizes.

`Combine` sums the rows of a token in float32, in the order of the router's choices: no atomics, the same bits
every time.
"""

from typing import Any

import cutlass
from cutlass import BFloat16, Float32, Int32, const_expr, cute
from cutlass.memory import SmemAllocator

from mxmoe_steps.kernels import rounding
from mxmoe_steps.kernels.rounding import VECTOR

THREADS = 192  # of a block of `SwiGlu`: 1408 features, eight a thread, leave few idle
COMBINE_THREADS = 256


class SwiGlu:
    """``silu(gate) * up`` of every row, in float32 and rounded once to bfloat16, as the operand of the down blocks.

    ``given``: bfloat16 [rows, 2 K], gate first; or, ``multiplied``, the products [rows, K], of which only 8-bit
    operands are made. ``chosen``, ``row``, ``needs``, ``shared``: as for `tokens.DispatchTokens`, of the down blocks.
    """

    def __init__(self, multiplied: bool) -> None:
        self.multiplied = multiplied

    @cute.jit
    def __call__(
        self,
        given: cute.Tensor,
        chosen: cute.Tensor,
        row: cute.Tensor,
        needs: cute.Tensor,
        outputs: tuple,
        shared: Int32,
        stream: Any,
    ) -> None:
        @cute.struct
        class Shared:
            largest: cute.struct.MemRange[Int32, THREADS // 32]

        self.Shared = Shared
        per_token = chosen.shape[1] + cutlass.min(shared, 1)
        self.kernel(given, chosen, row, needs, outputs, shared).launch(
            grid=(per_token, chosen.shape[0], 1), block=(THREADS, 1, 1), use_pdl=True, stream=stream
        )

    @cute.kernel
    def kernel(
        self,
        given: cute.Tensor,
        chosen: cute.Tensor,
        row: cute.Tensor,
        needs: cute.Tensor,
        outputs: tuple,
        shared: Int32,
    ) -> None:
        entry, token, _ = cute.arch.block_idx()
        thread, _, _ = cute.arch.thread_idx()
        memory = SmemAllocator().allocate(self.Shared)
        written = rounding.Outputs(*outputs)
        cute.arch.griddepcontrol_launch_dependents()  # at once: the down blocks' weights can be on their way
        cute.arch.griddepcontrol_wait()
        tokens, top_k = chosen.shape[0], chosen.shape[1]
        first, mask, slices = Int32(0), Int32(0), Int32(1)
        if entry < top_k:
            first = row[token, entry]
            mask = needs[Int32(chosen[token, entry])]
        else:
            first = tokens * top_k + token
            mask = needs[needs.shape[0] - 1]
            slices = shared
        steps = given.shape[1] // (VECTOR if self.multiplied else 2 * VECTOR)  # of a slice
        total = steps * slices
        if const_expr(self.multiplied):
            mask = mask & rounding.EIGHT_BITS
            total = cutlass.select_(mask == 0, Int32(0), total)
        vector = rounding.Vector.make()
        held = Int32(-1)  # the vector that the registers hold
        largest = Float32(1.0)
        if (mask & rounding.EIGHT_BITS) != 0:
            pair = Int32(0)
            rounds = (total - thread + (THREADS - 1)) // THREADS
            for j in cutlass.range(rounds, unroll=1):  # backwards: the first vector is in the registers at the end
                held = thread + (rounds - 1 - j) * THREADS
                self.product(given, first + held // steps * tokens, held % steps, steps, vector.bf16)
                pair = rounding.larger_of(pair, vector.bf16)
            largest = rounding.largest_of_block(pair, memory.largest.get_tensor(cute.make_layout(THREADS // 32)))
        scales = rounding.Scales.of(largest)
        if thread < slices:
            rounding.store_scales(scales, mask, written, first + thread * tokens)
        for i in cutlass.range(thread, total, THREADS, unroll=1):
            target = first + i // steps * tokens
            if i != held:
                self.product(given, target, i % steps, steps, vector.bf16)
            rounding.encode(vector, mask, scales)
            rounding.store(vector, mask, written, target, i % steps)

    @cute.jit
    def product(self, given: cute.Tensor, row: Int32, at: Int32, steps: Int32, eight: cute.Tensor) -> None:
        """Vector ``at`` of a row's product into ``eight``."""
        vectors = rounding.vectors(given, row)
        if const_expr(self.multiplied):
            cute.autovec_copy(vectors[None, at], eight)
        else:
            gate, up = (cute.make_rmem_tensor((VECTOR,), BFloat16) for _ in range(2))
            cute.autovec_copy(vectors[None, at], gate)
            cute.autovec_copy(vectors[None, at + steps], up)
            values = cute.make_rmem_tensor((VECTOR,), Float32)
            for j in cutlass.range_constexpr(VECTOR):
                value = Float32(gate[j])
                values[j] = value * rounding.sigmoid(value) * Float32(up[j])
            eight.store(values.load().to(BFloat16))


class Combine:
    """Row t of ``out``, bfloat16 [tokens, N]: the sum of the token's rows of ``given`` [rows, N] times their weights.

    ``weights``: bfloat16 or float32 [tokens, top_k], of the rows ``row`` [tokens, top_k]. The ``shared`` rows of a
    token come on top, all times the sigmoid of ``gate``, bfloat16 [tokens], if there is one: ``gated`` is 0 or 1.
    """

    @cute.jit
    def __call__(
        self,
        given: cute.Tensor,
        row: cute.Tensor,
        weights: cute.Tensor,
        gate: cute.Tensor,
        out: cute.Tensor,
        shared: Int32,
        gated: Int32,
        stream: Any,
    ) -> None:
        span = COMBINE_THREADS * VECTOR
        self.kernel(given, row, weights, gate, out, shared, gated).launch(
            grid=((out.shape[1] + (span - 1)) // span, out.shape[0], 1),
            block=(COMBINE_THREADS, 1, 1),
            use_pdl=True,
            stream=stream,
        )

    @cute.kernel
    def kernel(
        self,
        given: cute.Tensor,
        row: cute.Tensor,
        weights: cute.Tensor,
        gate: cute.Tensor,
        out: cute.Tensor,
        shared: Int32,
        gated: Int32,
    ) -> None:
        part, token, _ = cute.arch.block_idx()
        thread, _, _ = cute.arch.thread_idx()
        cute.arch.griddepcontrol_wait()
        at = part * COMBINE_THREADS + thread
        if at * VECTOR < out.shape[1]:
            top_k = row.shape[1]
            total = cute.make_rmem_tensor((VECTOR,), Float32)
            total.fill(0.0)
            for j in cutlass.range(shared, unroll=4):
                self.add(given, out.shape[0] * (top_k + j) + token, at, Float32(1.0), total)
            if gated != 0:
                factor = rounding.sigmoid(Float32(gate[token]))
                for e in cutlass.range_constexpr(VECTOR):
                    total[e] = total[e] * factor
            for j in cutlass.range(top_k, unroll=4):
                self.add(given, row[token, j], at, Float32(weights[token, j]), total)
            rounded = cute.make_rmem_tensor((VECTOR,), BFloat16)
            rounded.store(total.load().to(BFloat16))
            cute.autovec_copy(rounded, rounding.vectors(out, token)[None, at])

    @cute.jit
    def add(self, given: cute.Tensor, row: Int32, at: Int32, factor: Float32, total: cute.Tensor) -> None:
        """total += factor * vector ``at`` of row ``row``."""
        eight = cute.make_rmem_tensor((VECTOR,), BFloat16)
        cute.autovec_copy(rounding.vectors(given, row)[None, at], eight)
        for e in cutlass.range_constexpr(VECTOR):
            total[e] = total[e] + factor * Float32(eight[e])
