"""mxfp4 of gpt-oss: experts in fp4 (e2m1), with an exponent for every 32 input features.

``gate_up_proj_blocks`` bytes [E, N, K / 32, 16], two codes each, and ``gate_up_proj_scales`` bytes [E, N, K / 32],
e8m0, are the weight [E, K, N], transposed: transformers' ``Mxfp4Dequantize``.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from mxmoe_steps.models.raw import RawTensor
from mxmoe_steps.models.sources.format import CODES, SCALES, SourceFormat
from mxmoe_steps.schemes import Scheme

if TYPE_CHECKING:
    import torch

_BYTES = 16  # of a group


class Mxfp4(SourceFormat):
    """``..._blocks`` and ``..._scales``."""

    stored: ClassVar = {CODES: "_blocks", SCALES: "_scales"}
    types: ClassVar = {CODES: ("U8",), SCALES: ("U8",)}
    transposed: ClassVar = True

    def shape(self, weight: str, parts: Mapping[str, RawTensor]) -> tuple[int, ...]:
        codes, scales = parts[CODES].shape, parts[SCALES].shape
        if len(codes) != 4 or codes != (*scales, _BYTES):
            raise self.error(weight, parts, f"codes {list(codes)} do not fit scales {list(scales)}")
        experts, rows, groups, _ = codes
        return experts, groups * 2 * _BYTES, rows

    def decode(self, parts: "Mapping[str, torch.Tensor]") -> "torch.Tensor":
        from mxmoe_steps.models.sources.arithmetic import E2M1, numbers, of_scales

        return numbers(parts[CODES], E2M1).mul_(of_scales(parts[SCALES]).unsqueeze(-1)).flatten(1).T

    def scheme_of(self, group: Mapping[str, Any]) -> str:
        return "w4a16_mxfp4"

    def kept(self, parts: "Mapping[str, torch.Tensor]", scheme: Scheme) -> "dict[str, torch.Tensor]":
        return {"qweight": parts[CODES].flatten(1), "scales": parts[SCALES]}
