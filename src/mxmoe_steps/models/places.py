"""Where a checkpoint keeps a linear block's weight or bias: in a tensor of its own, or in one of all experts."""

from dataclasses import dataclass
from typing import Any

from mxmoe_steps.models.raw import RawColumns, RawTensor


@dataclass(frozen=True)
class Place:
    """A tensor, and with ``expert`` a block's part of one that holds that block of all experts of a layer.

    ``rows``: the tensors are gate and up [E, 2I, H], gate's rows before up's, and down [E, H, I]. ``columns``: they are
    transposed, gate and up [E, H, 2I], gate's columns before up's, and down [E, I, H]. ``alternating``: the same, but
    even columns are gate's and odd ones up's; biases are [E, 2I] and [E, H]. Where experts are not ``gated`` there is
    up [E, I, H], and gate is none of its rows.
    """

    tensor: str
    expert: int | None = None
    block: str = ""
    orientation: str = "rows"
    gated: bool = True

    def read(self, stored: Any) -> Any:
        """The block's weight [N, K] or bias [N] from safetensors' unread slice of its tensor."""
        if self.expert is None:
            return stored[:0] if self._is_empty else stored[...]
        if self.orientation == "rows":
            return stored[self.expert, self._part(stored.get_shape()[1])]
        return stored[self.expert][..., self._part(stored.get_shape()[-1])].movedim(-1, 0)

    def raw(self, source: RawTensor) -> RawTensor:
        """The same as bytes of its tensor's file."""
        if self._is_empty:
            return RawTensor(source.file, source.dtype, (0, source.shape[-1]), source.start, source.start)
        if self.expert is None:
            return source
        experts, *shape = source.shape
        size = source.nbytes // experts
        start = source.start + self.expert * size
        if self.orientation == "rows":
            total, in_features = shape
            rows = self._part(total)
            row_bytes = size // total
            first, last = start + rows.start * row_bytes, start + rows.stop * row_bytes
            return RawTensor(source.file, source.dtype, (rows.stop - rows.start, in_features), first, last)
        *inputs, total = shape
        columns = self._part(total)
        outputs = len(range(total)[columns])
        return RawColumns(source.file, source.dtype, (outputs, *inputs), start, start + size, total, columns)

    def rows(self, total: int) -> slice:
        """The block's rows among ``total`` output features of its tensor, or of its expert's part of it."""
        if self.expert is None:
            return slice(0, 0 if self._is_empty else total)
        return self._part(total)

    @property
    def _is_empty(self) -> bool:
        """Gate's part of up's tensor where there is no gate: none of its rows."""
        return self.block == "gate" and not self.gated

    def _part(self, total: int) -> slice:
        """The block's rows or columns among those of its expert."""
        if self._is_empty:
            return slice(0, 0)
        if self.block == "down" or not self.gated:
            return slice(0, total)
        if self.orientation == "alternating":
            return slice(0 if self.block == "gate" else 1, total, 2)
        return slice(0, total // 2) if self.block == "gate" else slice(total // 2, total)
