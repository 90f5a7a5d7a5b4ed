"""From the words of a chunk to operands in a thread's registers (CuTe DSL)."""

from dataclasses import dataclass
from typing import Any

import cutlass
from cutlass import Float32, Int32, const_expr, cute

from mxmoe_steps.kernels.codes.format import Format
from mxmoe_steps.kernels.sm90.ring import Chunks

MOST_TERMS = 6  # of `Format.terms`


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


def as_registers(fragment: cute.Tensor) -> cute.Tensor:
    """(register, k block) view of an A fragment."""
    blocks = cute.size(fragment, mode=[2])
    return cute.make_tensor(cute.recast_ptr(fragment.iterator, dtype=Int32), cute.make_layout((4, blocks)))


def fetch_codes(format_: Format, chunks: Chunks, half: int, chunk: int, begin: Int32, words: cute.Tensor) -> None:
    """The thread's words of half a chunk."""
    first = 0
    for load, view in zip(format_.loads, chunks.codes, strict=True):
        if load.half == half:
            target = cute.make_tensor(words.iterator + first, cute.make_layout(load.words))
            cute.autovec_copy(view[None, chunk, begin], target)
        first += load.words


@cute.jit
def decode_bf16(
    format_: cutlass.Constexpr,
    chunks: Chunks,
    scratch: Scratch,
    registers: cute.Tensor,
    step: cutlass.Constexpr,
    begin: Int32,
) -> None:
    """Half-chunk ``step`` of the slot at unit ``begin`` to the fragment ``registers``."""
    chunk, half = step // 2, step % 2
    fetch_codes(format_, chunks, half, chunk, begin, scratch.words)
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


def decode_half(format_: Format, words: cute.Tensor, half: int, registers: cute.Tensor) -> None:
    """Half of a chunk, two k32 blocks of 8-bit operands, to the fragment ``registers``."""
    for b in range(2):
        decoded = format_.decode(words, 2 * half + b, None)
        for r in range(4):
            registers[r, b] = decoded[r]


def bf16_value(pair: Int32, place: int) -> Float32:
    """The float32 of the low (``place`` 0) or high one of two bfloat16 bit patterns."""
    high = ("shl.b32 t, {$r0}, 16;", "and.b32 t, {$r0}, 0xFFFF0000;")[place]
    return cute.arch.inline_ptx(
        "{ .reg .b32 t; " + high + " mov.b32 {$w0}, t; }", write_only_types=[Float32], read_only_args=[pair]
    )


def fetch_scales(chunks: Chunks, chunk: int, begin: Int32, scales: cute.Tensor) -> None:
    """Scales of a chunk for the thread's two rows, of formats decoded to 8 bits."""
    pair = chunks.numbers[0, chunk, begin]
    for r in range(2):
        scales[r] = bf16_value(pair, r)


def row_of(element: int) -> int:
    """Which of the thread's two rows the accumulator ``element`` belongs to."""
    return element // 2 % 2


def add_scaled(acc: cute.Tensor, sums: cute.Tensor, scales: Any) -> None:
    """acc += sums * (scale of the thread's first or second row); ``scales``: one for each."""
    for e in range(cute.size(acc)):
        acc[e] = acc[e] + sums[e] * scales[row_of(e)]
