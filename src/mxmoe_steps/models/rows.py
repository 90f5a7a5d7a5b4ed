"""Safetensors files written and read a few rows at a time, so that a tensor may be larger than memory."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from mxmoe_steps.atomic import atomic_path, canonical_json
from mxmoe_steps.models.raw import header_bytes

Layout = Mapping[str, tuple[torch.dtype, tuple[int, ...]]]
_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int64: "I64",
    torch.int16: "I16",
}


class RowWriter:
    """Tensors of one safetensors file, each filled from its first row to its last."""

    def __init__(self, stream: Any, layout: Layout, metadata: dict[str, Any]) -> None:
        entries = {
            name: (_NAMES[dtype], shape, torch.Size(shape).numel() * dtype.itemsize)
            for name, (dtype, shape) in layout.items()
        }
        text, starts = header_bytes(entries, {"mxmoe": canonical_json(metadata)})
        stream.write(text)
        self._stream, self._layout = stream, layout
        self._next = {name: len(text) + start for name, start in starts.items()}
        self._stop = {name: self._next[name] + size for name, (_, _, size) in entries.items()}

    def append(self, name: str, rows: torch.Tensor) -> None:
        """The next rows of a tensor; they have the layout's dtype and its shape after the first dimension."""
        dtype, shape = self._layout[name]
        if rows.dtype != dtype or rows.shape[1:] != shape[1:]:
            raise ValueError(f"{name}: rows are {rows.dtype} {tuple(rows.shape)}, expected {dtype} {shape}")
        data = rows.detach().cpu().contiguous().view(torch.uint8).numpy()
        self._stream.seek(self._next[name])
        self._stream.write(data)
        self._next[name] += data.nbytes

    def check_complete(self) -> None:
        """`ValueError` unless every row was written."""
        for name, position in self._next.items():
            if position != self._stop[name]:
                raise ValueError(f"{name}: {self._stop[name] - position} bytes were never written")


@contextmanager
def write_rows(path: Path, layout: Layout, metadata: dict[str, Any]) -> Iterator[RowWriter]:
    """A `RowWriter`; the file appears when the block succeeds and every row was written."""
    with atomic_path(path) as temporary, temporary.open("wb") as stream:
        writer = RowWriter(stream, layout, metadata)
        yield writer
        writer.check_complete()


def read_rows(path: Path, name: str, rows: slice) -> torch.Tensor:
    """Rows of one tensor; only they are read."""
    with safe_open(path, "pt") as file:
        return file.get_slice(name)[rows]
