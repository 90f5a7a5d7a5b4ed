"""4-bit integers for int8 activations, and what they share with those for e4m3 activations (`w4a8_fp8`).

A word is two registers of a block (register.element, as `layouts` numbers them; word 1 has registers 2 and 3):

    bit   31..28 27..24 23..20 19..16 15..12 11..8  7..4   3..0
    code   1.3    0.3    1.2    0.2    1.1    0.1   1.0    0.0

but the highest bit of every code, its sign, is stored four places further left, in a circle: so it is in its operand's
sign bit, for odd registers after the word is turned right by four. Codes are two's complement of code - 8.
"""

from typing import TYPE_CHECKING, Any, ClassVar

from mxmoe_steps.kernels import ptx
from mxmoe_steps.kernels.codes.format import GROUP, Field, Format, Load
from mxmoe_steps.schemes import Scheme

if TYPE_CHECKING:
    import torch

    from mxmoe_steps.quantizers.grid import QuantizedWeight


class SignedFormat(Format):
    """4-bit codes with a sign, decoded to 8 bits; sums of a group are multiplied by its scale in float32.

    ``unit``: of operands; stored scales make up for it.
    """

    bits = 4
    group = GROUP
    loads = (Load(4, 0), Load(4, 1))
    row_numbers = 1
    unit: ClassVar[float] = 1.0

    def fields(self, block: Any, register: Any, element: Any) -> list[Field]:
        """Three bits, then the sign."""
        word, shift = 2 * block + register // 2, 8 * element + 4 * (register % 2)
        return [Field(0, 3, word, shift), Field(3, 1, word, (shift + 7) % 32)]

    def numbers(self, weight: "QuantizedWeight") -> "torch.Tensor":
        """The scale, bfloat16."""
        rows, features = weight.codes.shape
        scales = (weight.scales / self.unit).bfloat16()
        return scales.expand(rows, -(-features // GROUP)).unsqueeze(-1)

    def scales(self, numbers: "torch.Tensor", scheme: Scheme) -> tuple["torch.Tensor", "torch.Tensor | None"]:
        """Inverse of `numbers`."""
        import torch

        return numbers.view(torch.bfloat16)[..., 0] * self.unit, None

    def operands(self, weight: "QuantizedWeight") -> "torch.Tensor":
        """Without the scale."""
        return (weight.codes.double() - 8) * self.unit


def turned(register: int) -> str:
    """PTX: w is the word {$r0}, with the bits of ``register`` in the low half of every byte but for their signs."""
    return ".reg .b32 w; " + ("shf.r.wrap.b32 w, {$r0}, {$r0}, 4; " if register % 2 else "mov.b32 w, {$r0}; ")


class W4A8(SignedFormat):
    """The operand repeats the sign above the three low bits."""

    operand = "int8"

    def store(self, codes: "torch.Tensor", scheme: Scheme) -> "torch.Tensor":
        """Two's complement."""
        return codes ^ 8

    def restore(self, codes: "torch.Tensor", scheme: Scheme) -> "torch.Tensor":
        """Inverse of `store`."""
        return codes ^ 8

    def decode(self, words: Any, block: int, terms: Any) -> list[Any]:
        """The sign of each byte, eight times; then its low three bits."""
        text = ".reg .b32 s; prmt.b32 s, w, w, 0xBA98; lop3.b32 {$w0}, w, s, 0x07070707, 0xE4;"
        return [ptx.compute(turned(register) + text, words[2 * block + register // 2]) for register in range(4)]
