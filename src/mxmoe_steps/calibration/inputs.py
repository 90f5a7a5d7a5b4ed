"""What `capture` wrote for one layer, on the compute device, by expert."""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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
    [n, H] of the model's loss with respect to the layer's output, or None; all of one ``domain``, by its number.
    """

    x: torch.Tensor
    scale: torch.Tensor
    gradient: torch.Tensor | None
    domain: int = 0

    def with_scaled_inputs(self) -> "Batch":
        """The same tokens where router weights multiply what enters the expert."""
        return Batch(self.x * self.scale.unsqueeze(-1), torch.ones_like(self.scale), self.gradient, self.domain)


class LayerInputs:
    """Captured tensors of one layer; tokens are sorted by expert once and gathered a batch at a time.

    ``tensors`` are those of `capture`: ``hidden`` [T, H], ``ids`` [T, k], ``weights`` [T, k], and where there are any
    ``shared`` [T] and ``gradient`` [T, H], in the precision in which they were captured. ``sizes``: tokens of every
    domain, which follow one another; None where all tokens are of one. ``scales_inputs``: router weights multiply what
    enters a routed expert.
    """

    def __init__(
        self,
        tensors: dict[str, torch.Tensor],
        experts: int,
        sizes: Sequence[int] | None = None,
        scales_inputs: bool = False,
    ) -> None:
        self._scales_inputs = scales_inputs
        self.hidden = tensors["hidden"]
        self.shared = tensors.get("shared")
        self.gradient = tensors.get("gradient")
        self._weights = tensors["weights"].flatten()
        self.sizes = [len(self.hidden)] if sizes is None else list(sizes)
        self._top_k = tensors["ids"].shape[1]
        lengths = torch.tensor(self.sizes, device=self.device) * self._top_k
        domain = torch.arange(len(lengths), device=self.device).repeat_interleave(lengths)
        key = tensors["ids"].flatten().long() * len(lengths) + domain
        counts = key.bincount(minlength=experts * len(lengths)).tolist()
        self._places = key.argsort(stable=True).split(counts)  # by expert, then domain: places in ids [T x k]

    @classmethod
    def read(
        cls, layers: Sequence[Sequence[Path]], experts: int, device: torch.device, scales_inputs: bool = False
    ) -> "Iterator[LayerInputs]":
        """From files of `capture`, for every layer one a domain; the next layer is read while one is in use.

        `UserError` for damaged data.
        """
        if not layers:
            return
        with ThreadPoolExecutor(max_workers=1) as pool:
            following = pool.submit(_read, layers[0], experts, device)
            for paths in [*layers[1:], None]:
                tensors, sizes = following.result()
                if paths is not None:
                    following = pool.submit(_read, paths, experts, device)
                moved = {name: tensor.to(device, non_blocking=True) for name, tensor in tensors.items()}
                yield cls(moved, experts, sizes, scales_inputs)

    def __len__(self) -> int:
        """Tokens T."""
        return len(self.hidden)

    @property
    def device(self) -> torch.device:
        """Where to compute."""
        return self.hidden.device

    def tokens(self, expert: int) -> int:
        """Tokens that one expert saw."""
        return len(self) if expert == SHARED else sum(map(len, self._places_of(expert)))

    def batches(self, expert: int) -> Iterator[Batch]:
        """The tokens of one expert, domain by domain, in their order in the text."""
        if expert == SHARED:
            assert self.shared is not None
            start = 0
            for domain, size in enumerate(self.sizes):
                for low in range(start, start + size, _BATCH):
                    rows = slice(low, min(low + _BATCH, start + size))
                    yield self._batch(rows, self.shared[rows], domain)
                start += size
            return
        for domain, found in enumerate(self._places_of(expert)):
            for places in found.split(_BATCH):
                batch = self._batch(places // self._top_k, self._weights[places], domain)
                yield batch.with_scaled_inputs() if self._scales_inputs else batch

    def _places_of(self, expert: int) -> Sequence[torch.Tensor]:
        count = len(self.sizes)
        return self._places[expert * count : (expert + 1) * count]

    def _batch(self, rows: slice | torch.Tensor, scale: torch.Tensor, domain: int) -> Batch:
        gradient = None if self.gradient is None else self.gradient[rows].float()
        return Batch(self.hidden[rows].float(), scale.float(), gradient, domain)


def check_domains(captures: Sequence[dict[int, Path]], folder: ModelFolder) -> dict[str, int]:
    """Domains and their tokens; every one of ``captures`` holds its files by layer, as of `check_captured`.

    `UserError` for two captures of one text, or where only some hold gradients.
    """
    domains: dict[str, tuple[int, bool, Path]] = {}
    for files in captures:
        facts, path = check_captured(files, folder), next(iter(files.values())).parent
        if (known := domains.get(facts["text"])) is not None:
            raise UserError(f"{path} and {known[2]} are captures of the same text, {facts['text']}; give one of them")
        domains[facts["text"]] = (facts["sequences"] * facts["length"], facts["gradient"], path)
    without = [path for _, gradient, path in domains.values() if not gradient]
    if 0 < len(without) < len(domains):
        raise UserError(f"{without[0]}: holds no gradients, and other domains do; {_FIX} with --gradient")
    return {name: tokens for name, (tokens, *_) in domains.items()}


def check_captured(files: dict[int, Path], folder: ModelFolder) -> dict[str, Any]:
    """What the files of one capture, by layer, have in common: facts, and whether they hold a ``gradient``.

    `UserError` unless the header of every layer's file is that of a capture of this model, all of one text.
    """
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
    assert seen is not None
    return seen


def _read(paths: Sequence[Path], experts: int, device: torch.device) -> tuple[dict[str, torch.Tensor], list[int]]:
    """Tensors of a layer's files, one after the other, in pages that a GPU copies from directly; tokens of each."""
    parts = [_read_file(path, experts) for path in paths]
    sizes = [len(part["hidden"]) for part in parts]
    joined = parts[0] if len(parts) == 1 else {name: torch.cat([p.pop(name) for p in parts]) for name in list(parts[0])}
    return {name: tensor.pin_memory() if device.type == "cuda" else tensor for name, tensor in joined.items()}, sizes


def _read_file(path: Path, experts: int) -> dict[str, torch.Tensor]:
    """A file's tensors in memory; `UserError` for data that is damaged."""
    for raw in tensors_of(path).values():
        raw.check()
    tensors = load_file(path)
    for name, tensor in tensors.items():
        if not (_in_range(tensor, experts) if name == "ids" else tensor.isfinite().all()):
            raise UserError(f"{path}: {name} holds what no expert or number is; {_FIX}")
    return tensors


def _in_range(expert_ids: torch.Tensor, experts: int) -> bool:
    return bool((expert_ids >= 0).all() and (expert_ids < experts).all())
