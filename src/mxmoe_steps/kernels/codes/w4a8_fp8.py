"""4-bit integers for e4m3 activations.

Stored as `w4a8` draws them, but a value v = code - 8 as v for v >= 0 and as 8 + (|v| - 1) below: e4m3 bit patterns 0..8
are linear, so ``magnitude bits + 0x81 * sign`` is the operand, times 2**-9, which the stored scales make up for.
"""

from typing import TYPE_CHECKING, Any

from mxmoe_steps.kernels import ptx
from mxmoe_steps.kernels.codes.w4a8 import SignedFormat, turned
from mxmoe_steps.schemes import Scheme

if TYPE_CHECKING:
    import torch


class W4A8Fp8(SignedFormat):
    """3.5 instructions a register."""

    operand = "fp8"
    unit = 2.0**-9

    def store(self, codes: "torch.Tensor", scheme: Scheme) -> "torch.Tensor":
        """Sign and magnitude, of negative values less 1."""
        import torch

        return torch.where(codes >= 8, codes ^ 8, codes ^ 15)

    def restore(self, codes: "torch.Tensor", scheme: Scheme) -> "torch.Tensor":
        """Inverse of `store`."""
        import torch

        return torch.where(codes < 8, codes ^ 8, codes ^ 15)

    def decode(self, words: Any, block: int, terms: Any) -> list[Any]:
        """Negative ones get their sign back, and the 1."""
        text = (
            ".reg .b32 t, s; and.b32 t, w, 0x87878787; and.b32 s, w, 0x80808080; shr.u32 s, s, 7; add.u32 {$w0}, t, s;"
        )
        return [ptx.compute(turned(register) + text, words[2 * block + register // 2]) for register in range(4)]
