"""3-bit integers for bfloat16 activations.

Words 0..3 hold the low two bits, as `w2a16` draws them. Words 4 and 5 hold the third bits of four blocks each, that of
element i of a register at 16 i and

    register       0    1    2    3
    block 0        2    4    6    8
    block 1        3    5    7    9
    block 2       10   12   14    0
    block 3       11   13   15    1

which a shift that blocks share brings above the low two bits, for all registers but 3.
"""

from typing import Any

from mxmoe_steps.kernels import ptx
from mxmoe_steps.kernels.codes.affine import AffineFormat
from mxmoe_steps.kernels.codes.format import Field, Load
from mxmoe_steps.kernels.codes.w2a16 import low_two_bits

THIRD_BITS = ((2, 4, 6, 8), (3, 5, 7, 9), (10, 12, 14, 0), (11, 13, 15, 1))  # by block and register


class W3A16(AffineFormat):
    """3.9 instructions a register."""

    bits = 3
    loads = (Load(4, 0), Load(2, 0))
    lowest = (0, 2, 4, 4)

    def fields(self, block: Any, register: Any, element: Any) -> list[Field]:
        """The low two bits, then the third."""
        import torch

        third = torch.tensor(THIRD_BITS, device=block.device)[block % 4, register]
        return [low_two_bits(block, register, element), Field(2, 1, 4 + block // 4, 16 * element + third)]

    def decode(self, words: Any, block: int, terms: Any) -> list[Any]:
        """Both words shifted to where the bits of registers 0..2 belong, and once more for those of register 3."""
        high = words[4 + block // 4]
        low = ptx.right(words[block // 2], 8 * (block % 2))
        lows = (low, low, low, ptx.right(low, 2))
        third = ptx.right(high, (0, 1, 8, 9)[block % 4])
        thirds = (third, third, third, ptx.right(high, (2, 3, -6, -5)[block % 4]))
        return [
            self.weights(register, terms, (lows[register], 0b11), (thirds[register], 0b100)) for register in range(4)
        ]
