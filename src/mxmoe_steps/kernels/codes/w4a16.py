"""4-bit integers for bfloat16 activations.

A word is a block (register.element, as `layouts` numbers them):

    bit   31..28 27..24 23..20 19..16 15..12 11..8  7..4   3..0
    code   3.1    2.1    1.1    0.1    3.0    2.0   1.0    0.0
"""

from typing import Any

from mxmoe_steps.kernels import ptx
from mxmoe_steps.kernels.codes.affine import AffineFormat
from mxmoe_steps.kernels.codes.format import Field, Load


class W4A16(AffineFormat):
    """2.25 instructions a register: a mask, a multiply-add, and a shift for two of them."""

    bits = 4
    loads = (Load(4, 0), Load(4, 1))
    lowest = (0, 4, 0, 4)

    def fields(self, block: Any, register: Any, element: Any) -> list[Field]:
        """A word a block."""
        return [Field(0, 4, block, 16 * element + 4 * register)]

    def decode(self, words: Any, block: int, terms: Any) -> list[Any]:
        """Registers 2 and 3 from the word shifted by 8."""
        halves = (words[block], ptx.right(words[block], 8))
        return [self.weights(register, terms, (halves[register // 2], 0xF)) for register in range(4)]
