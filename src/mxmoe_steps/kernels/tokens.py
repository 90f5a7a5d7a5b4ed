"""What feeds the grouped GEMM: routed tokens sorted by expert, and copied or quantized to their rows (CuTe DSL).

`SortByExpert` is one cluster of blocks: each counts the experts of its part of the entries, reads the others' counts
from their shared memory, and hands every entry its row. The order of rows inside an expert is not defined; no
result depends on it.

`DispatchTokens` gives one block a token: a first pass over it finds the largest magnitude (unless all its experts read
bfloat16) and multiplies the gate of a shared expert, a second one, from L1, rounds it to the types that its experts
read and stores it to all their rows.

Launches overlap, see `group_gemm`: sorting lets dispatching start at once, which has the first pass behind it when the
rows are known, waits for them and only then lets the next launch start, because that reads row offsets before it waits.
"""

from typing import Any

import cutlass
from cutlass import BFloat16, Float32, Int32, const_expr, cute
from cutlass.memory import SmemAllocator

from mxmoe_steps.kernels import rounding
from mxmoe_steps.kernels.architecture import Architecture
from mxmoe_steps.kernels.limits import MAX_ENTRIES, MAX_EXPERTS

SORT_THREADS = MAX_EXPERTS
THREADS = 256  # of a block that dispatches a token


