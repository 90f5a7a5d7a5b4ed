"""The tensors of a checkpoint's files, those that their publisher quantized as if they were in 16 bits."""

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

from mxmoe_steps.errors import UserError
from mxmoe_steps.models.description import read_index
from mxmoe_steps.models.raw import RawTensor, tensors_of
from mxmoe_steps.models.sources.format import CODES, SourceFormat
from mxmoe_steps.models.sources.tensor import Dequantized


class StoredTensors:
    """Of the folder ``path``, with weights in ``formats``, which are dequantized to ``dtype``."""

    def __init__(self, path: Path, formats: Sequence[SourceFormat], dtype: str) -> None:
        self._path, self._formats, self._dtype = path, formats, dtype

    @cached_property
    def listed(self) -> dict[str, Path]:
        """Name of a stored tensor -> file: as for transformers, ``model.safetensors`` comes before an index."""
        single = self._path / "model.safetensors"
        if single.is_file():
            return dict.fromkeys(tensors_of(single), single)
        weight_map = read_index(self._path)
        for file in sorted(set(weight_map.values())):
            if not (self._path / file).is_file():
                raise UserError(f"{self._path / file}: missing, though the checkpoint's index names it; download it")
        return {name: self._path / file for name, file in weight_map.items()}

    @cached_property
    def quantized(self) -> dict[str, tuple[SourceFormat, dict[str, str]]]:
        """Weight that the publisher quantized -> its format, and part -> name of the stored tensor."""
        return {
            weight: (source, parts) for source in self._formats for weight, parts in source.find(self.listed).items()
        }

    @cached_property
    def consumed(self) -> dict[str, str]:
        """Name of a stored tensor that goes into weights as they are read, or says nothing of them -> what it is."""
        found: dict[str, str] = {}
        for weight, (source, parts) in self.quantized.items():
            now = f"of {source.name} weights, which are packed or in 16 bits now"
            found |= {name: f"{part} {now}" for part, name in parts.items()}
            beside = source.of_activations(weight, self.listed)
            found |= dict.fromkeys(beside, f"scales of activations, which go with {source.name} weights")
        return found

    @cached_property
    def files(self) -> dict[str, Path]:
        """The same as `listed` if no weight were quantized: each by its own name, with the file of its codes."""
        codes = {weight: self.listed[parts[CODES]] for weight, (_, parts) in self.quantized.items()}
        return {name: file for name, file in self.listed.items() if name not in self.consumed} | codes

    @cached_property
    def _headers(self) -> dict[Path, dict[str, RawTensor]]:
        return {file: tensors_of(file) for file in set(self.listed.values())}

    def raw(self, name: str) -> RawTensor:
        """One of `files` as bytes, dequantized where it must be; `UserError` unless it is there."""
        if name not in self.quantized:
            return self._as_listed(name)
        source, parts = self.quantized[name]
        return Dequantized.of(name, {part: self._as_listed(one) for part, one in parts.items()}, source, self._dtype)

    def nbytes(self, name: str) -> int:
        """Bytes that are stored for one of `files`."""
        _, parts = self.quantized.get(name, (None, {CODES: name}))
        return sum(self._as_listed(one).nbytes for one in parts.values())

    def _as_listed(self, name: str) -> RawTensor:
        file = self.listed[name]
        tensor = self._headers[file].get(name)
        if tensor is None:
            raise UserError(f"{file}: holds no tensor {name}, which the checkpoint's index says it does")
        return tensor
