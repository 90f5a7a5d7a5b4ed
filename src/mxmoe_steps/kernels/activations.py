"""Between the two grouped GEMMs of a layer (CuTe DSL): SwiGLU with quantization.

`SwiGlu` gives one block a row of gate and up: a first pass finds the largest magnitude of the product (unless the
expert's down block reads bfloat16), a second one rounds and stores it: from registers, or again from L1 where the row
is long. A shared expert may be cut into slices of the routed experts' size; one block then takes all slices of a
token, so that its scale covers the whole row as it does for one wide expert.

Where gate and up were multiplied in their own launch, `Quantize` makes operands of 8 and 4 bits of the products.

A launch may begin while the one before it runs. What an older launch has written, the router's choices and their rows,
is read before the wait for the launch before.
"""

from typing import Any

import cutlass
from cutlass import BFloat16, Float32, Int32, const_expr, cute
from cutlass.memory import SmemAllocator

from mxmoe_steps.kernels import ptx, rounding
from mxmoe_steps.kernels.architecture import Architecture
from mxmoe_steps.kernels.rounding import VECTOR

THREADS = 192  # of a block that makes rows: 1408 features, eight a thread, leave few idle
WARPS = THREADS // 32
WARP_VECTORS = 192  # vectors of the longest row that a warp quantizes


