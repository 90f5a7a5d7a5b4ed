"""Safetensors files written and read a few rows at a time, so that a tensor may be larger than memory."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from mxmoe_steps.atomic import atomic_path
from mxmoe_steps.errors import UserError
from mxmoe_steps.models.raw import FileWriter, tensors_of

Layout = Mapping[str, tuple[torch.dtype, tuple[int, ...]]]
_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int64: "I64",
    torch.int16: "I16",
    torch.uint8: "U8",
}


class RowWriter:
    """Tensors of one safetensors file, each filled from its first row to its last."""

    def __init__(self, writer: FileWriter, layout: Layout) -> None:
        self._writer, self._layout = writer, layout

    def append(self, name: str, rows: torch.Tensor) -> None:
        """The next rows of a tensor; they have the layout's dtype and its shape after the first dimension."""
        dtype, shape = self._layout[name]
        if rows.dtype != dtype or rows.shape[1:] != shape[1:]:
            raise ValueError(f"{name}: rows are {rows.dtype} {tuple(rows.shape)}, expected {dtype} {shape}")
        self._writer.append(name, rows.detach().cpu().contiguous().view(torch.uint8).numpy().data)


@contextmanager
def write_rows(path: Path, layout: Layout, facts: dict[str, Any]) -> Iterator[RowWriter]:
    """A `RowWriter`; the file appears when the block succeeds and every row was written."""
    entries = {
        name: (_NAMES[dtype], shape, torch.Size(shape).numel() * dtype.itemsize)
        for name, (dtype, shape) in layout.items()
    }
    with atomic_path(path) as temporary, temporary.open("wb") as stream:
        writer = FileWriter(stream, entries, facts)
        yield RowWriter(writer, layout)
        writer.finish()


def is_whole(path: Path, layout: Layout) -> bool:
    """Whether a file is there, holds tensors of that layout and is not damaged."""
    try:
        tensors = tensors_of(path)
        for tensor in tensors.values():
            tensor.check()
    except UserError:
        return False
    found = {name: (tensor.dtype, tensor.shape) for name, tensor in tensors.items()}
    return found == {name: (_NAMES[dtype], tuple(shape)) for name, (dtype, shape) in layout.items()}


def read_rows(path: Path, name: str, rows: slice) -> torch.Tensor:
    """Rows of one tensor; only they are read."""
    with safe_open(path, "pt") as file:
        return file.get_slice(name)[rows]
