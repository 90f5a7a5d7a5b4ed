"""Weights in 8 bits with scales of rows, blocks or the whole tensor: compressed-tensors, and the fp8 of transformers.

compressed-tensors calls them ``float-quantized``, ``int-quantized`` and ``naive-quantized``: ``weight``, fp8 (e4m3) or
int8 [N, K], and ``weight_scale`` [N, 1], [1] or [N / 128, K / 128], as GLM publishes fp8. transformers' fp8 has
``weight_scale_inv`` instead (`mxmoe_steps.models.sources.fp8`).
"""

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from mxmoe_steps.models.raw import FLOATING, RawTensor
from mxmoe_steps.models.sources.format import CODES, SCALES, SourceFormat
from mxmoe_steps.schemes import Scheme

if TYPE_CHECKING:
    import torch


class PlainQuantized(SourceFormat):
    """``weight`` and ``weight_scale``."""

    stored: ClassVar = {CODES: "", SCALES: "_scale"}
    types: ClassVar = {CODES: ("F8_E4M3", "I8"), SCALES: FLOATING}
    block_key = "block_structure"

    def shape(self, weight: str, parts: Mapping[str, RawTensor]) -> tuple[int, ...]:
        codes, scales = parts[CODES].shape, parts[SCALES].shape
        if len(codes) not in (2, 3) or self._block(codes[-2:], scales[len(codes) - 2 :]) is None:
            raise self.error(weight, parts, f"codes {list(codes)} do not fit scales {list(scales)}")
        return codes

    def decode(self, parts: "Mapping[str, torch.Tensor]") -> "torch.Tensor":
        return self.product(parts).to(parts[SCALES].dtype)

    def product(self, parts: "Mapping[str, torch.Tensor]") -> "torch.Tensor":
        """float32 [N, K]."""
        import torch

        from mxmoe_steps.models.sources.arithmetic import E4M3, INT8, numbers, of_scales, times_scales

        codes = numbers(parts[CODES], INT8 if parts[CODES].dtype == torch.int8 else E4M3)
        scales = of_scales(parts[SCALES])
        block = self._block(tuple(codes.shape), tuple(scales.shape))
        assert block is not None
        rows, columns = block
        return times_scales(codes, scales.view(-(-len(codes) // rows), -1), rows, columns)

    def scheme_of(self, group: Mapping[str, Any]) -> str:
        block = group.get(self.block_key)
        if group.get("type", "float") != "float" or not block or len(set(block)) > 1:
            raise self.unkept(f"of 8-bit codes only e4m3 with scales of square blocks ({self.block_key}) has a scheme")
        return f"w8a16_g{block[0]}_fp8"

    def check_kept(self, weight: str, parts: Mapping[str, RawTensor], scheme: Scheme) -> None:
        *_, rows, columns = self.shape(weight, parts)
        blocks = tuple(math.ceil(size / scheme.group) for size in (rows, columns))
        if parts[SCALES].dtype == "F64" or parts[CODES].dtype != "F8_E4M3" or parts[SCALES].shape[-2:] != blocks:
            raise self.unkept(f"{weight} is stored otherwise than config.json says, under which it would be {scheme}")

    def kept(self, parts: "Mapping[str, torch.Tensor]", scheme: Scheme) -> "dict[str, torch.Tensor]":
        import torch

        from mxmoe_steps.models.sources.arithmetic import of_scales

        scales = of_scales(parts[SCALES]).contiguous().view(torch.uint8)
        return {"qweight": parts[CODES].view(torch.uint8), "scales": scales}

    def _block(self, codes: tuple[int, ...], scales: tuple[int, ...]) -> tuple[int, int] | None:
        """Rows and columns that share a scale; None where the scales fit no block."""
        rows, columns = codes
        if math.prod(scales) == 1:
            return rows, columns
        scales = scales if len(scales) > 1 else (*scales, 1)
        stated = [tuple(map(int, group[self.block_key])) for group in self.settings if group.get(self.block_key)]
        for block in stated:
            if scales == tuple(-(-size // one) for size, one in zip(codes, block, strict=True)):
                return block[0], block[1]
        if scales[0] == rows and columns % scales[1] == 0:
            return 1, columns // scales[1]
        return None
