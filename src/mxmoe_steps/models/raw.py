"""Copying tensors between safetensors files as bytes: no conversion, no PyTorch, memory for one tensor.

The format (https://huggingface.co/docs/safetensors): the header's length as 8 little-endian bytes, a JSON header
name -> {dtype, shape, data_offsets}, then the data without holes.
"""

import json
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from mxmoe_steps.atomic import atomic_path
from mxmoe_steps.errors import UserError

_ALIGNMENT = 8


@dataclass(frozen=True)
class RawTensor:
    """A tensor inside a file: ``start`` and ``stop`` are byte positions in the whole file."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int

    @property
    def nbytes(self) -> int:
        """Size of the data."""
        return self.stop - self.start

    def read(self) -> bytes:
        """The data."""
        with self.file.open("rb") as file:
            file.seek(self.start)
            return file.read(self.stop - self.start)


@dataclass(frozen=True)
class RawColumns(RawTensor):
    """Columns of a matrix inside a file, every ``step``-th from the ``first``, as the rows of a tensor.

    ``start`` and ``stop`` are those of the matrix, [K, N step] for a tensor of ``shape`` [N, K], or, for one of shape
    [N], of a vector [N step].
    """

    first: int
    step: int

    @property
    def nbytes(self) -> int:
        """Size of the columns."""
        return (self.stop - self.start) // self.step

    def read(self) -> bytes:
        """The columns' data, one after the other."""
        element = self.nbytes // math.prod(self.shape)
        matrix = np.frombuffer(super().read(), f"u{element}").reshape(-1, self.shape[0] * self.step)
        return matrix[:, self.first :: self.step].T.tobytes()


@cache
def tensors_of(file: Path) -> dict[str, RawTensor]:
    """Name -> tensor of a safetensors file; `UserError` when it is missing or not one."""
    try:
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if length > file.stat().st_size:
                raise ValueError("the header is longer than the file")
            header: dict[str, Any] = json.loads(stream.read(length))
    except (OSError, ValueError) as error:
        raise UserError(f"{file}: not a readable safetensors file ({error})") from error
    header.pop("__metadata__", None)
    size = 8 + length + max((entry["data_offsets"][1] for entry in header.values()), default=0)
    if file.stat().st_size < size:
        found = f"{file.stat().st_size:,} of {size:,} bytes"
        raise UserError(f"{file}: missing, truncated or not a safetensors file ({found}); download it again")
    return {
        name: RawTensor(file, entry["dtype"], tuple(entry["shape"]), *(8 + length + at for at in entry["data_offsets"]))
        for name, entry in header.items()
    }


def header_bytes(
    entries: Mapping[str, tuple[str, tuple[int, ...], int]], metadata: dict[str, str]
) -> tuple[bytes, dict[str, int]]:
    """The beginning of a file for name -> (dtype, shape, bytes), and where each tensor's data starts after it.

    Wide elements come first, so that all stay aligned, then names in order.
    """
    header: dict[str, Any] = {"__metadata__": metadata}
    starts = {}
    position = 0
    for name in sorted(entries, key=lambda name: (-_element_bytes(entries[name]), name)):
        dtype, shape, size = entries[name]
        starts[name] = position
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [position, position + size]}
        position += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    return len(text).to_bytes(8, "little") + text, starts


def write_tensors(path: str | os.PathLike[str], tensors: Iterable[tuple[str, RawTensor]]) -> None:
    """Write a file of named tensors, atomically."""
    named = dict(tensors)
    entries = {name: (tensor.dtype, tensor.shape, tensor.nbytes) for name, tensor in named.items()}
    text, starts = header_bytes(entries, {"format": "pt"})
    with atomic_path(path) as temporary, temporary.open("wb") as stream:
        stream.write(text)
        for name in starts:
            stream.write(named[name].read())


def _element_bytes(entry: tuple[str, tuple[int, ...], int]) -> int:
    _, shape, size = entry
    elements = math.prod(shape)
    return size // elements if elements else _ALIGNMENT
