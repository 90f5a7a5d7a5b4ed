"""MXFP4 weights for bfloat16 activations: e2m1 codes and an e8m0 scale per 32 features (OCP Microscaling Formats v1.0).

A code is a sign s and a magnitude m of two exponent bits and one of mantissa. With s in bit 15 of a bfloat16 and m in
bits 8..6, all others zero, that is the code's value times 2**-126, subnormal numbers included. So a mask makes a number
of a code and one multiplication with scale * 2**(126 - `SHRINK`) a weight, exactly.

A word is a block (register, as `layouts` numbers them); element 1 is 16 bits further left:

    bit    15  14  13  12  11..9 8..6 5..3 2..0
    code   s0  s3  s2  s1   m3    m0   m1   m2
"""

from typing import TYPE_CHECKING, Any

from mxmoe_steps.kernels import ptx
from mxmoe_steps.kernels.codes.affine import MINUS_ZERO, SHRINK
from mxmoe_steps.kernels.codes.format import GROUP, Field, Format, Load
from mxmoe_steps.schemes import Scheme

if TYPE_CHECKING:
    import torch

    from mxmoe_steps.quantizers.grid import QuantizedWeight

MAGNITUDES, SIGNS = (6, 3, 0, 9), (15, 12, 13, 14)  # lowest bits, by register
SIGN, MAGNITUDE = 0x80008000, 0x01C001C0  # of both elements, where they belong
RAISE = 126 - SHRINK  # what is added to the exponent of a scale


class W4A16Mxfp4(Format):
    """3.75 instructions a register, and half a one to make factors.

    Numbers of a row: the exponents of its four scales in a chunk, a byte each, as those of bfloat16 factors.
    Terms: the factors of the first row's two groups in half a chunk, then those of the second row's.
    """

    bits = 4
    element = "mxfp4"
    group = 32
    loads = (Load(4, 0), Load(4, 1))
    row_numbers = 2
    term_halves = (0, 1)
    growth = 2.0**SHRINK
    scale_limit = 2.0 ** (128 - RAISE)  # a larger one's factor is infinite

    def fields(self, block: Any, register: Any, element: Any) -> list[Field]:
        """Magnitudes, then signs."""
        import torch

        magnitude, sign = (torch.tensor(lowest, device=register.device)[register] for lowest in (MAGNITUDES, SIGNS))
        return [Field(0, 3, block, 16 * element + magnitude), Field(3, 1, block, 16 * element + sign)]

    def numbers(self, weight: "QuantizedWeight") -> "torch.Tensor":
        """Bytes 0 and 1 are the first number."""
        import torch

        from mxmoe_steps.quantizers.grid import to_e8m0

        exponents = to_e8m0(weight.scales) + RAISE
        groups = -weight.codes.shape[-1] % GROUP // self.group
        return torch.nn.functional.pad(exponents, (0, groups)).view(torch.int16).unflatten(-1, (-1, self.row_numbers))

    def scales(self, numbers: "torch.Tensor", scheme: Scheme) -> tuple["torch.Tensor", "torch.Tensor | None"]:
        """Inverse of `numbers`."""
        import torch

        from mxmoe_steps.quantizers.grid import from_e8m0

        return from_e8m0(numbers.contiguous().view(torch.uint8).flatten(-2) - RAISE), None

    def operands(self, weight: "QuantizedWeight") -> "torch.Tensor":
        """Exact."""
        return weight.dequantize().double() / self.growth

    def terms(self, numbers: list[Any], half: int) -> list[Any]:
        """A byte to the exponents of both elements."""
        pairs = [
            ptx.compute(f"prmt.b32 {{$w0}}, {{$r0}}, 0, {0x4040 + 0x101 * byte:#x};", numbers[half])
            for byte in range(4)
        ]
        return [ptx.right(pair, -7) for pair in pairs]

    def decode(self, words: Any, block: int, terms: Any) -> list[Any]:
        """Signs and magnitudes of registers 0 and 1 are moved together, those of 2 and 3 apart."""
        word = words[block]
        masked = [
            [(word, SIGN | MAGNITUDE)],
            [(ptx.right(word, -3), SIGN | MAGNITUDE)],
            [(ptx.right(word, -6), MAGNITUDE), (ptx.right(word, -2), SIGN)],
            [(ptx.right(word, 3), MAGNITUDE), (ptx.right(word, -1), SIGN)],
        ]
        group = block % 4 // 2
        product = f"{MINUS_ZERO} fma.rn.bf16x2 {{$w0}}, t, {{$r0}}, n;"
        return [ptx.either(masked[register], product, terms[2 * (register % 2) + group]) for register in range(4)]
