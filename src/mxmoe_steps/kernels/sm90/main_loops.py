"""The main loops of the consumer warpgroups, one per way that weights reach the tensor cores (CuTe DSL)."""

from dataclasses import dataclass
from typing import Any

import cutlass
from cutlass import BFloat16, Boolean, Float32, Int32, const_expr, cute
from cutlass._mlir.dialects import llvm
from cutlass.cute.nvgpu import warpgroup
from cutlass.cutlass_dsl import T

from mxmoe_steps.kernels.codes.format import GROUP, Format
from mxmoe_steps.kernels.sm90.config import ROW_BYTES, UNIT, Tile
from mxmoe_steps.kernels.sm90.ring import Chunks, Ring
from mxmoe_steps.kernels.sm90.schedule import Schedule

MAGIC = 1.5 * 2**23  # float32 from here to 2**22 away are integers with consecutive bit patterns
MAGIC_BITS = 0x4B400000  # of that number
MOST_TERMS = 6  # of `Format.terms`
RUN = 2**22 // (8 * 128 * GROUP)  # groups whose sum is no larger: 4-bit codes times int8


def load_matrices(address: Int32) -> tuple[Int32, Int32, Int32, Int32]:
    """Four 8 x 8 matrices of 16-bit elements; lanes 8 i to 8 i + 7 have the addresses of the rows of matrix i."""
    return cute.arch.inline_ptx(
        "ldmatrix.sync.aligned.m8n8.x4.shared.b16 {{$w0}, {$w1}, {$w2}, {$w3}}, [{$r0}];",
        write_only_types=[Int32] * 4,
        read_only_args=[address],
    )


def multiply_warp(bf16: bool, acc: cute.Tensor, weights: cute.Tensor, low: Int32, high: Int32) -> None:
    """acc [16 rows, 8 tokens] += weights [16, 16 bfloat16 or 32 int8] . tokens, of which ``low`` and ``high`` are the
    first and the second half of the features."""
    kind = "m16n8k16.row.col.f32.bf16.bf16.f32" if bf16 else "m16n8k32.row.col.s32.s8.s8.s32"
    made = cute.arch.inline_ptx(
        f"mma.sync.aligned.{kind} {{{{$w0}}, {{$w1}}, {{$w2}}, {{$w3}}}}, {{{{$r0}}, {{$r1}}, {{$r2}}, {{$r3}}}}, "
        "{{$r4}, {$r5}}, {{$r6}, {$r7}, {$r8}, {$r9}};",
        write_only_types=[Float32 if bf16 else Int32] * 4,
        read_only_args=[*(weights[i] for i in range(4)), low, high, *(acc[i] for i in range(4))],
    )
    for i in range(4):
        acc[i] = made[i]


def pin(accumulators: cute.Tensor) -> None:
    """Tie every accumulator to this point, after ``wait_group(0)``; emits no instruction.

    The wait does not name the registers that asynchronous ``wgmma`` writes, so the compiler may move their
    first read above it. `lint` looks for that in the machine code.
    """
    for i in range(cute.size(accumulators)):
        kind, constraint = (T.f32(), "=f,0") if accumulators.element_type is Float32 else (T.i32(), "=r,0")
        value = llvm.inline_asm(kind, [accumulators[i].ir_value()], "", constraint, has_side_effects=True)
        accumulators[i] = accumulators.element_type(value)


def bf16_value(pair: Int32, place: int) -> Float32:
    """The float32 of the low (``place`` 0) or high one of two bfloat16 bit patterns."""
    high = ("shl.b32 t, {$r0}, 16;", "and.b32 t, {$r0}, 0xFFFF0000;")[place]
    return cute.arch.inline_ptx(
        "{ .reg .b32 t; " + high + " mov.b32 {$w0}, t; }", write_only_types=[Float32], read_only_args=[pair]
    )


