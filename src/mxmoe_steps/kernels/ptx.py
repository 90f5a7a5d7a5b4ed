"""A few instructions of inline PTX that make one register.

Text only: the compiler is imported where a register is made. So tests interpret what ships, and what describes codes
needs no compiler.
"""

from typing import Any


def compute(text: str, *arguments: Any) -> Any:
    """One Int32 from ``text``, which names its result {$w0} and its arguments {$r0}, {$r1}, ..."""
    from cutlass import Int32, cute

    return cute.arch.inline_ptx("{ " + text + " }", write_only_types=[Int32], read_only_args=list(arguments))


def right(word: Any, places: int) -> Any:
    """``word`` shifted right, or left by negative ``places``."""
    if places == 0:
        return word
    shift = f"shr.u32 {{$w0}}, {{$r0}}, {places};" if places > 0 else f"shl.b32 {{$w0}}, {{$r0}}, {-places};"
    return compute(shift, word)


def either(masked: list[tuple[Any, int]], then: str, *arguments: Any) -> Any:
    """``then`` with t = (word & mask) | (word & mask) | ..., and ``arguments`` as {$r0}, {$r1}, ..."""
    count = len(arguments)
    text = f".reg .b32 t; and.b32 t, {{$r{count}}}, {masked[0][1]:#x}; "
    for place, (_, mask) in enumerate(masked[1:], count + 1):
        text += f"lop3.b32 t, {{$r{place}}}, {mask:#x}, t, 0xEA; "
    return compute(text + then, *arguments, *(word for word, _ in masked))


def opaque(word: Any) -> Any:
    """The same word, unknown to the compiler: what is derived from it is computed here, neither earlier nor in another
    form. Emits no instruction."""
    from cutlass import Int32
    from cutlass._mlir.dialects import llvm
    from cutlass.cutlass_dsl import T

    return Int32(llvm.inline_asm(T.i32(), [word.ir_value()], "", "=r,0", has_side_effects=True))
