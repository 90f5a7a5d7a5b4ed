"""How tensors of packed blocks leave vLLM's stream of weights, before its model classes see them.

Every model class has names of its own for experts, and loaders for tensors of its own kind. Ours need neither: a
quantization method may rename what is loaded, and its renaming is where names and tensors pass by.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields
from typing import Any

import torch
from vllm.model_executor.models.utils import WeightsMapper


@dataclass
class PackedTensors(WeightsMapper):
    """Takes tensors from the stream; other names are mapped by what this is joined with.

    ``published``: gets a name and a tensor, and gives the name that the tensor has as published, or None where the
    tensor is one of ours. vLLM joins the mapper of its model class with that of the quantization method by ``|`` and
    applies it to names and tensors.
    """

    published: Callable[[str, torch.Tensor], str | None] | None = None

    def __or__(self, other: WeightsMapper) -> "PackedTensors":
        """Ours first."""
        return self._with(super().__or__(other))

    def __ror__(self, other: WeightsMapper) -> "PackedTensors":
        """Python asks this before the ``|`` of ``other``, whose class is a base of this one."""
        return self._with(WeightsMapper.__or__(other, self))

    def _with(self, names: WeightsMapper) -> "PackedTensors":
        mappings: dict[str, Any] = {field.name: getattr(names, field.name) for field in fields(WeightsMapper)}
        return PackedTensors(**mappings, published=self.published)

    def apply(self, weights: Iterable[tuple[str, torch.Tensor]]) -> Iterable[tuple[str, torch.Tensor]]:
        """What is not ours, under new names."""
        published = self.published
        assert published is not None
        named = ((published(name, tensor), tensor) for name, tensor in weights)
        return super().apply((name, tensor) for name, tensor in named if name is not None)
