"""``nvfp4-pack-quantized`` of compressed-tensors: fp4 (e2m1) with two levels of scales.

``weight_packed`` bytes [N, K / 2], two codes each; ``weight_scale`` e4m3 [N, K / 16]; ``weight_global_scale`` float32
[1], by which scales are divided.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from mxmoe_steps.models.raw import RawTensor
from mxmoe_steps.models.sources.format import CODES, SCALES, SourceFormat

if TYPE_CHECKING:
    import torch

_GROUP = 16
_GLOBAL = "global scale"


class NvFp4(SourceFormat):
    """``weight_packed``, ``weight_scale`` and ``weight_global_scale``."""

    stored: ClassVar = {CODES: "_packed", SCALES: "_scale", _GLOBAL: "_global_scale"}
    types: ClassVar = {CODES: ("U8",), SCALES: ("F8_E4M3",), _GLOBAL: ("F32",)}

    def shape(self, weight: str, parts: Mapping[str, RawTensor]) -> tuple[int, ...]:
        codes, scales, overall = (parts[part].shape for part in (CODES, SCALES, _GLOBAL))
        if len(codes) != 2 or scales != (codes[0], 2 * codes[1] // _GROUP) or overall not in ((), (1,)):
            raise self.error(weight, parts, f"codes {list(codes)} do not fit scales {list(scales)} and {list(overall)}")
        return codes[0], 2 * codes[1]

    def decode(self, parts: "Mapping[str, torch.Tensor]") -> "torch.Tensor":
        from mxmoe_steps.models.sources.arithmetic import E2M1, E4M3, numbers, times_scales

        scales = numbers(parts[SCALES], E4M3) / parts[_GLOBAL]
        return times_scales(numbers(parts[CODES], E2M1), scales, 1, _GROUP).bfloat16()  # whatever the model's precision

    def scheme_of(self, group: Mapping[str, Any]) -> str:
        raise self.unkept(f"no scheme has groups of {_GROUP} whose scales are products of two")
