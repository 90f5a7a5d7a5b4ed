"""Copying tensors between safetensors files as bytes: no conversion, no PyTorch, memory for one tensor.

The format (https://huggingface.co/docs/safetensors): the header's length as 8 little-endian bytes, a JSON header
name -> {dtype, shape, data_offsets}, then the data without holes.
"""

import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

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
            return file.read(self.nbytes)


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
    return {
        name: RawTensor(file, entry["dtype"], tuple(entry["shape"]), *(8 + length + at for at in entry["data_offsets"]))
        for name, entry in header.items()
    }


def write_tensors(path: str | os.PathLike[str], tensors: Iterable[tuple[str, RawTensor]]) -> None:
    """Write a file of named tensors, atomically: wide elements first, so that all stay aligned, then by name."""
    ordered = sorted(tensors, key=lambda item: (-_element_bytes(item[1]), item[0]))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position = 0
    for name, tensor in ordered:
        offsets = [position, position + tensor.nbytes]
        header[name] = {"dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": offsets}
        position += tensor.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    with atomic_path(path) as temporary, temporary.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for _, tensor in ordered:
            stream.write(tensor.read())


def _element_bytes(tensor: RawTensor) -> int:
    elements = 1
    for size in tensor.shape:
        elements *= size
    return tensor.nbytes // elements if elements else _ALIGNMENT
