"""What a source format is: the tensors that are stored for a weight, and the numbers that they mean.

All formats share one arithmetic: codes as float32 times scales as float32, rounded to the precision that
``config.json`` names. That is bit for bit what transformers and compressed-tensors make of them in that precision;
the latter rounds to the precision of the scales first, and nvfp4 to bfloat16.
"""

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from mxmoe_steps.errors import UserError
from mxmoe_steps.models.raw import RawTensor
from mxmoe_steps.schemes import Scheme, parse_scheme

if TYPE_CHECKING:
    import torch

FIX = "take a release in 16 or 32 bits, or in one of the source formats that docs/models.md lists"
CODES, SCALES = "codes", "scales"  # parts that every format has

_OF_ACTIVATIONS = ("input_scale", "activation_scale", "input_global_scale", "output_scale", "input_zero_point")


class SourceFormat(ABC):
    """One way to store weights: ``stored`` says what follows a weight's name in those of its parts.

    ``types``: how safetensors names the types that a part may have. ``settings``: what ``config.json``, ``file``, says
    of the weights, for each group of layers. ``transposed``: weights are [K, N], and codes and scales rows of features.
    """

    stored: ClassVar[Mapping[str, str]]
    types: ClassVar[Mapping[str, Sequence[str]]]
    transposed: ClassVar[bool] = False

    def __init__(self, name: str, settings: Sequence[Mapping[str, Any]], file: Path) -> None:
        self.name, self.settings, self.file = name, settings, file
        for group in settings:
            if group.get("symmetric") is False:
                raise UserError(f"{file}: {name} with zero points (symmetric: false) is not read; {FIX}")
            if group.get("actorder") in ("group", True):
                raise UserError(f"{file}: {name} with reordered groups (actorder: group) is not read; {FIX}")

    def find(self, names: Collection[str]) -> dict[str, dict[str, str]]:
        """Weight -> part -> name of the stored tensor, for all weights of this format among the ``names``."""
        found = {}
        for name in names:
            weight = name.removesuffix(self.stored[SCALES])
            parts = {part: weight + tail for part, tail in self.stored.items()}
            if weight != name and all(part in names for part in parts.values()):
                found[weight] = parts
        return found

    def of_activations(self, weight: str, names: Collection[str]) -> list[str]:
        """Tensors beside a weight that only say how its publisher quantizes activations."""
        module = weight.removesuffix("weight")
        return [f"{module}{name}" for name in _OF_ACTIVATIONS if f"{module}{name}" in names]

    def check_types(self, weight: str, parts: Mapping[str, RawTensor]) -> None:
        """`UserError` for a part of another type than those of the format."""
        for part, types in self.types.items():
            if parts[part].dtype not in types:
                raise self.error(weight, parts, f"{part} are {parts[part].dtype}, expected {' or '.join(types)}")

    def error(self, weight: str, parts: Mapping[str, RawTensor], what: str) -> UserError:
        """To raise where the parts of a weight do not fit each other."""
        return UserError(f"{parts[CODES].file}: {weight}: {what}, in a checkpoint of {self.name}; download it again")

    @abstractmethod
    def shape(self, weight: str, parts: Mapping[str, RawTensor]) -> tuple[int, ...]:
        """Of the weight, [N, K], or, of all experts of a layer, [E, ...]; `UserError` unless the parts fit."""

    @abstractmethod
    def decode(self, parts: Mapping[str, "torch.Tensor"]) -> "torch.Tensor":
        """The weight of `shape` from the parts of one matrix, in floating point, still to be rounded."""

    def scheme(self) -> Scheme:
        """The scheme that has the same codes and scales, by ``config.json`` alone; `UserError` why there is none."""
        names = {self.scheme_of(group) for group in self.settings}
        if len(names) > 1:
            raise self.unkept(f"its groups of layers would be {' and '.join(sorted(names))}")
        name = f"{names.pop()}_published"
        try:
            return parse_scheme(name)
        except UserError as error:
            raise self.unkept(str(error)) from None

    def unkept(self, why: str) -> UserError:
        """To raise where no scheme has the codes and scales of the format."""
        return UserError(
            f"{self.file}: {self.name} weights cannot stay as published: {why}; take published out of calibrate.schemes"
        )

    def scheme_of(self, group: Mapping[str, Any]) -> str:
        """`scheme` of a group of layers, as `parse_scheme` reads it; `UserError` says why there is none."""
        raise self.unkept("no scheme has their codes and scales")

    def check_kept(self, weight: str, parts: Mapping[str, RawTensor], scheme: Scheme) -> None:
        """`UserError` unless a weight, by the headers of its parts, is what ``config.json`` says: under `scheme`."""
        self.shape(weight, parts)

    def kept(self, parts: Mapping[str, "torch.Tensor"], scheme: Scheme) -> "dict[str, torch.Tensor]":
        """`Scheme.parts` of one matrix [N, K] under its `scheme`, which mean what `decode` gives."""
        raise self.unkept("no scheme has their codes and scales")
