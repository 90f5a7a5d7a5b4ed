"""6-bit integers for bfloat16 activations.

Three words are two blocks (register.element, as `layouts` numbers them; primes mark the second block). Six codes of
sixteen bits lie whole, each in a byte; two are split, into the two spare bits of each byte. Element 1 is 16 bits
further left:

    bit      15..14      13..8    7..6       5..0            bit      15..10  9..8      7..2   1..0
    word 0   3'.0 (5,4)   1.0     2'.0 (5,4)  0.0            word 1    3.0    3'.0 (1,0) 2.0   2'.0 (1,0)
    word 2   3'.0 (3,2)   1'.0    2'.0 (3,2)  0'.0

So a mask takes a whole code, after a shift by 8 for every second one, and three masks gather two split ones.
"""

from typing import Any

from mxmoe_steps.kernels import ptx
from mxmoe_steps.kernels.codes.affine import AffineFormat
from mxmoe_steps.kernels.codes.format import Field, Load

CODE = 0x3F


class W6A16(AffineFormat):
    """3.1 instructions a register."""

    bits = 6
    loads = (Load(4, 0), Load(2, 0), Load(4, 1), Load(2, 1))
    lowest = (0, 0, 2, 2)

    def fields(self, block: Any, register: Any, element: Any) -> list[Field]:
        """Two bits at a time."""
        import torch

        second, late = block % 2, register // 2  # registers 2 and 3 are lowered by their two zeros
        split = (second * late).bool()
        byte = 16 * element + 8 * (register % 2)
        fields = []
        for low, word, shift in ((0, 1, 0), (2, 2, 6), (4, 0, 6)):  # of split codes
            place = torch.where(split, word, 2 * second + late)
            within = torch.where(split, shift, low + 2 * late)
            fields.append(Field(low, 2, 3 * (block // 2) + place, byte + within))
        return fields

    def decode(self, words: Any, block: int, terms: Any) -> list[Any]:
        """Registers 1 and 3 from words shifted by 8."""
        first, second, third = (words[3 * (block // 2) + word] for word in range(3))
        if block % 2 == 0:
            low, high = first, second
        else:
            gathered = [(first, 0xC0C0C0C0), (ptx.right(third, 2), 0x30303030), (ptx.right(second, -2), 0x0C0C0C0C)]
            low, high = third, ptx.either(gathered, "mov.b32 {$w0}, t;")
        sources = (low, ptx.right(low, 8), high, ptx.right(high, 8))
        return [self.weights(register, terms, (sources[register], CODE)) for register in range(4)]
