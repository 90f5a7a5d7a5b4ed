"""The kernels that make a layer's operands where packed blocks read rotated inputs (CuTe DSL); `hadamard` rotates.

They take the launches and arguments of those in `tokens` and `activations`. Numbers are rounded from the rotated
float32; rows of experts that read plain bfloat16 are copied as they are. ``needs``: see `rotation`.
"""

import cutlass
from cutlass import BFloat16, Float32, Int32, const_expr, cute
from cutlass.memory import SmemAllocator

from mxmoe_steps.kernels import hadamard, rounding, tokens
from mxmoe_steps.kernels.activate import Activate
from mxmoe_steps.kernels.activations import THREADS, WARP_VECTORS, Quantize, Rows, SwiGlu
from mxmoe_steps.kernels.architecture import Architecture
from mxmoe_steps.kernels.limits import MAX_ENTRIES
from mxmoe_steps.kernels.rotation import ROTATED_BF16, SPAN
from mxmoe_steps.kernels.rounding import BF16, VECTOR


def rotated_types(mask: Int32, architecture: Architecture) -> Int32:
    """The types of ``mask`` that hold rotated numbers, as `rounding` knows them."""
    scaled = architecture.scaled_mask & architecture.operand_mask
    return mask & scaled | (mask & ROTATED_BF16) // ROTATED_BF16