@dataclass(frozen=True)
class Scratch:
    """Registers a thread decodes a chunk from: its words, the numbers of its two rows, and `Format.terms`."""

    words: cute.Tensor
    numbers: cute.Tensor
    terms: cute.Tensor

    @staticmethod
    def make(format_: Format) -> "Scratch":
        sizes = (format_.words, max(1, format_.all_numbers), MOST_TERMS)
        return Scratch(*(cute.make_rmem_tensor((size,), Int32) for size in sizes))


class MainLoops(Schedule):
    """Each multiplies a warpgroup's ``slots`` of a tile, from ring slot ``stage`` on, into ``acc``.

    ``end``: unit of the ring where the slot before ends. Both, and the parity ``phase``, are returned for what follows.
    """

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
        end: Int32,
    ) -> tuple[Int32, Int32, Int32]:
        """Main loop of formats that ``wgmma`` reads from shared memory."""
        previous = stage
        for slot in cutlass.range(slots, unroll=1):
            begin = self.begin(tile, end)
            cute.arch.mbarrier_wait(ring.full + stage, phase)
            warpgroup.fence()
            for d in cutlass.range_constexpr(tile.depth):
                for k in cutlass.range_constexpr(4):
                    at = (None, None, k, (d, begin))
                    cute.gemm(mma, acc, weights[at], tokens[at], acc)
            warpgroup.commit_group()
            warpgroup.wait_group(1)
            self.release(ring, previous, slot > 0)
            previous, end = stage, begin + tile.slot_units
            stage, phase = self.advance(stage, phase)
        warpgroup.wait_group(0)
        pin(acc)
        self.release(ring, previous, self.some(slots))
        return stage, phase, end

    @cute.jit
    def multiply_bf16(
        self,
        tile: cutlass.Constexpr,
        mma: cute.TiledMma,
        acc: cute.Tensor,
        ring: Ring,
        tokens: cute.Tensor,
        thread: Int32,
        slots: Int32,
        stage: Int32,
        phase: Int32,
        end: Int32,
    ) -> tuple[Int32, Int32, Int32]:
        """Main loop of formats decoded to bfloat16: half a chunk (64 features) is decoded while ``wgmma`` runs
        on the half before.

        Nothing is in flight where the loop turns: the assembler takes the fragment of such a ``wgmma`` from every
        other configuration of the kernel, and serializes all of them when registers run out.
        """
        chunks = self.chunk_parts(ring, tile, thread)
        fragments = [cute.make_rmem_tensor(mma.partition_shape_A((self.rows, 64)), BFloat16) for _ in range(2)]
        registers = [self.as_registers(fragment) for fragment in fragments]
        scratch = Scratch.make(tile.format)
        steps = 2 * tile.slot_features // GROUP
        begin = self.begin(tile, end)
        cute.arch.mbarrier_wait(ring.full + stage, phase)
        self.decode_bf16(tile, chunks, scratch, registers[0], 0, begin)
        for slot in cutlass.range(slots, unroll=1):
            after, after_phase = self.advance(stage, phase)
            end = begin + tile.slot_units
            following = self.begin(tile, end)
            for step in cutlass.range_constexpr(steps):
                warpgroup.fence()
                for b in cutlass.range_constexpr(4):
                    at = (None, None, b, (step, begin))
                    cute.gemm(mma, acc, fragments[step % 2][None, None, b], tokens[at], acc)
                warpgroup.commit_group()
                warpgroup.wait_group(1)  # the fragment of the step before is free
                if const_expr(step + 1 < steps):
                    self.decode_bf16(tile, chunks, scratch, registers[(step + 1) % 2], step + 1, begin)
                elif slot + 1 < slots:
                    cute.arch.mbarrier_wait(ring.full + after, after_phase)
                    self.decode_bf16(tile, chunks, scratch, registers[0], 0, following)
            warpgroup.wait_group(0)
            self.release(ring, stage, Boolean(True))
            stage, phase, begin = after, after_phase, following
        pin(acc)
        return stage, phase, end

    @cute.jit
    def decode_bf16(
        self,
        tile: cutlass.Constexpr,
        chunks: Chunks,
        scratch: Scratch,
        registers: cute.Tensor,
        step: cutlass.Constexpr,
        begin: Int32,
    ) -> None:
        """Half-chunk ``step`` of the slot at unit ``begin`` to the fragment ``registers``."""
        format_ = tile.format
        chunk, half = step // 2, step % 2
        self.fetch_codes(format_, chunks, half, chunk, begin, scratch.words)
        if const_expr(format_.grouped and half == 0):
            cute.autovec_copy(chunks.numbers[None, chunk, begin], scratch.numbers)
        if const_expr(half in format_.term_halves):
            terms = format_.terms(scratch.numbers, half)
            for i in cutlass.range_constexpr(len(terms)):
                scratch.terms[i] = terms[i]
        for b in cutlass.range_constexpr(4):
            decoded = format_.decode(scratch.words, 4 * half + b, scratch.terms)
            for r in cutlass.range_constexpr(4):
                registers[r, b] = decoded[r]

    @staticmethod
    def as_registers(fragment: cute.Tensor) -> cute.Tensor:
        """(register, k block) view of an A fragment."""
        blocks = cute.size(fragment, mode=[2])
        return cute.make_tensor(cute.recast_ptr(fragment.iterator, dtype=Int32), cute.make_layout((4, blocks)))

    @cute.jit
    def multiply_8bit(
        self,
        tile: cutlass.Constexpr,
        mma: cute.TiledMma,
        acc: cute.Tensor,
        ring: Ring,
        tokens: cute.Tensor,
        thread: Int32,
        features: Int32,
        slots: Int32,
        stage: Int32,
        phase: Int32,
        end: Int32,
    ) -> tuple[Int32, Int32, Int32]:
        """Main loop of 4-bit codes decoded to 8-bit operands: sums of groups of 128 features are added to the total in
        float32 with the groups' scales.

        A group's ``wgmma`` follow one another at once; its sums are added and the next group is decoded while the
        other warpgroup's run. Codes are fetched when there are registers for them. fp8: those of the next group's
        first half before the wait, those of the second when the sums' registers are free. int8: all after the wait,
        when the fragments' are.

        fp8: each group is summed on its own, s_0 a_0 + s_1 a_1 + ... with scales s and sums a. int8: the sums run on,
        A_g = a_0 + ... + a_g, and are added by parts, as

            (s_0 - s_1) A_0 + (s_1 - s_2) A_1 + ...    (after the last group s = 0)

        They start at the bits of the float32 MAGIC: the same bits are MAGIC + A_g as float32, so nothing is converted,
        nor set back but every RUN groups. The total starts at -MAGIC s_0, which the MAGIC in the terms makes up for at
        the end. On the way it is about -MAGIC s_g+1, so each addition is rounded to one or two s_g+1: as if one of the
        128 activations of a group were rounded once more.
        """
        format_ = tile.format
        by_parts = format_.operand == "int8"
        chunks = self.chunk_parts(ring, tile, thread)
        fragments = [mma.make_fragment_A(mma.partition_shape_A((self.rows, 64))) for _ in range(2)]
        registers = [self.as_registers(fragment) for fragment in fragments]
        words = cute.make_rmem_tensor((format_.words,), Int32)
        self.clear(*registers, words)
        partial = cute.make_rmem_tensor(acc.layout, Int32 if by_parts else Float32)
        sums = cute.make_tensor(cute.recast_ptr(partial.iterator, dtype=Float32), acc.layout)
        scales, following = (cute.make_rmem_tensor((2,), Float32) for _ in range(2))
        early, late = ((), (0, 1)) if by_parts else ((0,), (1,))  # halves of a chunk
        groups = tile.slot_features // GROUP
        following.fill(0.0)
        begin = self.begin(tile, end)
        if self.some(slots):
            cute.arch.mbarrier_wait(ring.full + stage, phase)
            for half in cutlass.range_constexpr(2):
                self.fetch_codes(format_, chunks, half, 0, begin, words)
                self.decode_8bit(format_, words, half, registers[half])
            if const_expr(by_parts):
                self.fetch_scales(chunks, 0, begin, following)
        if const_expr(by_parts):
            self.start_sums(acc, sums, following)
        else:
            sums.fill(0.0)
        for slot in cutlass.range(slots, unroll=1):
            after, after_phase = self.advance(stage, phase)
            end = begin + tile.slot_units
            next_begin = self.begin(tile, end)
            for c in cutlass.range_constexpr(groups):
                warpgroup.fence()
                for half in cutlass.range_constexpr(2):
                    for b in cutlass.range_constexpr(2):
                        mma.set(warpgroup.Field.ACCUMULATE, by_parts or half + b > 0)
                        at = (None, None, 2 * half + b, (c, begin))
                        cute.gemm(mma, partial, fragments[half][None, None, b], tokens[at], partial)
                warpgroup.commit_group()
                if const_expr(not by_parts):
                    self.fetch_scales(chunks, c, begin, scales)
                next_chunk, next_slot = (c + 1, begin) if c + 1 < groups else (0, next_begin)
                if const_expr(c + 1 < groups):
                    for half in cutlass.range_constexpr(len(early)):
                        self.fetch_codes(format_, chunks, early[half], c + 1, begin, words)
                elif slot + 1 < slots:
                    cute.arch.mbarrier_wait(ring.full + after, after_phase)
                    for half in cutlass.range_constexpr(len(early)):
                        self.fetch_codes(format_, chunks, early[half], 0, next_begin, words)
                if const_expr(by_parts):
                    scales.store(following.load())
                    following.fill(0.0)
                    if slot + 1 < slots if c + 1 == groups else (slot * groups + c + 1) * GROUP < features:
                        self.fetch_scales(chunks, next_chunk, next_slot, following)
                    scales.store(scales.load() - following.load())
                warpgroup.wait_group(0)
                pin(partial)
                self.add_scaled(acc, sums, scales)
                for half in cutlass.range_constexpr(len(late)):
                    self.fetch_codes(format_, chunks, late[half], next_chunk, next_slot, words)
                for half in cutlass.range_constexpr(2):
                    self.decode_8bit(format_, words, half, registers[half])
            self.release(ring, stage, Boolean(True))
            if const_expr(by_parts):
                run_ends = (slot + 1) % (RUN // groups) == 0
                if run_ends:
                    self.add_scaled(acc, sums, following)
                    self.start_sums(acc, sums, following)
            stage, phase, begin = after, after_phase, next_begin
        return stage, phase, end

    @classmethod
    def start_sums(cls, acc: cute.Tensor, sums: cute.Tensor, scales: cute.Tensor) -> None:
        """Set the sums to MAGIC and take that, times their scale, from the total."""
        sums.fill(MAGIC)
        cls.add_scaled(acc, sums, [-scales[0], -scales[1]])

    @cute.jit
    def multiply_few(
        self,
        tile: cutlass.Constexpr,
        acc: cute.Tensor,
        ring: Ring,
        thread: Int32,
        slots: Int32,
        stage: Int32,
        phase: Int32,
        end: Int32,
    ) -> tuple[Int32, Int32, Int32]:
        """Main loop of split tiles, eight tokens, of weights decoded to bfloat16 or int8: every warp multiplies its 16
        rows with ``mma.sync``, which takes and gives the registers that ``wgmma`` does.

        What such a tile waits for is instructions. ``wgmma`` has no use for its own shape here, and wants a descriptor
        and its place in a pipeline for every 16 or 32 features; the ``mma.sync`` of fp8 is emulated.
        """
        bf16 = tile.format.operand == "bf16"
        chunks = self.chunk_parts(ring, tile, thread)
        rows = self.token_lane(ring, tile, thread)
        scratch = Scratch.make(tile.format)
        registers = cute.make_rmem_tensor((4, 4 if bf16 else 2), Int32)
        scales = cute.make_rmem_tensor((2,), Float32)
        sums = acc if bf16 else cute.make_rmem_tensor(acc.layout, Int32)
        for _ in cutlass.range(slots, unroll=1):
            begin = self.begin(tile, end)
            end = begin + tile.slot_units
            first = rows + begin * UNIT
            cute.arch.mbarrier_wait(ring.full + stage, phase)
            if const_expr(not bf16):
                self.fetch_scales(chunks, 0, begin, scales)
                sums.fill(MAGIC_BITS)
            for half in cutlass.range_constexpr(2):
                if const_expr(bf16):
                    self.decode_bf16(tile, chunks, scratch, registers, half, begin)
                else:
                    self.fetch_codes(tile.format, chunks, half, 0, begin, scratch.words)
                    self.decode_8bit(tile.format, scratch.words, half, registers)
                for b in cutlass.range_constexpr(cute.size(registers, mode=[1])):
                    if const_expr(b % 2 == 0):  # 64 of the 128 bytes of every token, in a circle
                        at = first + half * UNIT ^ 32 * b if const_expr(bf16) else first ^ 64 * half
                        tokens = load_matrices(at)
                    multiply_warp(bf16, sums, registers[None, b], tokens[b % 2 * 2], tokens[b % 2 * 2 + 1])
            self.release(ring, stage, Boolean(True))
            if const_expr(not bf16):
                for e in cutlass.range_constexpr(cute.size(acc)):
                    total = llvm.bitcast(T.f32(), sums[e].ir_value())
                    acc[e] = acc[e] + (Float32(total) - MAGIC) * scales[e // 2 % 2]
            stage, phase = self.advance(stage, phase)
        return stage, phase, end

    def token_lane(self, ring: Ring, tile: Tile, thread: Int32) -> Int32:
        """Where a lane's row of the first four matrices, 8 tokens x 16 bytes each, of a slot at unit 0 starts: 16-byte
        steps of a row are swizzled with the token."""
        lane = thread & 31
        token = lane & 7
        return (ring.base + tile.token_offset).toint() + token * ROW_BYTES + ((lane >> 3) ^ token) * 16

    @staticmethod
    def fetch_codes(format_: Format, chunks: Chunks, half: int, chunk: int, begin: Int32, words: cute.Tensor) -> None:
        """The thread's words of half a chunk."""
        first = 0
        for load, view in zip(format_.loads, chunks.codes, strict=True):
            if load.half == half:
                target = cute.make_tensor(words.iterator + first, cute.make_layout(load.words))
                cute.autovec_copy(view[None, chunk, begin], target)
            first += load.words

    @staticmethod
    def fetch_scales(chunks: Chunks, chunk: int, begin: Int32, scales: cute.Tensor) -> None:
        """Scales of a chunk for the thread's two rows."""
        pair = chunks.numbers[0, chunk, begin]
        for r in range(2):
            scales[r] = bf16_value(pair, r)

    @staticmethod
    def decode_8bit(format_: Format, words: cute.Tensor, half: int, registers: cute.Tensor) -> None:
        """Half of a chunk, two k32 blocks, to the fragment ``registers``."""
        for b in range(2):
            decoded = format_.decode(words, 2 * half + b, None)
            for r in range(4):
                registers[r, b] = decoded[r]

    @staticmethod
    def add_scaled(acc: cute.Tensor, sums: cute.Tensor, scales: Any) -> None:
        """acc += sums * (scale of the thread's first or second row); ``scales``: one for each."""
        for e in range(cute.size(acc)):
            acc[e] = acc[e] + sums[e] * scales[e // 2 % 2]
