"""fp8 of DeepSeek, Qwen, GLM and MiniMax: a scale for every block of 128 x 128 weights.

``weight`` e4m3 [N, K] and ``weight_scale_inv`` [N / 128, K / 128], rounded up: the factor to multiply by, whatever
its name says, in floating point or as the exponent e8m0. The size of blocks is ``weight_block_size``; without it a
tensor has one scale. The names and arithmetic are those of DeepSeek-V3's ``fp8_cast_bf16.py``, which transformers'
``Fp8Dequantize`` follows where blocks divide the tensor.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar

from mxmoe_steps.models.raw import FLOATING
from mxmoe_steps.models.sources.format import CODES, SCALES
from mxmoe_steps.models.sources.plain_quantized import PlainQuantized

if TYPE_CHECKING:
    import torch


class Fp8(PlainQuantized):
    """``weight`` and ``weight_scale_inv``; one of all experts, too."""

    stored: ClassVar = {CODES: "", SCALES: "_scale_inv"}
    types: ClassVar = {CODES: ("F8_E4M3",), SCALES: (*FLOATING, "F8_E8M0", "U8")}
    block_key = "weight_block_size"

    def decode(self, parts: "Mapping[str, torch.Tensor]") -> "torch.Tensor":
        return self.product(parts)
