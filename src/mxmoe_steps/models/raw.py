"""Copying tensors between safetensors files as bytes: no conversion, no PyTorch, memory for one tensor.

The format (https://huggingface.co/docs/safetensors): the header's length as 8 little-endian bytes, a JSON header
name -> {dtype, shape, data_offsets}, then the data without holes.
"""

import json
import math
import os
import struct
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, cached_property
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from pydantic import ConfigDict, Field, NonNegativeInt, TypeAdapter
from pydantic_core import from_json
from typing_extensions import TypedDict

from mxmoe_steps.atomic import atomic_path, canonical_json
from mxmoe_steps.errors import UserError
from mxmoe_steps.records import parse_record

FLOATS = {"F64": "float64", "F32": "float32", "BF16": "bfloat16", "F16": "float16"}  # safetensors -> PyTorch
FLOATING = tuple(FLOATS)

_ALIGNMENT = 8
_PIECE = 1 << 24  # bytes read at a time
_FACTS, _CHECKSUMS = "mxmoe", "crc32"  # keys of the metadata in files of this tool's own
ELEMENT_BYTES = {
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
    """A tensor inside a file: ``start`` and ``stop`` are byte positions in the whole file.

    ``crc32``: checksum of the data in files of this tool's own, None elsewhere.
    """

    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int
    crc32: int | None = field(default=None, kw_only=True)

    @property
    def nbytes(self) -> int:
        """Size of the data."""
        return self.stop - self.start

    def read(self, most: int | None = None) -> bytes:
        """The data, or at ``most`` so many bytes of its beginning; `UserError` unless it fits its checksum."""
        size = self.stop - self.start
        with self.file.open("rb") as file:
            file.seek(self.start)
            data = file.read(size if most is None else min(most, size))
        if most is None and self.crc32 is not None:
            self._compare(zlib.crc32(data))
        return data

    def check(self) -> None:
        """`UserError` unless the data fits its checksum; reads it a piece at a time."""
        found = 0
        with self.file.open("rb") as file:
            file.seek(self.start)
            for left in range(self.stop - self.start, 0, -_PIECE):
                found = zlib.crc32(file.read(min(left, _PIECE)), found)
        self._compare(found)

    def _compare(self, found: int) -> None:
        if self.crc32 not in (None, found):
            raise UserError(f"{self.file}: damaged, its data does not fit a checksum; run the step that wrote it again")


@dataclass(frozen=True)
class RawColumns(RawTensor):
    """Some ``columns`` of a matrix of ``total`` columns inside a file, as the rows of a tensor.

    ``start`` and ``stop`` are those of the matrix, [K, total] for a tensor of ``shape`` [N, K], or, for one of shape
    [N], of a vector [total].
    """

    total: int
    columns: slice

    @property
    def nbytes(self) -> int:
        """Size of the columns."""
        return (self.stop - self.start) // self.total * self.shape[0]

    def read(self, most: int | None = None) -> bytes:
        """The columns' data, one after the other; with ``most``, that of the matrix."""
        if most is not None:
            return super().read(most)
        element = self.nbytes // math.prod(self.shape)
        matrix = np.frombuffer(super().read(), f"u{element}").reshape(-1, self.total)
        return matrix[:, self.columns].T.tobytes()


def tensors_of(file: Path) -> dict[str, RawTensor]:
    """Name -> tensor of a safetensors file; `UserError` when it is missing or damaged."""
    return _contents(file)[0]


@dataclass(frozen=True)
class TensorFile:
    """A file of this tool's own; ``fix``: what to do where it is not as it should be."""

    path: Path
    fix: str

    @cached_property
    def tensors(self) -> dict[str, RawTensor]:
        """By name."""
        return tensors_of(self.path)

    def facts(self, schema: Any) -> dict[str, Any]:
        """What the step that wrote it says of it; `UserError` when that is not as ``schema`` describes."""
        return facts_of(self.path, schema, self.fix)

    def tensor(self, name: str, dtypes: Sequence[str], shape: tuple[int, ...]) -> RawTensor:
        """One of the tensors; `UserError` unless it is there, of one of the types and of that shape."""
        found = self.tensors.get(name)
        if found is None or found.dtype not in dtypes or found.shape != shape:
            was = "missing" if found is None else f"{found.dtype} {list(found.shape)}"
            raise self.error(f"{name} is {was}, expected {' or '.join(dtypes)} {list(shape)}")
        return found

    def error(self, what: str) -> UserError:
        """To raise where something else is wrong."""
        return UserError(f"{self.path}: {what}; {self.fix}")


def facts_of(file: Path, schema: Any, fix: str) -> dict[str, Any]:
    """What the step that wrote a safetensors file says of it; `UserError` when that is not as ``schema`` describes."""
    metadata = _contents(file)[1]
    if _FACTS not in metadata:
        raise UserError(f"{file}: not written by this tool; {fix}")
    return parse_record(file, schema, fix, metadata[_FACTS])


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
        if stop - start != math.prod(shape) * ELEMENT_BYTES.get(dtype, -1):
            raise ValueError(f"{name}: {stop - start} bytes are not {dtype} {list(shape)}")
        tensors[name] = RawTensor(file, dtype, shape, 8 + length + start, 8 + length + stop)
    end = 8 + length
    placed = sorted(tensors, key=lambda name: (tensors[name].start, tensors[name].stop))
    for name in placed:
        if tensors[name].start != end:
            raise ValueError("tensors overlap or leave a hole")
        end = tensors[name].stop
    if size != end:
        found = f"{size:,} instead of {end:,} bytes"
        raise UserError(f"{file}: missing, truncated or not a safetensors file ({found}); make or download it again")
    if _CHECKSUMS in metadata:
        checksums = struct.unpack(f">{len(placed)}I", bytes.fromhex(metadata[_CHECKSUMS]))
        tensors |= {name: replace(tensors[name], crc32=crc) for name, crc in zip(placed, checksums, strict=True)}
    return tensors, metadata


class FileWriter:
    """Writes one safetensors file: a header first, then the data of each tensor in as many pieces as one likes.

    ``entries``: name -> (dtype, shape, bytes). ``facts`` become metadata, beside checksums, and None neither.
    """

    def __init__(
        self, stream: Any, entries: Mapping[str, tuple[str, tuple[int, ...], int]], facts: dict[str, Any] | None
    ) -> None:
        self._stream, self._entries, self._facts = stream, entries, facts
        # Wide elements come first, so that all stay aligned, then names in order
        self._order = sorted(entries, key=lambda name: (-_element_bytes(entries[name]), name))
        self._crc32 = dict.fromkeys(self._order, 0)
        self._next, self._stop = {}, {}
        position = stream.write(self._header())
        for name in self._order:
            self._next[name], self._stop[name] = position, position + entries[name][2]
            position = self._stop[name]

    def append(self, name: str, data: bytes | memoryview) -> None:
        """The next bytes of a tensor."""
        self._stream.seek(self._next[name])
        self._next[name] += self._stream.write(data)
        if self._facts is not None:
            self._crc32[name] = zlib.crc32(data, self._crc32[name])

    def finish(self) -> None:
        """Put the checksums into the header; `ValueError` unless every byte was written."""
        for name, position in self._next.items():
            if position != self._stop[name]:
                raise ValueError(f"{name}: {self._stop[name] - position} bytes were never written")
        self._stream.seek(0)
        self._stream.write(self._header())

    def _header(self) -> bytes:
        metadata = {"format": "pt"}
        if self._facts is not None:
            checksums = struct.pack(f">{len(self._order)}I", *self._crc32.values()).hex()
            metadata = {_FACTS: canonical_json(self._facts), _CHECKSUMS: checksums}
        header: dict[str, Any] = {"__metadata__": metadata}
        position = 0
        for name in self._order:
            dtype, shape, size = self._entries[name]
            header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [position, position + size]}
            position += size
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % _ALIGNMENT)
        return len(text).to_bytes(8, "little") + text


def write_tensors(
    path: str | os.PathLike[str], tensors: Iterable[tuple[str, RawTensor]], facts: dict[str, Any] | None = None
) -> None:
    """Write a file of named tensors, atomically; with ``facts`` and checksums if it is one of this tool's own."""
    named = dict(tensors)
    entries = {name: (tensor.dtype, tensor.shape, tensor.nbytes) for name, tensor in named.items()}
    with atomic_path(path) as temporary, temporary.open("wb") as stream:
        writer = FileWriter(stream, entries, facts)
        for name, tensor in named.items():
            writer.append(name, tensor.read())
        writer.finish()


def _element_bytes(entry: tuple[str, tuple[int, ...], int]) -> int:
    _, shape, size = entry
    elements = math.prod(shape)
    return size // elements if elements else _ALIGNMENT
