"""e4m3 weights for e4m3 activations: rows, which the tensor cores read from shared memory."""

from typing import TYPE_CHECKING

from mxmoe_steps.kernels.codes.format import Format
from mxmoe_steps.schemes import Scheme

if TYPE_CHECKING:
    import torch


class W8A8Fp8(Format):
    """The bits of e4m3 values."""

    operand = "fp8"
    bits = 8

    def store(self, codes: "torch.Tensor", scheme: Scheme) -> "torch.Tensor":
        """e4m3 to its bits."""
        import torch

        return codes.view(torch.uint8)

    def restore(self, codes: "torch.Tensor", scheme: Scheme) -> "torch.Tensor":
        """Inverse of `store`."""
        import torch

        return codes.view(torch.float8_e4m3fn)
