"""What `capture` wrote for one layer, on the compute device, by expert."""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file

from mxmoe_steps.errors import UserError
from mxmoe_steps.facts import CaptureFacts
from mxmoe_steps.models.families import ModelFolder
from mxmoe_steps.models.identity import fingerprint
from mxmoe_steps.models.raw import FLOATING, TensorFile, tensors_of
from mxmoe_steps.schemes import SHARED

_FIX = "run capture again"
_BATCH = 1 << 15  # tokens at a time: bounds what intermediate activations take


@dataclass(frozen=True)
class Batch:
    """Some tokens of one expert.

    ``x`` float32 [n, H], ``scale`` float32 [n] factor of the expert's output (router weight), ``gradient`` float32
    [n, H] of the model's loss with respect to the layer's output, or None.
    """

    x: torch.Tensor
    scale: torch.Tensor
    gradient: torch.Tensor | None

    def with_scaled_inputs(self) -> "Batch":
        """The same tokens where router weights multiply what enters the expert."""
        return Batch(self.x * self.scale.unsqueeze(-1), torch.ones_like(self.scale), self.gradient)


class LayerInputs:
    """Captured tensors of one layer; tokens are sorted by expert once and gathered a batch at a time.

    ``tensors`` are those of `capture`: ``hidden`` [T, H], ``ids`` [T, k], ``weights`` [T, k], and where there are any
    ``shared`` [T] and ``gradient`` [T, H], in the precision in which they were captured. ``scales_inputs``: router
    weights multiply what enters a routed expert.
    """

    def __init__(self, tensors: dict[str, torch.Tensor], experts: int, scales_inputs: bool = False) -> None:
        self._scales_inputs = scales_inputs
        self.hidden = tensors["hidden"]
        self.shared = tensors.get("shared")
        self.gradient = tensors.get("gradient")
        self._weights = tensors["weights"].flatten()
        expert_ids = tensors["ids"].flatten().long()
        order = expert_ids.argsort(stable=True)
        self._places = order.split(expert_ids.bincount(minlength=experts).tolist())  # by expert: places in ids [T x k]
        self._top_k = tensors["ids"].shape[1]

    @classmethod
    def read(
        cls, paths: Sequence[Path], experts: int, device: torch.device, scales_inputs: bool = False
    ) -> "Iterator[LayerInputs]":
        """From files of `capture`, the next one read while one is in use; `UserError` for damaged data."""
        if not paths:
            return
        with ThreadPoolExecutor(max_workers=1) as pool:
            following = pool.submit(_read, paths[0], experts, device)
            for path in [*paths[1:], None]:
                tensors = following.result()
                if path is not None:
                    following = pool.submit(_read, path, experts, device)
                there = {name: tensor.to(device, non_blocking=True) for name, tensor in tensors.items()}
                yield cls(there, experts, scales_inputs)

    def __len__(self) -> int:
        """Tokens T."""
        return len(self.hidden)

    @property
    def device(self) -> torch.device:
        """Where to compute."""
        return self.hidden.device

    def tokens(self, expert: int) -> int:
        """Tokens that one expert saw."""
        return len(self) if expert == SHARED else len(self._places[expert])

    def batches(self, expert: int) -> Iterator[Batch]:
        """The tokens of one expert, in their order in the text."""
        if expert == SHARED:
            assert self.shared is not None
            for low in range(0, len(self), _BATCH):
                rows = slice(low, low + _BATCH)
                yield self._batch(rows, self.shared[rows])
            return
        for places in self._places[expert].split(_BATCH):
            batch = self._batch(places // self._top_k, self._weights[places])
            yield batch.with_scaled_inputs() if self._scales_inputs else batch

    def _batch(self, rows: slice | torch.Tensor, scale: torch.Tensor) -> Batch:
        gradient = None if self.gradient is None else self.gradient[rows].float()
        return Batch(self.hidden[rows].float(), scale.float(), gradient)


def check_captured(files: dict[int, Path], folder: ModelFolder) -> None:
    """`UserError` unless the header of every layer's file is that of a capture of this model, all of one text."""
    model, seen = fingerprint(folder), None
    for layer, path in files.items():
        file = TensorFile(path, f"{_FIX} for {folder.path}")
        facts, tensors = file.facts(CaptureFacts), file.tensors
        if facts["model"] != model or facts["layer"] != layer:
            raise file.error("was captured of another model or layer")
        tokens, hidden = facts["sequences"] * facts["length"], folder.text["hidden_size"]
        top_k = tensors["ids"].shape[-1] if "ids" in tensors and tensors["ids"].shape else 0
        known = [
            file.tensor("hidden", FLOATING, (tokens, hidden)),
            file.tensor("ids", ["I16"], (tokens, top_k)),
            file.tensor("weights", ["F32"], (tokens, top_k)),
        ]
        if "gradient" in tensors:
            known.append(file.tensor("gradient", FLOATING, (tokens, hidden)))
        if folder.family.shared is not None:
            known.append(file.tensor("shared", ["F32"], (tokens,)))
        if len(known) < len(tensors):
            raise file.error(f"holds {', '.join(sorted(tensors))}, not all of which are of this model")
        text = {**facts, "layer": None, "gradient": "gradient" in tensors}
        if text != (seen := seen or text):
            raise file.error(f"it and the file of layer {next(iter(files))} are not of one capture")


def _read(path: Path, experts: int, device: torch.device) -> dict[str, torch.Tensor]:
    """A file's tensors in memory, in pages that a GPU copies from directly; `UserError` for data that is damaged."""
    for raw in tensors_of(path).values():
        raw.check()
    tensors = load_file(path)
    for name, tensor in tensors.items():
        if not (_in_range(tensor, experts) if name == "ids" else tensor.isfinite().all()):
            raise UserError(f"{path}: {name} holds what no expert or number is; {_FIX}")
    return {name: tensor.pin_memory() if device.type == "cuda" else tensor for name, tensor in tensors.items()}


def _in_range(expert_ids: torch.Tensor, experts: int) -> bool:
    return bool((expert_ids >= 0).all() and (expert_ids < experts).all())