class SortByExpert:
    """Counting sort of the router's choices, at most `MAX_EXPERTS` experts, by a cluster of ``blocks``.

    ``expert_ids``: int64 [tokens, top_k]. Writes ``row`` int32 [tokens, top_k], the row of every choice, and
    ``offsets`` int32 [experts + slices + 1], the first row of each expert. The last ``slices`` experts take every
    token.
    """

    def __init__(self, architecture: Architecture, blocks: int) -> None:
        self.architecture, self.blocks = architecture, blocks

    @cute.jit
    def __call__(
        self, expert_ids: cute.Tensor, row: cute.Tensor, offsets: cute.Tensor, slices: Int32, stream: Any
    ) -> None:
        @cute.struct
        class Shared:
            counts: cute.struct.MemRange[Int32, MAX_EXPERTS]
            next: cute.struct.MemRange[Int32, MAX_EXPERTS]
            sums: cute.struct.MemRange[Int32, SORT_THREADS // 32]

        self.Shared = Shared
        cluster = {"cluster": (self.blocks, 1, 1)} if self.architecture.clusters else {}
        self.kernel(expert_ids, row, offsets, slices).launch(
            grid=(self.blocks, 1, 1), block=(SORT_THREADS, 1, 1), **cluster, stream=stream
        )

    @cute.kernel
    def kernel(self, expert_ids: cute.Tensor, row: cute.Tensor, offsets: cute.Tensor, slices: Int32) -> None:
        thread, _, _ = cute.arch.thread_idx()
        block, _, _ = cute.arch.block_idx()
        lane, warp = cute.arch.lane_idx(), cute.arch.warp_idx()
        memory = SmemAllocator().allocate(self.Shared)
        counts = memory.counts.get_tensor(cute.make_layout(MAX_EXPERTS))
        following = memory.next.get_tensor(cute.make_layout(MAX_EXPERTS))
        sums = memory.sums.get_tensor(cute.make_layout(SORT_THREADS // 32))
        tokens, top_k = expert_ids.shape[0], expert_ids.shape[1]
        entries, experts = tokens * top_k, offsets.shape[0] - 1 - slices
        flat = cute.make_tensor(expert_ids.iterator, cute.make_layout(entries))
        rows = cute.make_tensor(row.iterator, cute.make_layout(entries))
        each = SORT_THREADS * self.blocks
        rounds = (entries + (each - 1)) // each
        first_entry = block * SORT_THREADS + thread
        if const_expr(self.architecture.overlaps):
            cute.arch.griddepcontrol_launch_dependents()
        counts[thread] = Int32(0)
        cute.arch.sync_threads()
        for i in cutlass.range(rounds, unroll=4):
            entry = first_entry + i * each
            if entry < entries:
                cute.arch.atomic_add(counts.iterator + Int32(flat[entry]), Int32(1))
        self.meet()
        total, before = Int32(0), Int32(0)  # entries of expert ``thread``: all, and those of blocks before this one
        for other in cutlass.range_constexpr(self.blocks):
            count = self.count_of(counts, thread, other)
            total += count
            if other < block:
                before += count
        upto = self.scan(total, lane)
        if lane == 31:
            sums[warp] = upto
        cute.arch.sync_threads()
        if warp == 0:
            sums[lane] = self.scan(sums[lane], lane)
        cute.arch.sync_threads()
        if warp > 0:
            upto += sums[warp - 1]
        following[thread] = upto - total + before
        if block == 0:
            if thread < experts:
                offsets[thread + 1] = upto
            elif thread < experts + slices:
                offsets[thread + 1] = entries + (thread - experts + 1) * tokens
            if thread == 0:
                offsets[0] = Int32(0)
        cute.arch.sync_threads()
        for i in cutlass.range(rounds, unroll=4):
            entry = first_entry + i * each
            if entry < entries:
                rows[entry] = cute.arch.atomic_add(following.iterator + Int32(flat[entry]), Int32(1))
        self.meet()  # nobody leaves while its counts may be read

    @cute.jit
    def meet(self) -> None:
        """All threads of the cluster; what they wrote to shared memory is seen after it."""
        if const_expr(self.blocks == 1):
            cute.arch.sync_threads()
        else:
            cute.arch.cluster_arrive()
            cute.arch.cluster_wait()

    def count_of(self, counts: cute.Tensor, thread: Int32, block: int) -> Int32:
        """``counts[thread]`` of a block of the cluster."""
        if self.blocks == 1:
            return counts[thread]
        return cute.arch.inline_ptx(
            "{ .reg .b32 a; mapa.shared::cluster.u32 a, {$r0}, {$r1}; ld.shared::cluster.b32 {$w0}, [a]; }",
            write_only_types=[Int32],
            read_only_args=[(counts.iterator + thread).toint(), Int32(block)],
        )

    @cute.jit
    def scan(self, value: Int32, lane: Int32) -> Int32:
        """Inclusive sum over the lanes of a warp."""
        for step in (1, 2, 4, 8, 16):
            below = cute.arch.shuffle_sync_up(value, step)
            if lane >= step:
                value += below
        return value


class DispatchTokens:
    """Every token's row of ``x``, bfloat16 [tokens, K], to the rows of the experts that it goes to.

    ``expert_ids`` and ``row`` as in `SortByExpert`; then ``slices`` experts that take every token, token t in row
    ``tokens * (top_k + s) + t`` of expert ``experts + s``. ``needs``: int32 [experts + slices], mask of the operand
    types that an expert reads; no others are written. Types of 8 and 4 bits get one float32 scale per row.
    ``gating``: the weight [1, K] of the shared expert's gate and its logits [tokens], both bfloat16; they are written
    where it is ``gated``, and nobody looks at either otherwise.
    """

    def __init__(self, architecture: Architecture, gated: bool) -> None:
        self.architecture, self.gated = architecture, gated

    @cute.jit
    def __call__(
        self,
        x: cute.Tensor,
        expert_ids: cute.Tensor,
        row: cute.Tensor,
        needs: cute.Tensor,
        outputs: tuple,
        gating: tuple,
        slices: Int32,
        stream: Any,
    ) -> None:
        @cute.struct
        class Shared:
            largest: cute.struct.MemRange[Int32, THREADS // 32]
            sums: cute.struct.MemRange[Float32, THREADS // 32]
            rows: cute.struct.MemRange[Int32, MAX_ENTRIES]
            masks: cute.struct.MemRange[Int32, MAX_ENTRIES]

        self.Shared = Shared
        self.kernel(x, expert_ids, row, needs, outputs, gating, slices).launch(
            grid=(x.shape[0], 1, 1), block=(THREADS, 1, 1), use_pdl=self.architecture.overlaps, stream=stream
        )

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
        written = rounding.Outputs(*outputs)
        tokens, top_k = x.shape[0], expert_ids.shape[1]
        entries = top_k + slices
        types = self.types_of(expert_ids, needs, entries, masks)
        if const_expr(self.architecture.unreadable_mask):
            types &= self.architecture.operand_mask  # the compiler then leaves out what the GPU cannot round to

        source = rounding.vectors(x, token)
        steps = source.shape[1]
        looked_at = Int32(steps)
        if const_expr(not self.gated):
            looked_at *= Int32((types & self.architecture.scaled_mask) != 0)
        vector = rounding.Vector.make()
        pair, logit = Int32(0), Float32(0.0)
        for i in cutlass.range(thread, looked_at, THREADS, unroll=1):
            cute.autovec_copy(source[None, i], vector.bf16)
            pair = rounding.larger_of(pair, vector.bf16)
            if const_expr(self.gated):
                logit += self.product(vector.bf16, rounding.vectors(gating[0], Int32(0))[None, i])
        if const_expr(self.gated):
            self.store_logit(logit, memory.sums.get_tensor(cute.make_layout(THREADS // 32)), gating[1], token)
        largest = Float32(1.0)
        if (types & self.architecture.scaled_mask) != 0:
            largest = rounding.largest_of_block(pair, memory.largest.get_tensor(cute.make_layout(THREADS // 32)))
        scales = rounding.Scales.of(largest, written)
        cute.autovec_copy(source[None, cutlass.min(thread, steps - 1)], vector.bf16)

        if const_expr(self.architecture.overlaps):
            cute.arch.griddepcontrol_wait()
            cute.arch.griddepcontrol_launch_dependents()
        if thread < entries:
            rows[thread] = self.target_of(row, tokens, top_k)
            rounding.store_scales(scales, masks[thread], written, rows[thread])
        cute.arch.sync_threads()
        for i in cutlass.range(thread, steps, THREADS, unroll=1):
            if i != thread:
                cute.autovec_copy(source[None, i], vector.bf16)
            rounding.encode(vector, types, scales)
            for j in cutlass.range(entries, unroll=2):
                rounding.store(vector, masks[j], written, rows[j], i)

    @cute.jit
    def types_of(self, expert_ids: cute.Tensor, needs: cute.Tensor, entries: Int32, masks: cute.Tensor) -> Int32:
        """The types that the token's ``entries`` experts read, and those of each in ``masks``; the whole block."""
        token, thread = cute.arch.block_idx()[0], cute.arch.thread_idx()[0]
        if thread < entries:
            expert = needs.shape[0] - entries + thread
            if thread < expert_ids.shape[1]:
                expert = Int32(expert_ids[token, thread])
            masks[thread] = needs[expert]
        cute.arch.sync_threads()
        types = Int32(0)
        for j in cutlass.range(entries, unroll=1):
            types |= masks[j]
        return types

    @cute.jit
    def target_of(self, row: cute.Tensor, tokens: Int32, top_k: Int32) -> Int32:
        """The token's row of the expert whose number among its own is the thread's."""
        token, thread = cute.arch.block_idx()[0], cute.arch.thread_idx()[0]
        target = tokens * thread + token
        if thread < top_k:
            target = row[token, thread]
        return target

    @cute.jit
    def product(self, eight: cute.Tensor, stored: cute.Tensor) -> Float32:
        """Inner product of eight bfloat16 in registers and eight in memory."""
        weights = cute.make_rmem_tensor((rounding.VECTOR,), BFloat16)
        cute.autovec_copy(stored, weights)
        total = Float32(0.0)
        for e in cutlass.range_constexpr(rounding.VECTOR):
            total += Float32(eight[e]) * Float32(weights[e])
        return total

    @cute.jit
    def store_logit(self, part: Float32, sums: cute.Tensor, logits: cute.Tensor, token: Int32) -> None:
        """The sum of all threads' parts, bfloat16, into ``logits[token]``."""
        for step in (16, 8, 4, 2, 1):
            part += cute.arch.shuffle_sync_bfly(part, step)
        warp = cute.arch.warp_idx()
        if cute.arch.lane_idx() == 0:
            sums[warp] = part
        cute.arch.sync_threads()
        if cute.arch.thread_idx()[0] == 0:
            total = Float32(0.0)
            for i in cutlass.range_constexpr(THREADS // 32):
                total += sums[i]
            logits[token] = BFloat16(total)
