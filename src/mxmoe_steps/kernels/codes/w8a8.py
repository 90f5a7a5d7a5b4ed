"""int8 weights for int8 activations: rows, which the tensor cores read from shared memory."""

from typing import TYPE_CHECKING

from mxmoe_steps.kernels.codes.format import Format
from mxmoe_steps.schemes import Scheme

if TYPE_CHECKING:
    import torch


class W8A8(Format):
    """Two's complement of code - 128."""

    operand = "int8"
    bits = 8

    def store(self, codes: "torch.Tensor", scheme: Scheme) -> "torch.Tensor":
        """uint8 to the bits of int8."""
        return codes ^ 0x80

    def restore(self, codes: "torch.Tensor", scheme: Scheme) -> "torch.Tensor":
        """Inverse of `store`."""
        return codes ^ 0x80
