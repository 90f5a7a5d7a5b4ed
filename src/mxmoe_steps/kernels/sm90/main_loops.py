"""The main loops of the consumer warpgroups, one per way that weights reach the tensor cores (CuTe DSL)."""

from dataclasses import dataclass
from typing import Any

import cutlass
from cutlass import BFloat16, Boolean, Float32, Int32, const_expr, cute
from cutlass._mlir.dialects import llvm
from cutlass.cute.nvgpu import warpgroup
from cutlass.cutlass_dsl import T

from mxmoe_steps.kernels.codes.format import GROUP
from mxmoe_steps.kernels.sm90.config import KernelConfig, Tile
from mxmoe_steps.kernels.sm90.registers import (
    Scratch,
    add_scaled,
    as_registers,
    decode_bf16,
    decode_half,
    fetch_codes,
    fetch_scales,
)
from mxmoe_steps.kernels.sm90.ring import Position, Ring


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
class MainLoop:
    """Multiplies a warpgroup's ``slots`` of a tile of ``features`` into accumulators.

    ``mma``: the warpgroup's instruction; ``tokens``: its operand from the ring, by slot; ``weights``: the same, where
    it reads weights from shared memory. ``thread``: of the part, in its order of rows.
    """

    config: KernelConfig
    tile: Tile
    ring: Ring
    mma: cute.TiledMma
    tokens: cute.Tensor
    weights: Any
    thread: Int32
    slots: Int32
    features: Int32

    def run(self, acc: cute.Tensor, position: Position) -> Position:
        """Add the products to ``acc``, from ``position`` of the ring on; returns the one behind the tile."""
        raise NotImplementedError

    @property
    def any_slot(self) -> Boolean:
        """Whether there is a slot for this warpgroup: not always, where they are dealt to several."""
        return Boolean(True) if self.config.split == 1 else self.slots > 0

    def clear(self, *registers: cute.Tensor) -> None:
        """Give registers that only a warpgroup with slots fills a value in every tile: they would be kept from one tile
        to the next, for every configuration, if a tile could leave them alone."""
        if self.config.split > 1:
            for tensor in registers:
                tensor.fill(0)


class RowsLoop(MainLoop):
    """Formats that ``wgmma`` reads from shared memory."""

    @cute.jit
    def run(self, acc: cute.Tensor, position: Position) -> Position:
        """As `MainLoop.run`."""
        tile, ring = self.tile, self.ring
        previous = position.stage
        for slot in cutlass.range(self.slots, unroll=1):
            begin = ring.begin(tile, position.end)
            ring.wait_full(position)
            warpgroup.fence()
            for d in cutlass.range_constexpr(tile.depth):
                for k in cutlass.range_constexpr(4):
                    at = (None, None, k, (d, begin))
                    cute.gemm(self.mma, acc, self.weights[at], self.tokens[at], acc)
            warpgroup.commit_group()
            warpgroup.wait_group(1)
            ring.release(previous, slot > 0)
            previous = position.stage
            position = ring.after(tile, begin, position)
        warpgroup.wait_group(0)
        pin(acc)
        ring.release(previous, self.any_slot)
        return position


class Bf16Loop(MainLoop):
    """Formats decoded to bfloat16: half a chunk (64 features) is decoded while ``wgmma`` runs on the half before.

    Nothing is in flight where the loop turns: the assembler takes the fragment of such a ``wgmma`` from every other
    configuration of the kernel, and serializes all of them when registers run out.
    """

    @cute.jit
    def run(self, acc: cute.Tensor, position: Position) -> Position:
        """As `MainLoop.run`."""
        tile, ring, mma = self.tile, self.ring, self.mma
        chunks = ring.chunks(tile, self.thread)
        fragments = [cute.make_rmem_tensor(mma.partition_shape_A((tile.rows, 64)), BFloat16) for _ in range(2)]
        registers = [as_registers(fragment) for fragment in fragments]
        scratch = Scratch.make(tile.format)
        steps = 2 * tile.slot_features // GROUP
        begin = ring.begin(tile, position.end)
        ring.wait_full(position)
        decode_bf16(tile.format, chunks, scratch, registers[0], 0, begin)
        for slot in cutlass.range(self.slots, unroll=1):
            after = ring.after(tile, begin, position)
            following = ring.begin(tile, after.end)
            for step in cutlass.range_constexpr(steps):
                warpgroup.fence()
                for b in cutlass.range_constexpr(4):
                    at = (None, None, b, (step, begin))
                    cute.gemm(mma, acc, fragments[step % 2][None, None, b], self.tokens[at], acc)
                warpgroup.commit_group()
                warpgroup.wait_group(1)  # the fragment of the step before is free
                if const_expr(step + 1 < steps):
                    decode_bf16(tile.format, chunks, scratch, registers[(step + 1) % 2], step + 1, begin)
                elif slot + 1 < self.slots:
                    ring.wait_full(after)
                    decode_bf16(tile.format, chunks, scratch, registers[0], 0, following)
            warpgroup.wait_group(0)
            ring.release(position.stage, Boolean(True))
            position, begin = after, following
        pin(acc)
        return position


