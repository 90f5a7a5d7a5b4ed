"""A layer's text and its experts, from a streamed original, a packed checkpoint and hidden states at a border."""

import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch

from mxmoe_steps.errors import UserError
from mxmoe_steps.models.borders import Routing, hooked
from mxmoe_steps.models.families import ModelFolder
from mxmoe_steps.models.raw import tensors_of
from mxmoe_steps.models.rows import read_rows
from mxmoe_steps.models.shards import packed_name
from mxmoe_steps.models.streaming import StreamedModel
from mxmoe_steps.models.weights import open_tensors, read_block, read_gating
from mxmoe_steps.quantizers.grid import QuantizedWeight, from_tensors
from mxmoe_steps.schemes import BLOCKS, SHARED, Scheme, parse_scheme
from mxmoe_steps.tuning.experts import Block, Experts
from mxmoe_steps.tuning.layer import LayerText, TunedLayer, metric_of


class PackedFolder:
    """A checkpoint that `quantize` wrote of the model ``original``.

    ``schemes``: those of its blocks.
    """

    def __init__(self, folder: ModelFolder, original: ModelFolder) -> None:
        self.folder, self._original = folder, original
        stated = folder.config["quantization_config"]
        self.rotated = stated.get("rotation") is not None
        self.schemes, self._blocks = [parse_scheme(name) for name in stated["schemes"]], stated["blocks"]

    def scheme(self, layer: int, expert: int, block: str) -> Scheme:
        """Of one block."""
        return self.schemes[self._blocks[str(layer)][str(expert)][BLOCKS.index(block)]]

    def names(self, layer: int, expert: int, block: str) -> dict[str, str]:
        """Part -> tensor of one block that is packed."""
        shape = self._original.raw_block(layer, expert, block).shape
        parts = self.scheme(layer, expert, block).parts(*shape)
        return {part: packed_name(self.folder, layer, expert, block, part) for part in parts}

    def stack(self, layer: int, experts: Sequence[int], block: str, device: torch.device) -> QuantizedWeight:
        """A block of several experts that have one scheme; `UserError` for what are no numbers."""
        scheme = self.scheme(layer, experts[0], block)
        in_features = self._original.raw_block(layer, experts[0], block).shape[1]
        names = [self.names(layer, expert, block) for expert in experts]
        with open_tensors(self.folder, [name for parts in names for name in parts.values()]) as tensors:
            parts = {part: torch.stack([tensors[one[part]][...] for one in names]).to(device) for part in names[0]}
        stack = from_tensors(scheme, in_features, parts)
        good = (stack.scales > 0).flatten(1).all(1) & stack.dequantize().isfinite().flatten(1).all(1)
        for expert, is_good in zip(experts, good.tolist(), strict=True):
            if not is_good:
                raise UserError(
                    f"{self.folder.path}: layer {layer}, expert {expert}, {block}: holds NaN, infinity or a scale that"
                    " is not positive; run the quantize step again"
                )
        return stack


def read_layer(packed: PackedFolder, original: ModelFolder, layer: int, device: torch.device) -> TunedLayer:
    """The experts of a layer as the checkpoint has them."""
    routed = _read_experts(packed, original, layer, range(original.experts), device)
    shared = None if original.family.shared is None else _read_experts(packed, original, layer, [SHARED], device)
    return TunedLayer(routed, shared)


def _read_experts(
    packed: PackedFolder, original: ModelFolder, layer: int, experts: Sequence[int], device: torch.device
) -> Experts:
    """Experts of one width."""
    precision = torch.bfloat16 if device.type == "cuda" else torch.float32
    blocks = []
    for block in BLOCKS:
        by_scheme: dict[Scheme, list[int]] = {}
        for place, expert in enumerate(experts):
            by_scheme.setdefault(packed.scheme(layer, expert, block), []).append(place)
        parts = [
            (places, packed.stack(layer, [experts[place] for place in places], block, device))
            for scheme, places in sorted(by_scheme.items())
            if not scheme.is_original
        ]
        originals = read_block(original, layer, experts, block, device)
        blocks.append(Block(originals, parts, packed.rotated, precision))
    gating = read_gating(original, layer, experts, device)
    biases = read_block(original, layer, experts, "down", device, "bias").float() if original.family.biased else None
    return Experts(blocks, gating, biases)


def tuned_tensors(packed: PackedFolder, layer: int, tuned: TunedLayer) -> dict[str, torch.Tensor]:
    """What a checkpoint stores of a layer's blocks that were tuned, by name."""
    found = {}
    for experts, first in ((tuned.routed, 0), (tuned.shared, SHARED)):
        for name, block in zip(BLOCKS, experts.blocks if experts else (), strict=False):
            for places, blocks in block.tuned:
                stack = blocks.quantized()
                for number, place in enumerate(places):
                    tensors = stack[number].tensors()
                    for part, stored in packed.names(layer, first + place, name).items():
                        found[stored] = tensors[part].cpu()
    return found


@contextmanager
def silent(model: StreamedModel, layer: int) -> Iterator[None]:
    """Within the block the layer's experts add nothing to its output."""
    moe, family = model.moe(layer), model.folder.family
    with ExitStack() as stack:
        for name in ("experts", *([family.shared] if family.shared is not None else [])):
            module = moe.get_submodule(name)
            module.forward = lambda hidden, *_: torch.zeros_like(hidden)
            stack.callback(delattr, module, "forward")
        yield


@torch.no_grad()
def read_text(
    model: StreamedModel,
    layer: int,
    entering: Path,
    wanted: Path,
    captured: Sequence[Path],
    runs: Sequence[slice],
    held_out: int,
) -> LayerText:
    """The text at the border before a layer, brought to its experts; within ``model.loaded`` of the layer.

    ``entering``: hidden states of the tuned model; ``wanted``: those of the original that leave the layer;
    ``captured``: the layer's files that `capture` wrote, one a domain.
    """
    found: list[Routing] = []
    rest = []
    with silent(model, layer), hooked(model, layer, found.append):
        for run in runs:
            hidden = read_rows(entering, "hidden", run).to(model.device)
            rest.append(model.run_layer(layer, hidden).flatten(0, 1))
    hidden, expert_ids, weights = (torch.cat(tensors) for tensors in zip(*found, strict=True))
    gradients = [
        read_rows(file, "gradient", slice(None)).to(model.device) for file in captured if "gradient" in tensors_of(file)
    ]
    decoder_layer = model.decoder.layers[layer]
    factors = (getattr(decoder_layer, name, 1.0) for name in ("mlp_beta_factor", "residual_multiplier"))
    return LayerText(
        hidden=hidden,
        expert_ids=expert_ids.long(),
        weights=weights.float(),
        shared=model.shared_factor(layer, hidden),
        rest=torch.cat(rest),
        wanted=read_rows(wanted, "hidden", slice(None)).to(model.device).flatten(0, 1),
        factor=math.prod(map(float, factors)),  # of minimax and of granite
        metric=metric_of(gradients, hidden.shape[1]).to(model.device),
        held_out=held_out,
    )