class Rows:
    """What `SwiGlu` and `Quantize` share: their arguments, and how a block makes a row.

    ``inputs``: bfloat16 [rows, ...], from which `product` makes the rows of the down blocks' activations, or a tuple
    with such a tensor.
    ``expert_ids``, ``row``, ``needs``, ``slices``: as for `tokens.DispatchTokens`, of the down blocks. ``outputs``:
    `rounding.Outputs`.
    """

    kernel: Any  # a subclass's

    def __init__(self, architecture: Architecture) -> None:
        self.architecture = architecture

    @cute.jit
    def __call__(
        self,
        inputs: Any,
        expert_ids: cute.Tensor,
        row: cute.Tensor,
        needs: cute.Tensor,
        outputs: tuple,
        slices: Int32,
        stream: Any,
    ) -> None:
        @cute.struct
        class Shared:
            largest: cute.struct.MemRange[Int32, WARPS]

        self.Shared = Shared
        grid, counts = self.grid(inputs, expert_ids, slices)
        self.kernel(inputs, expert_ids, row, needs, outputs, slices, *counts).launch(
            grid=grid, block=(THREADS, 1, 1), use_pdl=self.architecture.overlaps, stream=stream
        )

    def grid(self, inputs: Any, expert_ids: cute.Tensor, slices: Int32) -> tuple[tuple, tuple]:
        """Blocks of the launch, and what else the kernel must know of them."""
        raise NotImplementedError

    def readable(self, mask: Int32) -> Int32:
        """The types of ``mask`` that the GPU has: the compiler leaves out what it cannot round to."""
        return mask & self.architecture.operand_mask if self.architecture.unreadable_mask else mask

    @cute.jit
    def by_block(
        self,
        inputs: Any,
        first: Int32,
        mask: Int32,
        steps: Int32,
        slices: Int32,
        tokens: Int32,
        written: rounding.Outputs,
        largest_of_warps: cute.Tensor,
        thread: Int32,
    ) -> None:
        """Make the types of ``mask`` of row ``first`` and, with one scale, of the ``slices`` - 1 rows that lie
        ``tokens`` apart; ``steps``: vectors of a row."""
        total = steps * slices
        vector = rounding.Vector.make()
        held = Int32(-1)  # the vector that the registers hold
        largest = Float32(1.0)
        if (mask & self.architecture.scaled_mask) != 0:
            pair = Int32(0)
            rounds = (total - thread + (THREADS - 1)) // THREADS
            for j in cutlass.range(rounds, unroll=1):  # backwards: the first vector is in the registers at the end
                held = thread + (rounds - 1 - j) * THREADS
                self.product(inputs, first + held // steps * tokens, held % steps, steps, vector.bf16)
                pair = rounding.larger_of(pair, vector.bf16)
            largest = rounding.largest_of_block(pair, largest_of_warps)
        scales = rounding.Scales.of(largest, written)
        if thread < slices:
            rounding.store_scales(scales, mask, written, first + thread * tokens)
        for i in cutlass.range(thread, total, THREADS, unroll=1):
            target = first + i // steps * tokens
            if i != held:
                self.product(inputs, target, i % steps, steps, vector.bf16)
            rounding.encode(vector, mask, scales)
            rounding.store(vector, mask, written, target, i % steps)

    def product(self, inputs: Any, row: Int32, at: Int32, steps: Int32, eight: cute.Tensor) -> None:
        """Vector ``at`` of the activations of row ``row`` into ``eight``."""
        raise NotImplementedError


class SwiGlu(Rows):
    """``silu(gate) * up`` of every row, in float32 and rounded once to bfloat16, as the operand of the down blocks.

    ``inputs``: bfloat16 [rows, 2 K], gate first.
    """

    def grid(self, inputs: Any, expert_ids: cute.Tensor, slices: Int32) -> tuple[tuple, tuple]:
        return (expert_ids.shape[1] + cutlass.min(slices, 1), expert_ids.shape[0], 1), ()

    @cute.kernel
    def kernel(
        self,
        inputs: Any,
        expert_ids: cute.Tensor,
        row: cute.Tensor,
        needs: cute.Tensor,
        outputs: tuple,
        slices: Int32,
    ) -> None:
        entry, token, _ = cute.arch.block_idx()
        thread, _, _ = cute.arch.thread_idx()
        memory = SmemAllocator().allocate(self.Shared)
        if const_expr(self.architecture.overlaps):
            cute.arch.griddepcontrol_launch_dependents()  # at once: the down blocks' weights can be on their way
        first, mask, count, expert = self.place(entry, token, expert_ids, row, needs, slices)
        if const_expr(self.architecture.overlaps):
            cute.arch.griddepcontrol_wait()
        largest_of_warps = memory.largest.get_tensor(cute.make_layout(WARPS))
        self.by_block(
            self.source(inputs, expert), first, mask, self.steps(inputs), count, expert_ids.shape[0],
            rounding.Outputs(*outputs), largest_of_warps, thread,
        )  # fmt: skip

    def source(self, inputs: Any, expert: Int32) -> Any:
        """What `product` is to know of a row of ``expert``."""
        return inputs

    def steps(self, inputs: Any) -> Int32:
        """Vectors of a product."""
        return inputs.shape[1] // (2 * VECTOR)

    @cute.jit
    def place(
        self, entry: Int32, token: Int32, expert_ids: cute.Tensor, row: cute.Tensor, needs: cute.Tensor, slices: Int32
    ) -> tuple[Int32, Int32, Int32, Int32]:
        """A block's first row, the types that are made of it, the number of its rows, and their expert."""
        tokens, top_k = expert_ids.shape[0], expert_ids.shape[1]
        first, mask, count, expert = Int32(0), Int32(0), Int32(1), needs.shape[0] - 1
        if entry < top_k:
            first = row[token, entry]
            expert = Int32(expert_ids[token, entry])
            mask = needs[expert]
        else:
            first = tokens * top_k + token
            mask = needs[needs.shape[0] - 1]
            count = slices
        return first, self.readable(mask), count, expert

    @cute.jit
    def product(self, inputs: Any, row: Int32, at: Int32, steps: Int32, eight: cute.Tensor) -> None:
        """Vector ``at`` of a row's product into ``eight``."""
        vectors = rounding.vectors(inputs, row)
        gate, up = (cute.make_rmem_tensor((VECTOR,), BFloat16) for _ in range(2))
        cute.autovec_copy(vectors[None, at], gate)
        cute.autovec_copy(vectors[None, at + steps], up)
        eight.store(rounding.swiglu(gate, up).load())


class Quantize(Rows):
    """The operands of 8 and 4 bits of the down blocks from products that gate/up launches made, bfloat16 [rows, K].

    Rows of up to `WARP_VECTORS` vectors are a warp's, in registers: many are on their way at a time, and nobody waits
    for a block. Longer ones, and those of a shared expert, which has one scale for all slices, are a block's.
    """

    @cute.jit
    def grid(self, inputs: cute.Tensor, expert_ids: cute.Tensor, slices: Int32) -> tuple[tuple, tuple]:
        tokens, top_k = expert_ids.shape
        blocks = tokens * top_k
        if inputs.shape[1] <= WARP_VECTORS * VECTOR:
            blocks = (blocks + (WARPS - 1)) // WARPS
        return (blocks + cutlass.min(slices, 1) * tokens, 1, 1), (blocks,)

    def readable(self, mask: Int32) -> Int32:
        """Products are bfloat16 already."""
        return super().readable(mask & self.architecture.scaled_mask)

    @cute.kernel
    def kernel(
        self,
        inputs: cute.Tensor,
        expert_ids: cute.Tensor,
        row: cute.Tensor,
        needs: cute.Tensor,
        outputs: tuple,
        slices: Int32,
        routed_blocks: Int32,
    ) -> None:
        block, _, _ = cute.arch.block_idx()
        thread, _, _ = cute.arch.thread_idx()
        memory = SmemAllocator().allocate(self.Shared)
        written = rounding.Outputs(*outputs)
        if const_expr(self.architecture.overlaps):
            cute.arch.griddepcontrol_launch_dependents()
        tokens = expert_ids.shape[0]
        entries, steps = tokens * expert_ids.shape[1], inputs.shape[1] // VECTOR
        experts = cute.make_tensor(expert_ids.iterator, cute.make_layout(entries))
        rows = cute.make_tensor(row.iterator, cute.make_layout(entries))
        if (block < routed_blocks) & (steps <= WARP_VECTORS):
            entry = block * WARPS + cute.arch.warp_idx()
            if entry < entries:
                target, mask = rows[entry], self.readable(needs[Int32(experts[entry])])
                if const_expr(self.architecture.overlaps):
                    cute.arch.griddepcontrol_wait()
                self.by_warp(inputs, target, mask, steps, written)
        else:
            first, mask, count = Int32(0), Int32(0), Int32(1)
            if block < routed_blocks:
                first, mask = rows[block], needs[Int32(experts[block])]
            else:
                first, mask, count = entries + block - routed_blocks, needs[needs.shape[0] - 1], slices
            mask = self.readable(mask)
            if const_expr(self.architecture.overlaps):
                cute.arch.griddepcontrol_wait()
            if mask != 0:
                largest_of_warps = memory.largest.get_tensor(cute.make_layout(WARPS))
                self.by_block(inputs, first, mask, steps, count, tokens, written, largest_of_warps, thread)

    @cute.jit
    def by_warp(self, inputs: cute.Tensor, row: Int32, mask: Int32, steps: Int32, written: rounding.Outputs) -> None:
        """Make the types of ``mask`` of one row."""
        lane = cute.arch.lane_idx()
        vectors = rounding.vectors(inputs, row)
        held = cute.make_rmem_tensor((VECTOR // 2, WARP_VECTORS // 32), Int32)
        held.fill(0)
        for j in cutlass.range_constexpr(WARP_VECTORS // 32):
            if lane + 32 * j < steps:
                source = cute.recast_ptr(vectors[None, lane + 32 * j].iterator, dtype=Int32)
                cute.autovec_copy(cute.make_tensor(source, cute.make_layout(VECTOR // 2)), held[None, j])
        pair = Int32(0)
        for j in cutlass.range_constexpr(WARP_VECTORS // 32):
            for i in cutlass.range_constexpr(VECTOR // 2):
                pair = rounding.larger(pair, held[i, j])
        scales = rounding.Scales.of(rounding.magnitude(rounding.largest_of_warp(pair)), written)
        if lane == 0:
            rounding.store_scales(scales, mask, written, row)
        vector = rounding.Vector.make()
        words = cute.make_tensor(cute.recast_ptr(vector.bf16.iterator, dtype=Int32), cute.make_layout(VECTOR // 2))
        for j in cutlass.range_constexpr(WARP_VECTORS // 32):
            if lane + 32 * j < steps:
                for i in cutlass.range_constexpr(VECTOR // 2):
                    words[i] = ptx.opaque(held[i, j])  # or the compiler makes two registers of it when it is loaded
                rounding.encode(vector, mask, scales)
                rounding.store(vector, mask, written, row, lane + 32 * j)

    @cute.jit
    def product(self, inputs: cute.Tensor, row: Int32, at: Int32, steps: Int32, eight: cute.Tensor) -> None:
        """Vector ``at`` of a row into ``eight``."""
        cute.autovec_copy(rounding.vectors(inputs, row)[None, at], eight)
