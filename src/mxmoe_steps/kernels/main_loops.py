"""The main loops of the consumer warpgroups, one per way that weights reach the tensor cores (CuTe DSL)."""

from dataclasses import dataclass

import cutlass
from cutlass import BFloat16, Boolean, Float8E4M3FN, Float32, Int32, const_expr, cute
from cutlass._mlir.dialects import llvm
from cutlass.cute.nvgpu import warpgroup
from cutlass.cutlass_dsl import T

from mxmoe_steps.kernels import decode
from mxmoe_steps.kernels.formats import GROUP
from mxmoe_steps.kernels.ring import CODE_WORDS, Chunks, Ring
from mxmoe_steps.kernels.schedule import Schedule


def pin(accumulators: cute.Tensor) -> None:
    """Tie every accumulator to this point, after ``wait_group(0)``; emits no instruction.

    The wait does not name the registers that asynchronous ``wgmma`` writes, so the compiler may move their
    first read above it. `lint` looks for that in the machine code.
    """
    for i in range(cute.size(accumulators)):
        kind, constraint = (T.f32(), "=f,0") if accumulators.element_type is Float32 else (T.i32(), "=r,0")
        value = llvm.inline_asm(kind, [accumulators[i].ir_value()], "", constraint, has_side_effects=True)
        accumulators[i] = accumulators.element_type(value)


@dataclass(frozen=True)
class Scratch:
    """Registers a thread decodes from: words of two loads, third bits, and (`decode.Affine` register, row)."""

    words: cute.Tensor
    third: cute.Tensor
    affine: cute.Tensor

    @staticmethod
    def make() -> "Scratch":
        return Scratch(*(cute.make_rmem_tensor(shape, Int32) for shape in ((CODE_WORDS, 2), (2,), (3, 2))))


