"""2-bit integers for bfloat16 activations; 1-bit ones are stored as these.

A word is two blocks (register.element, as `layouts` numbers them; primes mark the second block):

    bit   31..30 ..28 ..26 ..24 ..22 ..20 ..18 ..16 | ..14 ..12 ..10 .. 8 .. 6 .. 4 .. 2 .. 0
    code   3'.1  2'.1 1'.1 0'.1 3.1  2.1  1.1  0.1  | 3'.0 2'.0 1'.0 0'.0 3.0  2.0  1.0  0.0
"""

from typing import Any

from mxmoe_steps.kernels import ptx
from mxmoe_steps.kernels.codes.affine import AffineFormat
from mxmoe_steps.kernels.codes.format import Field, Load


def low_two_bits(block: Any, register: Any, element: Any) -> Field:
    """As the diagram draws them."""
    return Field(0, 2, block // 2, 16 * element + 8 * (block % 2) + 2 * register)


class W2A16(AffineFormat):
    """2.1 instructions a register: a mask, a multiply-add, and a shift for every second block."""

    bits = 2
    loads = (Load(4, 0),)
    lowest = (0, 2, 4, 6)

    def fields(self, block: Any, register: Any, element: Any) -> list[Field]:
        """A word for two blocks."""
        return [low_two_bits(block, register, element)]

    def decode(self, words: Any, block: int, terms: Any) -> list[Any]:
        """Of the second block from the word shifted by 8."""
        low = ptx.right(words[block // 2], 8 * (block % 2))
        return [self.weights(register, terms, (low, 0b11)) for register in range(4)]
