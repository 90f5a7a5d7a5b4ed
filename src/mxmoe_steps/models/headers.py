"""Tensors of which only the header is read."""

from typing import Any

import torch

from mxmoe_steps.models.raw import FLOATS, RawTensor


class Header:
    """A tensor of the file that has a shape and no data, with what transformers' loader asks of a slice."""

    def __init__(self, raw: RawTensor) -> None:
        self._raw = raw

    def get_shape(self) -> list[int]:
        """As of safetensors' slice."""
        return list(self._raw.shape)

    def get_dtype(self) -> str:
        """As of safetensors' slice."""
        return self._raw.dtype

    def __getitem__(self, index: Any) -> torch.Tensor:
        dtype = getattr(torch, FLOATS.get(self._raw.dtype, "uint8"))
        return torch.empty(self._raw.shape, dtype=dtype, device="meta")[index]