class MainLoops(Schedule):
    """Each multiplies a warpgroup's ``slots`` of a tile into ``acc``: ring slot ``stage`` and every ``split``-th on."""

    def some(self, slots: Int32) -> Boolean:
        """Whether there is a slot for this warpgroup: not always, where they are dealt to several."""
        return Boolean(True) if self.split == 1 else slots > 0

    def clear(self, *registers: cute.Tensor) -> None:
        """Give registers that only a warpgroup with slots fills a value in every tile: they would be kept from one tile
        to the next, for every configuration, if a tile could leave them alone."""
        if self.split > 1:
            for tensor in registers:
                tensor.fill(0)

    @cute.jit
    def multiply_rows(
        self,
        tile: cutlass.Constexpr,
        mma: cute.TiledMma,
        acc: cute.Tensor,
        ring: Ring,
        weights: cute.Tensor,
        tokens: cute.Tensor,
        slots: Int32,
        stage: Int32,
        phase: Int32,
    ) -> None:
        """Main loop of formats that ``wgmma`` reads from shared memory."""
        previous = stage
        for slot in cutlass.range(slots, unroll=1):
            cute.arch.mbarrier_wait(ring.full + stage, phase)
            warpgroup.fence()
            for d in cutlass.range_constexpr(tile.depth):
                for k in cutlass.range_constexpr(4):
                    at = (None, None, k, (d, stage))
                    cute.gemm(mma, acc, weights[at], tokens[at], acc)
            warpgroup.commit_group()
            warpgroup.wait_group(1)
            self.release(ring, previous, slot > 0)
            previous = stage
            stage, phase = self.advance(stage, phase, self.split)
        warpgroup.wait_group(0)
        pin(acc)
        self.release(ring, previous, self.some(slots))

    @cute.jit
    def multiply_bf16(
        self,
        tile: cutlass.Constexpr,
        mma: cute.TiledMma,
        acc: cute.Tensor,
        ring: Ring,
        tokens: cute.Tensor,
        thread: Int32,
        row: Int32,
        slots: Int32,
        stage: Int32,
        phase: Int32,
    ) -> None:
        """Main loop of formats decoded to bfloat16: half a chunk (64 features) is decoded while ``wgmma`` runs
        on the half before.

        Nothing is in flight where the loop turns: the assembler takes the fragment of such a ``wgmma`` from every
        other configuration of the kernel, and serializes all of them when registers run out.
        """
        chunks = self.chunk_parts(ring, tile)
        fragments = [cute.make_rmem_tensor(mma.partition_shape_A((self.rows, 64)), BFloat16) for _ in range(2)]
        registers = [self.as_registers(fragment) for fragment in fragments]
        scratch = Scratch.make()
        self.clear(*fragments, scratch.words, scratch.third, scratch.affine)
        steps = 2 * tile.slot_features // GROUP
        if self.some(slots):
            cute.arch.mbarrier_wait(ring.full + stage, phase)
            self.decode_bf16(tile, chunks, scratch, registers[0], thread, row, 0, stage)
        for slot in cutlass.range(slots, unroll=1):
            after, after_phase = self.advance(stage, phase, self.split)
            for step in cutlass.range_constexpr(steps):
                warpgroup.fence()
                for b in cutlass.range_constexpr(4):
                    at = (None, None, b, (step, stage))
                    cute.gemm(mma, acc, fragments[step % 2][None, None, b], tokens[at], acc)
                warpgroup.commit_group()
                warpgroup.wait_group(1)  # the fragment of the step before is free
                if const_expr(step + 1 < steps):
                    self.decode_bf16(tile, chunks, scratch, registers[(step + 1) % 2], thread, row, step + 1, stage)
                elif slot + 1 < slots:
                    cute.arch.mbarrier_wait(ring.full + after, after_phase)
                    self.decode_bf16(tile, chunks, scratch, registers[0], thread, row, 0, after)
            warpgroup.wait_group(0)
            self.release(ring, stage, Boolean(True))
            stage, phase = after, after_phase
        pin(acc)

    @cute.jit
    def decode_bf16(
        self,
        tile: cutlass.Constexpr,
        chunks: Chunks,
        scratch: Scratch,
        registers: cute.Tensor,
        thread: Int32,
        row: Int32,
        step: cutlass.Constexpr,
        stage: Int32,
    ) -> None:
        """Half-chunk ``step`` of a slot to the fragment ``registers``."""
        format_ = tile.format
        c, half = step // 2, step % 2
        words, third, affine = scratch.words, scratch.third, scratch.affine
        if const_expr(format_.bits == 8):
            cute.autovec_copy(chunks.codes[None, thread, 2 * half, c, stage], words[None, 0])
            cute.autovec_copy(chunks.codes[None, thread, 2 * half + 1, c, stage], words[None, 1])
        elif const_expr(format_.bits == 4):
            cute.autovec_copy(chunks.codes[None, thread, half, c, stage], words[None, 0])
        elif const_expr(half == 0):
            cute.autovec_copy(chunks.codes[None, thread, 0, c, stage], words[None, 0])
            if const_expr(format_.bits == 3):
                cute.autovec_copy(chunks.third_bits[None, thread, c, stage], third)
        if const_expr(format_.grouped and half == 0):
            for r in cutlass.range_constexpr(2):
                zero = chunks.scales[row + 8 * r, 1, c, stage] if const_expr(format_.zeros) else None
                for j, value in enumerate(decode.affine(chunks.scales[row + 8 * r, 0, c, stage], zero).registers):
                    affine[j, r] = value
        rows = [decode.Affine(*(affine[j, r] for j in range(3 if format_.zeros else 1))) for r in range(2)]
        for b in cutlass.range_constexpr(4):
            for r in cutlass.range_constexpr(4):
                block = 4 * half + b
                if const_expr(format_.bits == 8):
                    value = decode.bf16_from_8bit(words[2 * (b % 2) + r // 2, b // 2], r)
                elif const_expr(format_.bits == 4):
                    value = decode.bf16_from_4bit(words[b, 0], r, rows[r % 2])
                elif const_expr(format_.bits == 3):
                    value = decode.bf16_from_3bit(words[block // 2, 0], third[half], block, r, rows[r % 2])
                else:
                    value = decode.bf16_from_2bit(words[block // 2, 0], block, r, rows[r % 2])
                registers[r, b] = value

    @staticmethod
    def as_registers(fragment: cute.Tensor) -> cute.Tensor:
        """(register, k block) view of an A fragment."""
        blocks = cute.size(fragment, mode=[2])
        return cute.make_tensor(cute.recast_ptr(fragment.iterator, dtype=Int32), cute.make_layout((4, blocks)))

    @cute.jit
    def multiply_fp8(
        self,
        tile: cutlass.Constexpr,
        mma: cute.TiledMma,
        acc: cute.Tensor,
        ring: Ring,
        tokens: cute.Tensor,
        thread: Int32,
        row: Int32,
        slots: Int32,
        stage: Int32,
        phase: Int32,
    ) -> None:
        """Main loop of 4-bit codes decoded to e4m3: each group of 128 features is summed on its own, then added
        to the total in float32 with its scale.

        A group's ``wgmma`` follow one another at once; its sums are added and the next group is decoded while the
        other warpgroup's run. Codes of the next group's first half are fetched before the wait, those of the second
        when the sums' registers are free.
        """
        chunks = self.chunk_parts(ring, tile)
        fragments = [cute.make_rmem_tensor(mma.partition_shape_A((self.rows, 64)), Float8E4M3FN) for _ in range(2)]
        registers = [self.as_registers(fragment) for fragment in fragments]
        words = cute.make_rmem_tensor((CODE_WORDS, 2), Int32)
        self.clear(*fragments, words)
        partial = cute.make_rmem_tensor(acc.layout, Float32)
        partial.fill(0.0)
        groups = tile.slot_features // GROUP
        if self.some(slots):
            cute.arch.mbarrier_wait(ring.full + stage, phase)
            for half in cutlass.range_constexpr(2):
                cute.autovec_copy(chunks.codes[None, thread, half, 0, stage], words[None, half])
                self.decode_fp8(words, half, registers[half])
        for slot in cutlass.range(slots, unroll=1):
            after, after_phase = self.advance(stage, phase, self.split)
            for c in cutlass.range_constexpr(groups):
                warpgroup.fence()
                for half in cutlass.range_constexpr(2):
                    for b in cutlass.range_constexpr(2):
                        mma.set(warpgroup.Field.ACCUMULATE, half + b > 0)
                        at = (None, None, 2 * half + b, (c, stage))
                        cute.gemm(mma, partial, fragments[half][None, None, b], tokens[at], partial)
                warpgroup.commit_group()
                scale0 = decode.bf16_value(chunks.scales[row, 0, c, stage]) * 512.0  # codes are times 2**-9
                scale1 = decode.bf16_value(chunks.scales[row + 8, 0, c, stage]) * 512.0
                next_chunk, next_stage = (c + 1, stage) if c + 1 < groups else (0, after)
                if const_expr(c + 1 < groups):
                    cute.autovec_copy(chunks.codes[None, thread, 0, c + 1, stage], words[None, 0])
                elif slot + 1 < slots:
                    cute.arch.mbarrier_wait(ring.full + after, after_phase)
                    cute.autovec_copy(chunks.codes[None, thread, 0, 0, after], words[None, 0])
                warpgroup.wait_group(0)
                pin(partial)
                self.add_scaled(acc, partial, scale0, scale1)
                cute.autovec_copy(chunks.codes[None, thread, 1, next_chunk, next_stage], words[None, 1])
                for half in cutlass.range_constexpr(2):
                    self.decode_fp8(words, half, registers[half])
            self.release(ring, stage, Boolean(True))
            stage, phase = after, after_phase

    @staticmethod
    def decode_fp8(words: cute.Tensor, half: int, registers: cute.Tensor) -> None:
        """Half of a chunk, two k32 blocks, to the fragment ``registers``."""
        for b in range(2):
            for r in range(4):
                registers[r, b] = decode.fp8_from_4bit(words[2 * b + r // 2, half], r)

    @staticmethod
    def add_scaled(acc: cute.Tensor, partial: cute.Tensor, scale0: Float32, scale1: Float32) -> None:
        """acc += partial * (scale of the thread's first or second row)."""
        for e in range(cute.size(acc)):
            acc[e] = acc[e] + partial[e] * (scale0 if (e // 2) % 2 == 0 else scale1)