class EightBitLoop(MainLoop):
    """Formats decoded to 8-bit operands: what loops of fp8 and int8 share.

    A group's ``wgmma`` follow one another at once; its sums are added to the total, in float32 with the group's scale,
    and the next group is decoded while the other warpgroup's run. Codes are fetched when there are registers for them.
    """

    def fragments(self) -> tuple[list[cute.Tensor], list[cute.Tensor]]:
        """Operands of the halves of a chunk, and their registers."""
        shape = self.mma.partition_shape_A((self.tile.rows, 64))
        fragments = [self.mma.make_fragment_A(shape) for _ in range(2)]
        return fragments, [as_registers(fragment) for fragment in fragments]

    @cute.jit
    def multiply(
        self,
        mma: cute.TiledMma,
        sums: cute.Tensor,
        fragments: cutlass.Constexpr,
        chunk: cutlass.Constexpr,
        begin: Int32,
        goes_on: cutlass.Constexpr,
    ) -> None:
        """Start on a chunk of the slot at unit ``begin``; ``goes_on``: its sums are added to those before."""
        warpgroup.fence()
        for half in cutlass.range_constexpr(2):
            for b in cutlass.range_constexpr(2):
                mma.set(warpgroup.Field.ACCUMULATE, goes_on or half + b > 0)
                at = (None, None, 2 * half + b, (chunk, begin))
                cute.gemm(mma, sums, fragments[half][None, None, b], self.tokens[at], sums)
        warpgroup.commit_group()


class Fp8Loop(EightBitLoop):
    """Each group is summed on its own: s_0 a_0 + s_1 a_1 + ... with scales s and sums a.

    Codes of the next group's first half are fetched before the wait, those of the second one when the sums' registers
    are free.
    """

    @cute.jit
    def run(self, acc: cute.Tensor, position: Position) -> Position:
        """As `MainLoop.run`."""
        tile, ring, format_, mma = self.tile, self.ring, self.tile.format, self.mma
        chunks = ring.chunks(tile, self.thread)
        fragments, registers = self.fragments()
        words = cute.make_rmem_tensor((format_.words,), Int32)
        self.clear(*registers, words)
        sums = cute.make_rmem_tensor(acc.layout, Float32)
        scales = cute.make_rmem_tensor((2,), Float32)
        groups = tile.slot_features // GROUP
        begin = ring.begin(tile, position.end)
        if self.any_slot:
            ring.wait_full(position)
            for half in cutlass.range_constexpr(2):
                fetch_codes(format_, chunks, half, 0, begin, words)
                decode_half(format_, words, half, registers[half])
        sums.fill(0.0)
        for slot in cutlass.range(self.slots, unroll=1):
            after = ring.after(tile, begin, position)
            following = ring.begin(tile, after.end)
            for c in cutlass.range_constexpr(groups):
                self.multiply(mma, sums, fragments, c, begin, False)
                fetch_scales(chunks, c, begin, scales)
                next_chunk, next_slot = (c + 1, begin) if c + 1 < groups else (0, following)
                if const_expr(c + 1 < groups):
                    fetch_codes(format_, chunks, 0, next_chunk, next_slot, words)
                elif slot + 1 < self.slots:
                    ring.wait_full(after)
                    fetch_codes(format_, chunks, 0, next_chunk, next_slot, words)
                warpgroup.wait_group(0)
                pin(sums)
                add_scaled(acc, sums, scales)
                fetch_codes(format_, chunks, 1, next_chunk, next_slot, words)
                for half in cutlass.range_constexpr(2):
                    decode_half(format_, words, half, registers[half])
            ring.release(position.stage, Boolean(True))
            position, begin = after, following
        return position