class DispatchRotated(hadamard.ByBlock, tokens.DispatchTokens):
    """Every token's row to the rows of its experts: once rotated for all of them, or plain."""

    threads = tokens.THREADS

    @cute.kernel
    def kernel(
        self,
        x: cute.Tensor,
        expert_ids: cute.Tensor,
        row: cute.Tensor,
        needs: cute.Tensor,
        outputs: tuple,
        gating: tuple,
        slices: Int32,
    ) -> None:
        token, _, _ = cute.arch.block_idx()
        thread, _, _ = cute.arch.thread_idx()
        memory = SmemAllocator().allocate(self.Shared)
        rows = memory.rows.get_tensor(cute.make_layout(MAX_ENTRIES))
        masks = memory.masks.get_tensor(cute.make_layout(MAX_ENTRIES))
        sums = memory.sums.get_tensor(cute.make_layout(self.threads // 32))
        rotated_row = self.buffer()
        written = rounding.Outputs(*outputs)
        entries = expert_ids.shape[1] + slices
        types = self.types_of(expert_ids, needs, entries, masks)
        rotated = rotated_types(types, self.architecture)

        source = rounding.vectors(x, token)
        steps, size = source.shape[1], types // SPAN  # one for all experts that have any
        vector = rounding.Vector.make()
        if const_expr(self.gated):
            logit = Float32(0.0)
            for i in cutlass.range(thread, steps, self.threads, unroll=1):
                cute.autovec_copy(source[None, i], vector.bf16)
                logit += self.product(vector.bf16, rounding.vectors(gating[0], Int32(0))[None, i])
            self.store_logit(logit, sums, gating[1], token)
        largest = Float32(1.0)
        if rotated != 0:
            largest = self.largest((x, token), steps, size, rotated_row, sums)
        scales = rounding.Scales.of(largest, written)

        if const_expr(self.architecture.overlaps):
            cute.arch.griddepcontrol_wait()
            cute.arch.griddepcontrol_launch_dependents()
        if thread < entries:
            rows[thread] = self.target_of(row, x.shape[0], expert_ids.shape[1])
            rounding.store_scales(scales, rotated_types(masks[thread], self.architecture), written, rows[thread])
        cute.arch.sync_threads()
        if (types & BF16) != 0:
            for i in cutlass.range(thread, steps, self.threads, unroll=1):
                cute.autovec_copy(source[None, i], vector.bf16)
                for j in cutlass.range(entries, unroll=2):
                    rounding.store(vector, masks[j] & BF16, written, rows[j], i)
        if rotated != 0:
            for chunk in cutlass.range((steps + (hadamard.CHUNK_VECTORS - 1)) // hadamard.CHUNK_VECTORS, unroll=1):
                count = self.again((x, token), chunk, steps, size, rotated_row)
                for i in cutlass.range(thread, count, self.threads, unroll=1):
                    hadamard.encode(self.numbers(rotated_row, i, hadamard.norm(size)), vector, rotated, scales)
                    for j in cutlass.range(entries, unroll=2):
                        mask = rotated_types(masks[j], self.architecture)
                        rounding.store(vector, mask, written, rows[j], chunk * hadamard.CHUNK_VECTORS + i)

    @cute.jit
    def load(self, source: tuple, at: Int32, eight: cute.Tensor) -> None:
        """``source``: the tokens and the number of one."""
        cute.autovec_copy(rounding.vectors(*source)[None, at], eight)


class RotatedRows(hadamard.ByBlock, Rows):
    """Rows of `Rows`, rotated: the slices of a shared expert's row as the one row that they are."""

    threads = THREADS

    def readable(self, mask: Int32) -> Int32:
        """All of it: `rotated_types` leaves out what the GPU has not."""
        return mask

    @cute.jit
    def by_block(
        self,
        inputs: cute.Tensor,
        first: Int32,
        mask: Int32,
        steps: Int32,
        slices: Int32,
        tokens: Int32,
        written: rounding.Outputs,
        largest_of_warps: cute.Tensor,
        thread: Int32,
    ) -> None:
        """As the base class says."""
        rotated_row = self.buffer()
        total, source = steps * slices, (inputs, first, steps, tokens)
        vector = rounding.Vector.make()
        if (mask & BF16) != 0:
            for i in cutlass.range(thread, total, THREADS, unroll=1):
                self.load(source, i, vector.bf16)
                rounding.store(vector, Int32(BF16), written, first + i // steps * tokens, i % steps)
        rotated = rotated_types(mask, self.architecture)
        if rotated != 0:
            size = mask // SPAN
            of_warps = cute.make_tensor(
                cute.recast_ptr(largest_of_warps.iterator, dtype=Float32), largest_of_warps.layout
            )
            scales = rounding.Scales.of(self.largest(source, total, size, rotated_row, of_warps), written)
            if thread < slices:
                rounding.store_scales(scales, rotated, written, first + thread * tokens)
            for chunk in cutlass.range((total + (hadamard.CHUNK_VECTORS - 1)) // hadamard.CHUNK_VECTORS, unroll=1):
                count = self.again(source, chunk, total, size, rotated_row)
                for i in cutlass.range(thread, count, THREADS, unroll=1):
                    hadamard.encode(self.numbers(rotated_row, i, hadamard.norm(size)), vector, rotated, scales)
                    at = chunk * hadamard.CHUNK_VECTORS + i
                    rounding.store(vector, rotated, written, first + at // steps * tokens, at % steps)

    @cute.jit
    def load(self, source: tuple, at: Int32, eight: cute.Tensor) -> None:
        """``source``: what `product` makes rows of, the first of them, vectors of each, how far apart they lie."""
        inputs, first, steps, tokens = source
        self.product(inputs, first + at // steps * tokens, at % steps, steps, eight)


class SwiGluRotated(RotatedRows, SwiGlu):
    """``silu(gate) * up``, rounded to bfloat16, rotated and rounded to what the down block reads."""


class ActivateRotated(RotatedRows, Activate):
    """What `Activate` makes, rounded to bfloat16, rotated and rounded to what the down block reads."""


class QuantizeRotated(RotatedRows, Quantize):
    """All operands of the down blocks from products that gate/up launches made, bfloat16 too."""

    @cute.jit
    def by_warp(self, inputs: cute.Tensor, row: Int32, mask: Int32, steps: Int32, written: rounding.Outputs) -> None:
        """As the base class says."""
        lane, size = cute.arch.lane_idx(), mask // SPAN
        rounds = WARP_VECTORS // 32
        held = cute.make_rmem_tensor((VECTOR, rounds), BFloat16)
        held.fill(0.0)
        for j in cutlass.range_constexpr(rounds):
            if lane + 32 * j < steps:
                self.product(inputs, row, lane + 32 * j, steps, held[None, j])
        vector = rounding.Vector.make()
        if (mask & BF16) != 0:
            for j in cutlass.range_constexpr(rounds):
                if lane + 32 * j < steps:
                    vector.bf16.store(held[None, j].load())
                    rounding.store(vector, Int32(BF16), written, row, lane + 32 * j)
        rotated = rotated_types(mask, self.architecture)
        if rotated != 0:
            values = cute.make_rmem_tensor((VECTOR, rounds), Float32)
            values.store(held.load().to(Float32))
            for j in cutlass.range_constexpr(rounds):
                hadamard.within_warp(values[None, j], size)
            hadamard.between_vectors(values, size)
            largest = Float32(0.0)
            for j in cutlass.range_constexpr(rounds):
                for e in cutlass.range_constexpr(VECTOR):
                    largest = hadamard.larger(largest, values[e, j])
            largest = hadamard.largest_of_warp(largest) * hadamard.norm(size)
            scales = rounding.Scales.of(hadamard.larger(Float32(hadamard.SMALLEST), largest), written)
            if lane == 0:
                rounding.store_scales(scales, rotated, written, row)
            for j in cutlass.range_constexpr(rounds):
                if lane + 32 * j < steps:
                    eight = cute.make_rmem_tensor((VECTOR,), Float32)
                    eight.store(values[None, j].load() * hadamard.norm(size))
                    hadamard.encode(eight, vector, rotated, scales)
                    rounding.store(vector, rotated, written, row, lane + 32 * j)
