"""4-bit integers for 4-bit activations, which the tensor cores multiply as they are stored.

A word is a register of a block (elements as `layouts` numbers them); words 0 to 3 are block 0, 4 to 7 block 1:

    bit   31..28 27..24 23..20 19..16 15..12 11..8  7..4   3..0
    code    7      6      5      4      3      2      1      0

Codes are two's complement of code - 8. They lie in chunks although nothing is decoded: beside the scales of their
groups.
"""

from typing import TYPE_CHECKING, Any

from mxmoe_steps.kernels.codes.format import Field
from mxmoe_steps.kernels.codes.w4a8 import SignedFormat
from mxmoe_steps.schemes import Scheme

if TYPE_CHECKING:
    import torch


class W4A4(SignedFormat):
    """Sums of a group are multiplied by its scale in float32."""

    operand = "int4"

    @property
    def decoded(self) -> bool:
        """Registers are made from chunks, as those of decoded codes are."""
        return True

    def store(self, codes: "torch.Tensor", scheme: Scheme) -> "torch.Tensor":
        """Two's complement."""
        return codes ^ 8

    def restore(self, codes: "torch.Tensor", scheme: Scheme) -> "torch.Tensor":
        """Inverse of `store`."""
        return codes ^ 8

    def fields(self, block: Any, register: Any, element: Any) -> list[Field]:
        """All four bits."""
        return [Field(0, 4, 4 * block + register, 4 * element)]

    def decode(self, words: Any, block: int, terms: Any) -> list[Any]:
        """The words."""
        return [words[4 * block + register] for register in range(4)]