MAGIC = 1.5 * 2**23  # float32 from here to 2**22 away are integers with consecutive bit patterns
RUN = 2**22 // (8 * 128 * GROUP)  # groups whose sum is no larger: 4-bit codes times int8


class Int8Loop(EightBitLoop):
    """The sums run on, A_g = a_0 + ... + a_g, and are added by parts, as

        (s_0 - s_1) A_0 + (s_1 - s_2) A_1 + ...    (after the last group s = 0)

    They start at the bits of the float32 MAGIC: the same bits are MAGIC + A_g as float32, so nothing is converted, nor
    set back but every RUN groups. The total starts at -MAGIC s_0, which the MAGIC in the terms makes up for at the end.
    On the way it is about -MAGIC s_g+1, so each addition is rounded to one or two s_g+1: as if one of the 128
    activations of a group were rounded once more.

    Codes of the next group are fetched after the wait, when the fragments' registers are free.
    """

    @cute.jit
    def run(self, acc: cute.Tensor, position: Position) -> Position:
        """As `MainLoop.run`."""
        tile, ring, format_, mma = self.tile, self.ring, self.tile.format, self.mma
        chunks = ring.chunks(tile, self.thread)
        fragments, registers = self.fragments()
        words = cute.make_rmem_tensor((format_.words,), Int32)
        self.clear(*registers, words)
        sums = cute.make_rmem_tensor(acc.layout, Int32)
        as_floats = cute.make_tensor(cute.recast_ptr(sums.iterator, dtype=Float32), acc.layout)
        scales, following_scales = (cute.make_rmem_tensor((2,), Float32) for _ in range(2))
        groups = tile.slot_features // GROUP
        following_scales.fill(0.0)
        begin = ring.begin(tile, position.end)
        if self.any_slot:
            ring.wait_full(position)
            for half in cutlass.range_constexpr(2):
                fetch_codes(format_, chunks, half, 0, begin, words)
                decode_half(format_, words, half, registers[half])
            fetch_scales(chunks, 0, begin, following_scales)
        self.start_sums(acc, as_floats, following_scales)
        for slot in cutlass.range(self.slots, unroll=1):
            after = ring.after(tile, begin, position)
            following = ring.begin(tile, after.end)
            for c in cutlass.range_constexpr(groups):
                self.multiply(mma, sums, fragments, c, begin, True)
                next_chunk, next_slot = (c + 1, begin) if c + 1 < groups else (0, following)
                if const_expr(c + 1 == groups):  # noqa: SIM102 (known when the kernel is compiled)
                    if slot + 1 < self.slots:
                        ring.wait_full(after)
                scales.store(following_scales.load())
                following_scales.fill(0.0)
                if slot + 1 < self.slots if c + 1 == groups else (slot * groups + c + 1) * GROUP < self.features:
                    fetch_scales(chunks, next_chunk, next_slot, following_scales)
                scales.store(scales.load() - following_scales.load())
                warpgroup.wait_group(0)
                pin(sums)
                add_scaled(acc, as_floats, scales)
                for half in cutlass.range_constexpr(2):
                    fetch_codes(format_, chunks, half, next_chunk, next_slot, words)
                for half in cutlass.range_constexpr(2):
                    decode_half(format_, words, half, registers[half])
            ring.release(position.stage, Boolean(True))
            run_ends = (slot + 1) % (RUN // groups) == 0
            if run_ends:
                add_scaled(acc, as_floats, following_scales)
                self.start_sums(acc, as_floats, following_scales)
            position, begin = after, following
        return position

    @staticmethod
    def start_sums(acc: cute.Tensor, sums: cute.Tensor, scales: cute.Tensor) -> None:
        """Set the sums to MAGIC and take that, times their scale, from the total."""
        sums.fill(MAGIC)
        add_scaled(acc, sums, [-scales[0], -scales[1]])
