"""The main loop of a few tokens: ``mma.sync``, a warp at a time (CuTe DSL)."""

import cutlass
from cutlass import Boolean, Float32, Int32, const_expr, cute
from cutlass._mlir.dialects import llvm
from cutlass.cutlass_dsl import T

from mxmoe_steps.kernels.sm90.config import ROW_BYTES, UNIT
from mxmoe_steps.kernels.sm90.main_loops import MAGIC, MainLoop
from mxmoe_steps.kernels.sm90.registers import Scratch, decode_bf16, decode_half, fetch_codes, fetch_scales, row_of
from mxmoe_steps.kernels.sm90.ring import Position

MAGIC_BITS = 0x4B400000  # of that float32


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
    sums = cute.arch.inline_ptx(
        f"mma.sync.aligned.{kind} {{{{$w0}}, {{$w1}}, {{$w2}}, {{$w3}}}}, {{{{$r0}}, {{$r1}}, {{$r2}}, {{$r3}}}}, "
        "{{$r4}, {$r5}}, {{$r6}, {$r7}, {$r8}, {$r9}};",
        write_only_types=[Float32 if bf16 else Int32] * 4,
        read_only_args=[*(weights[i] for i in range(4)), low, high, *(acc[i] for i in range(4))],
    )
    for i in range(4):
        acc[i] = sums[i]


class WarpLoop(MainLoop):
    """Split tiles, eight tokens, of weights decoded to bfloat16 or int8: every warp multiplies its 16 rows with
    ``mma.sync``, which takes and gives the registers that ``wgmma`` does.

    What such a tile waits for is instructions. ``wgmma`` has no use for its own shape here, and wants a descriptor and
    its place in a pipeline for every 16 or 32 features; the ``mma.sync`` of fp8 is emulated.
    """

    @cute.jit
    def run(self, acc: cute.Tensor, position: Position) -> Position:
        """As `MainLoop.run`."""
        tile, ring, format_ = self.tile, self.ring, self.tile.format
        bf16 = format_.operand == "bf16"
        chunks = ring.chunks(tile, self.thread)
        rows = self.token_address()
        scratch = Scratch.make(format_)
        registers = cute.make_rmem_tensor((4, 4 if bf16 else 2), Int32)
        scales = cute.make_rmem_tensor((2,), Float32)
        sums = acc if bf16 else cute.make_rmem_tensor(acc.layout, Int32)
        for _ in cutlass.range(self.slots, unroll=1):
            begin = ring.begin(tile, position.end)
            first = rows + begin * UNIT
            ring.wait_full(position)
            if const_expr(not bf16):
                fetch_scales(chunks, 0, begin, scales)
                sums.fill(MAGIC_BITS)
            for half in cutlass.range_constexpr(2):
                if const_expr(bf16):
                    decode_bf16(format_, chunks, scratch, registers, half, begin)
                else:
                    fetch_codes(format_, chunks, half, 0, begin, scratch.words)
                    decode_half(format_, scratch.words, half, registers)
                for b in cutlass.range_constexpr(cute.size(registers, mode=[1])):
                    if const_expr(b % 2 == 0):  # 64 of the 128 bytes of every token, in a circle
                        at = first + half * UNIT ^ 32 * b if const_expr(bf16) else first ^ 64 * half
                        tokens = load_matrices(at)
                    multiply_warp(bf16, sums, registers[None, b], tokens[b % 2 * 2], tokens[b % 2 * 2 + 1])
            ring.release(position.stage, Boolean(True))
            if const_expr(not bf16):
                for e in cutlass.range_constexpr(cute.size(acc)):
                    total = llvm.bitcast(T.f32(), sums[e].ir_value())
                    acc[e] = acc[e] + (Float32(total) - MAGIC) * scales[row_of(e)]
            position = ring.after(tile, begin, position)
        return position

    def token_address(self) -> Int32:
        """Where a lane's row of the first four matrices, 8 tokens x 16 bytes each, of a slot at unit 0 starts: 16-byte
        steps of a row are swizzled with the token."""
        lane = self.thread & 31
        token = lane & 7
        slot = (self.ring.base + self.tile.token_offset).toint()
        return slot + token * ROW_BYTES + ((lane >> 3) ^ token) * 16
