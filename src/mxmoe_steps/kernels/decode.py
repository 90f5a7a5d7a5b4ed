"""From packed codes to tensor-core operands in registers, a few instructions a register (CuTe DSL).

Functions take 32-bit words in the order that `layouts` draws and return 32-bit registers of a ``wgmma`` A fragment. A
code in the low eight bits of a bfloat16 whose other bits are zero is a number of code * 2**-133 * 2**(lowest bit):
subnormal numbers and the first binade of normal ones lie equally far apart. So a mask makes a number of a code, and
one fused multiply-add a weight of the number, rounded once.
"""

from dataclasses import dataclass

from cutlass import Float32, Int32, cute

from mxmoe_steps.kernels.formats import SHRINK


def _ptx(text: str, *arguments: Int32) -> Int32:
    """One register from ``text``, which names its result {$w0} and its arguments {$r0}, {$r1}, ..."""
    return cute.arch.inline_ptx("{ " + text + " }", write_only_types=[Int32], read_only_args=list(arguments))


GROW = {8: 64.0} | dict.fromkeys((4, 3, 2), 2.0**SHRINK)  # what sums of decoded bf16 weights lack, by bits
LOWEST_BIT = {4: (0, 4, 0, 4), 3: (0, 2, 4, 4), 2: (0, 2, 4, 6)}  # of the code of a register 0..3 when it is masked


@dataclass(frozen=True)
class Affine:
    """What turns codes of one row and group into weights, as bfloat16 pairs.

    ``factors``: scale * 2**(133 - `SHRINK` - lowest bit) for the row's two registers of a block; ``offset``: -zero *
    scale * 2**-`SHRINK`.
    """

    factors: tuple[Int32, Int32]
    offset: Int32


def affine(bits: int, row: int, scales: Int32, zeros: Int32 | None) -> Affine:
    """From the scales of the thread's two rows and, for asymmetric formats, their zero points times -2**-`SHRINK`, a
    bfloat16 pair each; without, the zero point is the middle code.

    ``row``: 0 or 1, the one to take. Powers of two are added to the exponent of the scale; a scale of zero leaves
    numbers below 2**-120 of codes.
    """
    both = f"prmt.b32 {{$w0}}, {{$r0}}, {{$r0}}, {(0x1010, 0x3232)[row]:#x};"
    pair = _ptx(both, scales)
    first, second = (pair + (133 - SHRINK - LOWEST_BIT[bits][register] << 7) * 0x10001 for register in (row, row + 2))
    if zeros is None:
        shrunk = (0x8000 | 127 + bits - 1 - SHRINK << 7) * 0x10001  # -(2**(bits - 1)) * 2**-SHRINK
        offset = _ptx(f".reg .b32 m; mov.b32 m, {shrunk:#x}; mul.rn.bf16x2 {{$w0}}, {{$r0}}, m;", pair)
    else:
        offset = _ptx("mul.rn.bf16x2 {$w0}, {$r0}, {$r1};", pair, _ptx(both, zeros))
    return Affine((first, second), offset)


def _right(word: Int32, places: int) -> Int32:
    """``word`` shifted right, or left by negative ``places``."""
    if places == 0:
        return word
    shift = f"shr.u32 {{$w0}}, {{$r0}}, {places};" if places > 0 else f"shl.b32 {{$w0}}, {{$r0}}, {-places};"
    return _ptx(shift, word)


def _weights(bits: int, register: int, low: Int32, rows: list[Affine], third: Int32 | None = None) -> Int32:
    """The weights of ``register`` from a word with its bits where they belong, or one with the low two and one with the
    third bits."""
    lowest, row = LOWEST_BIT[bits][register], rows[register % 2]
    mask = ((3 if bits == 3 else 2**bits - 1) << lowest) * 0x10001
    text, arguments = f".reg .b32 t; and.b32 t, {{$r2}}, {mask:#x}; ", [row.factors[register // 2], row.offset, low]
    if third is not None:
        text += f"lop3.b32 t, {{$r3}}, {(4 << lowest) * 0x10001:#x}, t, 0xEA; "
        arguments.append(third)
    return _ptx(text + "fma.rn.bf16x2 {$w0}, t, {$r0}, {$r1};", *arguments)


def bf16_from_4bit(word: Int32, rows: list[Affine]) -> list[Int32]:
    """Registers 0..3 of the word's block."""
    halves = (word, _right(word, 8))
    return [_weights(4, register, halves[register // 2], rows) for register in range(4)]


def bf16_from_2bit(word: Int32, block: int, rows: list[Affine]) -> list[Int32]:
    """Registers 0..3 of k16 block ``block`` (only its parity counts)."""
    low = _right(word, 8 * (block % 2))
    return [_weights(2, register, low, rows) for register in range(4)]


def bf16_from_3bit(low: Int32, high: Int32, block: int, rows: list[Affine]) -> list[Int32]:
    """As `bf16_from_2bit`, with the third bits from word ``high``."""
    low = _right(low, 8 * (block % 2))
    lows = (low, low, low, _right(low, 2))
    third = _right(high, (0, 1, 8, 9)[block % 4])
    thirds = (third, third, third, _right(high, (2, 3, -6, -5)[block % 4]))
    return [_weights(3, register, lows[register], rows, thirds[register]) for register in range(4)]


def bf16_from_8bit(words: tuple[Int32, Int32]) -> list[Int32]:
    """Registers 0..3 of a block of two words of bytes: exact (byte - 128) / 64."""
    constants = ".reg .b32 t, f, o; mov.b32 f, 0x7F007F00; mov.b32 o, 0xC000C000; "  # 2**127, -2
    parity = ("and.b32 t, {$r0}, 0x00FF00FF; ", "prmt.b32 t, {$r0}, 0, 0x4341; ")
    return [
        _ptx(constants + parity[register % 2] + "fma.rn.bf16x2 {$w0}, t, f, o;", words[register // 2])
        for register in range(4)
    ]


def fp8_from_4bit(word: Int32, register: int) -> Int32:
    """e4m3 elements of ``register`` (its parity counts): exact code * 2**-9, see `layouts`."""
    source = "shf.r.wrap.b32 w, {$r0}, {$r0}, 4; " if register % 2 else "mov.b32 w, {$r0}; "
    return _ptx(
        f".reg .b32 w, t, s; {source}and.b32 t, w, 0x87878787; and.b32 s, w, 0x80808080; shr.u32 s, s, 7; "
        "add.u32 {$w0}, t, s;",
        word,
    )


def int8_from_4bit(word: Int32, register: int) -> Int32:
    """int8 elements of ``register`` (its parity counts): the codes, see `layouts`."""
    source = "shf.r.wrap.b32 w, {$r0}, {$r0}, 4; " if register % 2 else "mov.b32 w, {$r0}; "
    return _ptx(
        f".reg .b32 w, s; {source}prmt.b32 s, w, w, 0xBA98; "  # the sign of each byte, eight times
        "lop3.b32 {$w0}, w, s, 0x07070707, 0xE4;",
        word,
    )


def bf16_value(pair: Int32, place: int) -> Float32:
    """The float32 of the low (``place`` 0) or high one of two bfloat16 bit patterns."""
    high = ("shl.b32 t, {$r0}, 16;", "and.b32 t, {$r0}, 0xFFFF0000;")[place]
    return cute.arch.inline_ptx(
        "{ .reg .b32 t; " + high + " mov.b32 {$w0}, t; }", write_only_types=[Float32], read_only_args=[pair]
    )
