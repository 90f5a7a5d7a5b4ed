"""Packed weights of every block under one scheme, as `calibrate` stores them: what `quantize` picks from.

The file SCHEME.safetensors holds, for every block, LAYER.EXPERT.BLOCK.PART with the parts of `Scheme.parts`.
"""

from pathlib import Path

import numpy as np

from mxmoe_steps.facts import StoreFacts
from mxmoe_steps.models.raw import RawTensor, TensorFile
from mxmoe_steps.schemes import Scheme

_NAN = (0x7F, 0xFF)


class PackedStore:
    """The store of one scheme in ``folder``; `UserError` unless it is of this model, quantizer and scheme."""

    def __init__(self, folder: Path, scheme: Scheme, quantizer: str, model: str) -> None:
        self.scheme = scheme
        self._file = TensorFile(folder / f"{scheme}.safetensors", f"calibrate {scheme} again for this model")
        facts = self._file.facts(StoreFacts)
        for name, wanted in (("scheme", scheme.name), ("quantizer", quantizer), ("model", model)):
            if facts[name] != wanted:
                raise self._file.error(f"{name} is {facts[name]}, expected {wanted}")

    def block(self, layer: int, expert: int, block: str, shape: tuple[int, int]) -> dict[str, RawTensor]:
        """Part -> tensor of a block [N, K]; `UserError` unless all parts are there and mean finite numbers."""
        parts = {}
        for part, (dtype, stored_shape) in self.scheme.parts(*shape).items():
            name = f"{layer}.{expert}.{block}.{part}"
            tensor = self._file.tensor(name, [dtype], stored_shape)
            if not self._is_finite(part, tensor):
                raise self._file.error(f"{name} holds NaN, infinity or a scale that is not positive")
            parts[part] = tensor
        return parts

    def _is_finite(self, part: str, tensor: RawTensor) -> bool:
        if part == "qweight":  # every integer code is a number, of e4m3 codes two are NaN
            return not self.scheme.e4m3_weights or not np.isin(np.frombuffer(tensor.read(), np.uint8), _NAN).any()
        if self.scheme.scale_rows > 1:
            scales = np.frombuffer(tensor.read(), np.float32)
            return bool((np.isfinite(scales) & (scales > 0)).all())
        if tensor.dtype == "U8":  # scales that are exponents
            return not (np.frombuffer(tensor.read(), np.uint8) == 0xFF).any()
        values = np.frombuffer(tensor.read(), np.uint16)  # bfloat16: sign, 8 bits of exponent, 7 of fraction
        finite = values & 0x7F80 != 0x7F80
        positive = (values < 0x8000) & (values > 0)
        return bool((finite & positive if part == "scales" else finite).all())
