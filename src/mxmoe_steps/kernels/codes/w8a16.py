"""8-bit integers for bfloat16 activations, a scale per row.

A word holds two registers of a block (register.element, as `layouts` numbers them):

    bit     31..24  23..16  15..8   7..0
    word 0   1.1     0.1     1.0    0.0
    word 1   3.1     2.1     3.0    2.0
"""

from typing import TYPE_CHECKING, Any

from mxmoe_steps.kernels import ptx
from mxmoe_steps.kernels.codes.format import Field, Format, Load

if TYPE_CHECKING:
    import torch

    from mxmoe_steps.quantizers.grid import QuantizedWeight


class W8A16(Format):
    """Decoded to (code - 128) / 64, exactly: the byte is a subnormal number of code * 2**-133."""

    bits = 8
    loads = (Load(4, 0), Load(4, 0), Load(4, 1), Load(4, 1))
    growth = 64.0

    def fields(self, block: Any, register: Any, element: Any) -> list[Field]:
        """Two words a block."""
        return [Field(0, 8, 2 * block + register // 2, 16 * element + 8 * (register % 2))]

    def operands(self, weight: "QuantizedWeight") -> "torch.Tensor":
        """Without the scale."""
        return (weight.codes.double() - 128) / 64

    def decode(self, words: Any, block: int, terms: Any) -> list[Any]:
        """Two instructions a register: bytes to their places, one multiply-add."""
        constants = ".reg .b32 t, f, o; mov.b32 f, 0x7F007F00; mov.b32 o, 0xC000C000; "  # 2**127, -2
        parity = ("and.b32 t, {$r0}, 0x00FF00FF; ", "prmt.b32 t, {$r0}, 0, 0x4341; ")
        return [
            ptx.compute(
                constants + parity[register % 2] + "fma.rn.bf16x2 {$w0}, t, f, o;", words[2 * block + register // 2]
            )
            for register in range(4)
        ]
