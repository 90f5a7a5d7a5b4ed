"""Fragments of ``mma.sync`` and where their elements lie in shared memory (CuTe DSL).

Rows of 128 bytes lie in blocks, 16-byte chunk c of row r at ``128 r + 16 (c ^ r % 8)``, so that neither copies nor
``ldmatrix`` meet in a bank. An instruction multiplies 32 bytes of every row, two chunks, whatever the type: 16
bfloat16, 32 int8 or e4m3, 64 int4. Fragments of 16 weight rows (A) and 8 tokens (B), lane l, words of four bytes w of
a chunk:

    A  word 0: row l / 4, w = l % 4      1: row + 8     2, 3: the same of the next chunk
    B  word 0: token l / 4, w = l % 4    1: the next chunk
    sums 0, 1: row l / 4, tokens 2 (l % 4), + 1         2, 3: row + 8

``ldmatrix`` fetches four 8 x 16 byte matrices. Its lanes 8 i to 8 i + 7 give the addresses of the rows of matrix i.
Functions of offsets take integers, too: tests emulate what they address.
"""

from typing import Any

from cutlass import Float32, Int32, cute

from mxmoe_steps.kernels.mma.config import STEP_BYTES
from mxmoe_steps.kernels.sm90.config import ROW_BYTES

CHUNK_BYTES = 16
STEPS = ROW_BYTES // STEP_BYTES  # instructions that a block of rows takes
LANES = ROW_BYTES // CHUNK_BYTES  # that copy a row
ROWS_AT_ONCE = 32 // LANES

INSTRUCTIONS = {
    "bf16": "m16n8k16.row.col.f32.bf16.bf16.f32",
    "fp8": "m16n8k32.row.col.f32.e4m3.e4m3.f32",
    "int8": "m16n8k32.row.col.s32.s8.s8.s32",
    "int4": "m16n8k64.row.col.s32.s4.s4.s32",
}


def stored_offset(row: Any, chunk: Any) -> Any:
    """Byte of a block where a 16-byte chunk of a row is stored."""
    return row * ROW_BYTES + ((chunk ^ (row & 7)) * CHUNK_BYTES)


def copied(lane: Any) -> tuple[Any, Any]:
    """Row and chunk that ``lane`` copies first; `ROWS_AT_ONCE` rows are copied at a time."""
    return lane >> (LANES.bit_length() - 1), lane & (LANES - 1)


def copied_offset(lane: Any, step: int) -> Any:
    """Byte of a block where the ``step``-th chunk that ``lane`` copies is stored: every second one four rows on."""
    return (stored_offset(*copied(lane)) ^ step % 2 * ROWS_AT_ONCE * CHUNK_BYTES) + step * ROWS_AT_ONCE * ROW_BYTES


def weight_offset(lane: Any) -> Any:
    """Byte of a block whose address ``lane`` gives to fetch the A fragment of its first 16 rows and 32 bytes; those of
    step s lie at ``offset ^ STEP_BYTES * s``."""
    return stored_offset(lane & 15, lane >> 4)


def token_offset(lane: Any) -> Any:
    """The same for the B fragments of 16 tokens: words 0, 1 of tokens 0 to 7, then of tokens 8 to 15."""
    return stored_offset((lane >> 4) * 8 + (lane & 7), lane >> 3 & 1)


def load_matrices(address: Int32, count: int = 4) -> list[Int32]:
    """``count`` words of a fragment or two, 2 or 4."""
    names = ", ".join(f"{{$w{i}}}" for i in range(count))
    words = cute.arch.inline_ptx(
        f"ldmatrix.sync.aligned.m8n8.x{count}.shared.b16 {{{names}}}, [{{$r0}}];",
        write_only_types=[Int32] * count,
        read_only_args=[address],
    )
    return list(words)


def multiply(operand: str, sums: cute.Tensor, weights: Any, tokens: Any, start: Any = None) -> None:
    """``sums`` [4] += weights [4 words] . tokens [2 words]; from ``start`` on, a number, if there is one."""
    kind = Float32 if operand in ("bf16", "fp8") else Int32
    before = [sums[i] if start is None else start for i in range(4)]
    made = cute.arch.inline_ptx(
        f"mma.sync.aligned.{INSTRUCTIONS[operand]} {{{{$w0}}, {{$w1}}, {{$w2}}, {{$w3}}}}, "
        "{{$r0}, {$r1}, {$r2}, {$r3}}, {{$r4}, {$r5}}, {{$r6}, {$r7}, {$r8}, {$r9}};",
        write_only_types=[kind] * 4,
        read_only_args=[*(weights[i] for i in range(4)), tokens[0], tokens[1], *before],
    )
    for i in range(4):
        sums[i] = made[i]


def transpose(word: Int32) -> Int32:
    """An 8 x 8 matrix of 16-bit elements, two neighbours of row l / 4 in lane l, the other way round."""
    return cute.arch.inline_ptx(
        "movmatrix.sync.aligned.m8n8.trans.b16 {$w0}, {$r0};", write_only_types=[Int32], read_only_args=[word]
    )
