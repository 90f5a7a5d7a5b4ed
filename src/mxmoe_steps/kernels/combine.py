"""After the second grouped GEMM of a layer (CuTe DSL): the weighted sum of every token's rows, biases added.

Sums are float32, in the order of the router's choices: no atomics, the same bits every time. The launch may begin while
the one before it runs: the router's choices, which an older one has written, are read before the wait.
"""

from typing import Any

import cutlass
from cutlass import BFloat16, Float32, Int32, const_expr, cute
from cutlass.memory import SmemAllocator

from mxmoe_steps.kernels import rounding
from mxmoe_steps.kernels.architecture import Architecture
from mxmoe_steps.kernels.limits import MAX_ENTRIES
from mxmoe_steps.kernels.rounding import VECTOR

THREADS = 256
AT_ONCE = 6  # rows that a thread waits for together; more take over 64 registers
AT_ONCE_BIASED = 4  # the same with their biases


class Combine:
    """Row t of ``out``, bfloat16 [tokens, N]: the sum of the token's rows of ``inputs`` [rows, N] times their weights.

    ``weights``: bfloat16 or float32 [tokens, top_k], of the rows ``choices[0]`` [tokens, top_k]. The ``slices`` rows of
    a token come on top, all times the sigmoid of ``gate``, bfloat16 [tokens], if there is one: ``gated`` is 0 or 1.

    If the kernel is ``biased``, the router's choices [tokens, top_k] and what is added to the rows of every expert
    first, bfloat16 [experts, N], follow in ``choices``; then there are no slices.
    """

    def __init__(self, architecture: Architecture, biased: bool) -> None:
        self.architecture, self.biased = architecture, biased
        self.at_once = AT_ONCE_BIASED if biased else AT_ONCE

    @cute.jit
    def __call__(
        self,
        inputs: cute.Tensor,
        choices: tuple,
        weights: cute.Tensor,
        gate: cute.Tensor,
        out: cute.Tensor,
        slices: Int32,
        gated: Int32,
        stream: Any,
    ) -> None:
        @cute.struct
        class Shared:
            rows: cute.struct.MemRange[Int32, MAX_ENTRIES * (1 + self.biased)]  # then the experts of biased ones
            factors: cute.struct.MemRange[Float32, MAX_ENTRIES]

        self.Shared = Shared
        span = THREADS * VECTOR
        self.kernel(inputs, choices, weights, gate, out, slices, gated).launch(
            grid=((out.shape[1] + (span - 1)) // span, out.shape[0], 1),
            block=(THREADS, 1, 1),
            use_pdl=self.architecture.overlaps,
            stream=stream,
        )

    @cute.kernel
    def kernel(
        self,
        inputs: cute.Tensor,
        choices: tuple,
        weights: cute.Tensor,
        gate: cute.Tensor,
        out: cute.Tensor,
        slices: Int32,
        gated: Int32,
    ) -> None:
        part, token, _ = cute.arch.block_idx()
        thread, _, _ = cute.arch.thread_idx()
        memory = SmemAllocator().allocate(self.Shared)
        rows = memory.rows.get_tensor(cute.make_layout(MAX_ENTRIES * (1 + self.biased)))
        factors = memory.factors.get_tensor(cute.make_layout(MAX_ENTRIES))
        row, added = choices[0], choices[1:]
        top_k = row.shape[1]
        entries = top_k + slices
        if thread < entries:
            rows[thread] = out.shape[0] * thread + token
            if thread < top_k:
                rows[thread] = row[token, thread]
                factors[thread] = Float32(weights[token, thread])
                if const_expr(self.biased):
                    rows[MAX_ENTRIES + thread] = Int32(added[0][token, thread])
        cute.arch.sync_threads()
        if const_expr(self.architecture.overlaps):
            cute.arch.griddepcontrol_wait()
        at = part * THREADS + thread
        if at * VECTOR < out.shape[1]:
            logit = Float32(0.0)
            if gated != 0:
                logit = Float32(gate[token])
            routed, common = (cute.make_rmem_tensor((VECTOR,), Float32) for _ in range(2))
            routed.fill(0.0)
            common.fill(0.0)
            for first in cutlass.range(0, entries, self.at_once, unroll=1):
                self.add(inputs, (rows, factors), (first, top_k, entries), at, (routed, common), added)
            factor = Float32(1.0)
            if gated != 0:
                factor = rounding.sigmoid(logit)
            rounded = cute.make_rmem_tensor((VECTOR,), BFloat16)
            for e in cutlass.range_constexpr(VECTOR):
                rounded[e] = BFloat16(common[e] * factor + routed[e])
            cute.autovec_copy(rounded, rounding.vectors(out, token)[None, at])

    @cute.jit
    def add(self, inputs: cute.Tensor, listed: tuple, span: tuple, at: Int32, sums: tuple, added: Any) -> None:
        """Add vector ``at`` of the next rows, at most ``at_once``, which are loaded together.

        ``listed``: rows and their factors; ``span``: the next one, the first shared one and their end; ``sums``: of
        routed and of shared rows.
        """
        (rows, factors), (first, top_k, end), (routed, common) = listed, span, sums
        loaded, biases = (cute.make_rmem_tensor((VECTOR, self.at_once), BFloat16) for _ in range(2))
        for j in cutlass.range_constexpr(self.at_once):
            entry = cutlass.min(first + j, end - 1)  # no branches between loads
            cute.autovec_copy(rounding.vectors(inputs, rows[entry])[None, at], loaded[None, j])
            if const_expr(self.biased):
                cute.autovec_copy(rounding.vectors(added[1], rows[MAX_ENTRIES + entry])[None, at], biases[None, j])
        for j in cutlass.range_constexpr(self.at_once):
            if first + j < top_k:
                for e in cutlass.range_constexpr(VECTOR):
                    value = Float32(loaded[e, j])
                    if const_expr(self.biased):
                        value += Float32(biases[e, j])
                    routed[e] = routed[e] + factors[first + j] * value
            elif first + j < end:
                for e in cutlass.range_constexpr(VECTOR):
                    common[e] = common[e] + Float32(loaded[e, j])
