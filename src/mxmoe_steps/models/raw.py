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
from typing import Annotated, Any

import numpy as np
from pydantic import ConfigDict, Field, NonNegativeInt, TypeAdapter
from pydantic_core import from_json
from typing_extensions import TypedDict

from mxmoe_steps.atomic import atomic_path
from mxmoe_steps.errors import UserError
from mxmoe_steps.records import parse_record

_ALIGNMENT = 8
_ELEMENT_BYTES = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1, "U16": 2, "I16": 2, "F16": 2, "BF16": 2,
    "U32": 4, "I32": 4, "F32": 4, "U64": 8, "I64": 8, "F64": 8, "C64": 8,
}  # fmt: skip


class _Entry(TypedDict):
    dtype: str
    shape: list[NonNegativeInt]
    data_offsets: Annotated[list[NonNegativeInt], Field(min_length=2, max_length=2)]


_ENTRIES = TypeAdapter(dict[str, _Entry], config=ConfigDict(strict=True))
_METADATA = TypeAdapter(dict[str, str], config=ConfigDict(strict=True))


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


def tensors_of(file: Path) -> dict[str, RawTensor]:
    """Name -> tensor of a safetensors file; `UserError` when it is missing or damaged."""
    return _contents(file)[0]


def facts_of(file: Path, schema: Any, fix: str) -> dict[str, Any]:
    """What the step that wrote a safetensors file says of it; `UserError` when that is not as ``schema`` describes."""
    metadata = _contents(file)[1]
    if "mxmoe" not in metadata:
        raise UserError(f"{file}: not written by this tool; {fix}")
    return parse_record(file, schema, fix, metadata["mxmoe"])


def _contents(file: Path) -> tuple[dict[str, RawTensor], dict[str, str]]:
    try:
        state = file.stat()
        return _read_header(file, state.st_size, state.st_mtime_ns)
    except (OSError, ValueError) as error:  # of pydantic, too
        reason = str(error).splitlines()[0]
        raise UserError(f"{file}: not a readable safetensors file ({reason}); make or download it again") from error


@cache
def _read_header(file: Path, size: int, _mtime_ns: int) -> tuple[dict[str, RawTensor], dict[str, str]]:
    """Tensors and metadata of a file of ``size`` bytes; `ValueError` unless its data is what the header says."""
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if length > size - 8:
            raise ValueError("the header is longer than the file")
        header = from_json(stream.read(length), allow_inf_nan=False)
    if not isinstance(header, dict):
        raise ValueError("the header is not an object")
    metadata = _METADATA.validate_python(header.pop("__metadata__", {}))
    tensors = {}
    for name, entry in _ENTRIES.validate_python(header).items():
        dtype, shape, (start, stop) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
        if stop - start != math.prod(shape) * _ELEMENT_BYTES.get(dtype, -1):
            raise ValueError(f"{name}: {stop - start} bytes are not {dtype} {list(shape)}")
        tensors[name] = RawTensor(file, dtype, shape, 8 + length + start, 8 + length + stop)
    end = 8 + length
    for start, stop in sorted((tensor.start, tensor.stop) for tensor in tensors.values()):
        if start != end:
            raise ValueError("tensors overlap or leave a hole")
        end = stop
    if size != end:
        raise ValueError(f"truncated or too long, {size:,} bytes instead of {end:,}")
    return tensors, metadata


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
