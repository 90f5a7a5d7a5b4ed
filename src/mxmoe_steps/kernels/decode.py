"""From packed codes to tensor-core operands in registers, a few instructions a register (CuTe DSL).

Every function takes 32-bit words in the order that `layouts` draws and returns one 32-bit register of a
``wgmma`` A fragment. bfloat16 127 + 1 = 128.0 is 0x4300, and its last mantissa bit is worth 1: or-ing a
code of up to 7 bits into it gives 128 + code exactly, so one subtraction recovers the code.
"""

from dataclasses import dataclass

from cutlass import Float32, Int32, Uint16, cute


def _ptx(text: str, *arguments: Int32) -> Int32:
    """One register from ``text``, which names its result {$w0} and its arguments {$r0}, {$r1}, ..."""
    return cute.arch.inline_ptx("{ " + text + " }", write_only_types=[Int32], read_only_args=list(arguments))


@dataclass(frozen=True)
class Affine:
    """Scale and zero point of one row and group, as bfloat16 pairs in registers.

    ``magic_zero`` is 128 + zero rounded to bfloat16, which is to an integer, and ``offset`` is (that integer -
    zero) * scale: taking away the integer is exact, so the rest, and its rounding, are small. A fixed zero in the
    middle of the codes has neither.
    """

    scale: Int32
    magic_zero: Int32 | None = None
    offset: Int32 | None = None

    @property
    def registers(self) -> list[Int32]:
        """The arguments of the assembly that `apply` writes."""
        return [register for register in (self.scale, self.magic_zero, self.offset) if register is not None]

    def apply(self, bits: int, first: int) -> str:
        """Turns 128 + code in ``t`` into the weight; arguments are numbered from ``first``."""
        if self.magic_zero is None:
            minus = 0xC300 | 2 ** (bits - 1)  # -(128 + middle of the codes); the constant needs a register
            return (
                f"mov.b32 m, {minus << 16 | minus:#x}; add.rn.bf16x2 t, t, m; mul.rn.bf16x2 {{$w0}}, t, {{$r{first}}};"
            )
        return f"sub.rn.bf16x2 t, t, {{$r{first + 1}}}; fma.rn.bf16x2 {{$w0}}, t, {{$r{first}}}, {{$r{first + 2}}};"


def affine(scale: Uint16, zero: Uint16 | None) -> Affine:
    """From the bfloat16 bits of a scale and, for asymmetric formats, of a zero point."""
    pair = Int32(scale) * 0x10001
    if zero is None:
        return Affine(pair)
    zeros = Int32(zero) * 0x10001
    magic = _ptx(".reg .b32 m; mov.b32 m, 0x43004300; add.rn.bf16x2 {$w0}, {$r0}, m;", zeros)
    offset = _ptx(
        ".reg .b32 t, m; mov.b32 m, 0x43004300; sub.rn.bf16x2 t, {$r0}, m; sub.rn.bf16x2 t, t, {$r1}; "
        "mul.rn.bf16x2 {$w0}, t, {$r2};",
        magic,
        zeros,
        pair,
    )
    return Affine(pair, magic, offset)


def bf16_from_4bit(word: Int32, register: int, row: Affine) -> Int32:
    """Elements of ``register`` (0..3) of the word's block."""
    return _ptx(
        f".reg .b32 t, m; shr.u32 t, {{$r0}}, {4 * register}; lop3.b32 t, t, 0x000F000F, 0x43004300, 0xEA; "
        + row.apply(4, 1),
        word,
        *row.registers,
    )


def bf16_from_2bit(word: Int32, block: int, register: int, row: Affine) -> Int32:
    """Elements of ``register`` of k16 block ``block`` (only its parity counts)."""
    return _ptx(
        f".reg .b32 t, m; shr.u32 t, {{$r0}}, {8 * (block % 2) + 2 * register}; "
        "lop3.b32 t, t, 0x00030003, 0x43004300, 0xEA; " + row.apply(2, 1),
        word,
        *row.registers,
    )


def bf16_from_3bit(low: Int32, high: Int32, block: int, register: int, row: Affine) -> Int32:
    """As `bf16_from_2bit`, with the third bit from word ``high``."""
    bit = 4 * (block % 4) + register
    third = f"shr.u32 h, {{$r1}}, {bit - 2}; " if bit >= 2 else f"shl.b32 h, {{$r1}}, {2 - bit}; "
    return _ptx(
        f".reg .b32 t, h, m; shr.u32 t, {{$r0}}, {8 * (block % 2) + 2 * register}; "
        "lop3.b32 t, t, 0x00030003, 0x43004300, 0xEA; "
        + third
        + "lop3.b32 t, h, 0x00040004, t, 0xEA; "
        + row.apply(3, 2),
        low,
        high,
        *row.registers,
    )


def bf16_from_8bit(word: Int32, register: int) -> Int32:
    """Elements of ``register`` (its parity counts) of a word of two's complement bytes; exact, unscaled.

    The low seven bits make 128 + low; the sign bit is the last exponent bit of 128.0, so or-ing it into
    the subtrahend makes it 256.0.
    """
    shift = f"shr.u32 t, {{$r0}}, {8 * (register % 2)}; " if register % 2 else "mov.b32 t, {$r0}; "
    return _ptx(
        ".reg .b32 t, m; "
        + shift
        + "lop3.b32 m, t, 0x00800080, 0x43004300, 0xEA; lop3.b32 t, t, 0x007F007F, 0x43004300, 0xEA; "
        + "sub.rn.bf16x2 {$w0}, t, m;",
        word,
    )


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


def bf16_value(bits: Uint16) -> Float32:
    """The float32 of a bfloat16 bit pattern."""
    return cute.arch.inline_ptx(
        "{ .reg .b32 t; shl.b32 t, {$r0}, 16; mov.b32 {$w0}, t; }",
        write_only_types=[Float32],
        read_only_args=[Int32(bits)],
    )
