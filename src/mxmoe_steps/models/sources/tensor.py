"""A weight that its publisher quantized, as if a file held it in 16 bits. PyTorch is loaded when one is read."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from mmap import mmap
from typing import TYPE_CHECKING, Any

import numpy as np

from mxmoe_steps.models.places import Place
from mxmoe_steps.models.raw import ELEMENT_BYTES, FLOATS, RawTensor
from mxmoe_steps.models.sources.format import CODES, SourceFormat
from mxmoe_steps.schemes import Scheme

if TYPE_CHECKING:
    import torch

_TORCH = {  # safetensors -> PyTorch; scales that are exponents stay bytes
    **FLOATS, "U8": "uint8", "I8": "int8", "I32": "int32", "I64": "int64", "F8_E4M3": "float8_e4m3fn",
    "F8_E8M0": "uint8",
}  # fmt: skip


@dataclass(frozen=True)
class Dequantized(RawTensor):
    """The weight in ``dtype``, a matrix or one of every expert, with what is asked of safetensors' slices.

    ``parts``: what is stored for it, in one file or several; ``file``, ``start`` and ``stop`` are those of its codes.
    A matrix is dequantized when it is read, and no more of the others than that.
    """

    parts: Mapping[str, RawTensor] = field(kw_only=True)
    source: SourceFormat = field(kw_only=True)

    @classmethod
    def of(cls, weight: str, parts: Mapping[str, RawTensor], source: SourceFormat, dtype: str) -> "Dequantized":
        """From the parts of the tensor called ``weight``; ``dtype``: PyTorch's name. `UserError` unless they fit."""
        source.check_types(weight, parts)
        codes = parts[CODES]
        shape = source.shape(weight, parts)
        stored = {name: kind for kind, name in FLOATS.items()}
        return cls(codes.file, stored.get(dtype, "BF16"), shape, codes.start, codes.stop, parts=parts, source=source)

    @property
    def nbytes(self) -> int:
        """Size of the dequantized data."""
        return math.prod(self.shape) * ELEMENT_BYTES[self.dtype]

    def read(self, most: int | None = None) -> bytes:
        """The dequantized data; with ``most``, that many bytes of the beginning of every part."""
        if most is not None:
            return b"".join(part.read(most) for _, part in sorted(self.parts.items()))
        return _bytes(self[...])

    def view(self, read: Callable[[Any], Any]) -> "View":
        """The part of it that ``read`` takes from a slice of safetensors."""
        from mxmoe_steps.models.headers import Header

        shape = tuple(read(Header(self)).shape)
        return View(self.file, self.dtype, shape, self.start, self.stop, tensor=self, taken=read)

    def check_kept(self, place: Place, scheme: Scheme) -> None:
        """`UserError` unless `kept` gives the block at ``place``; by headers."""
        if place.expert is not None and self.source.transposed != (place.orientation != "rows"):
            raise self.source.unkept(f"{place.tensor} is transposed, and its scales are not those of output features")
        self.source.check_kept(place.tensor, self.parts, scheme)

    def kept(self, place: Place, scheme: Scheme) -> "tuple[int, dict[str, torch.Tensor]]":
        """Input features and `Scheme.parts` of the matrix, of one expert or of all its tensor, that has the block at
        ``place``."""
        matrix = self if place.expert is None else self._expert(place.expert)
        parts = {part: _load(raw) for part, raw in matrix.parts.items()}
        return matrix.shape[0 if self.source.transposed else 1], self.source.kept(parts, scheme)

    def get_shape(self) -> list[int]:
        """As of safetensors' slice."""
        return list(self.shape)

    def get_dtype(self) -> str:
        """As of safetensors' slice."""
        return self.dtype

    def __getitem__(self, index: Any) -> "torch.Tensor":
        if len(self.shape) == 2:
            return self._matrix()[index]
        first, *rest = index if isinstance(index, tuple) else (index,)
        if isinstance(first, int):
            return self._expert(first)._matrix()[tuple(rest)]
        whole = self._empty()
        for expert, matrix in enumerate(whole):
            matrix.copy_(self._expert(expert)._matrix())
        return whole[index]

    def _matrix(self) -> "torch.Tensor":
        return self._empty().copy_(self.source.decode({part: _load(raw) for part, raw in self.parts.items()}))

    def _empty(self) -> "torch.Tensor":
        """Memory for the tensor in a mapping of its own, which goes back to the system with it.

        transformers reads in threads, whose heaps would keep a layer or two.
        """
        import torch

        return torch.frombuffer(mmap(-1, self.nbytes), dtype=getattr(torch, FLOATS[self.dtype])).view(self.shape)

    def _expert(self, expert: int) -> "Dequantized":
        """The matrix of one expert."""
        experts, *shape = self.shape
        parts = {}
        for part, raw in self.parts.items():
            size = raw.nbytes // experts
            start = raw.start + expert * size
            parts[part] = replace(raw, shape=raw.shape[1:], start=start, stop=start + size)
        return replace(self, shape=tuple(shape), parts=parts)


@dataclass(frozen=True)
class View(RawTensor):
    """What ``taken`` takes of a dequantized ``tensor``, such as a block of one of all experts."""

    tensor: Dequantized = field(kw_only=True)
    taken: Callable[[Any], Any] = field(kw_only=True)

    @property
    def nbytes(self) -> int:
        """Size of what is taken."""
        return self.tensor.nbytes // math.prod(self.tensor.shape) * math.prod(self.shape)

    def read(self, most: int | None = None) -> bytes:
        """What is taken; with ``most``, the beginning of the tensor's parts."""
        return _bytes(self.taken(self.tensor)) if most is None else self.tensor.read(most)


def _load(raw: RawTensor) -> "torch.Tensor":
    import torch

    data = torch.from_numpy(np.fromfile(raw.file, np.uint8, raw.nbytes, offset=raw.start))
    return data.view(getattr(torch, _TORCH[raw.dtype])).view(raw.shape)


def _bytes(tensor: "torch.Tensor") -> bytes:
    import torch

    return tensor.contiguous().view(torch.uint8).numpy().tobytes()
