"""Times of the MoE layers of checkpoints on a GPU, beside the original's experts in transformers.

Everything behind the router is timed: the whole layer, and each of its launches. All that is compared in a layer and a
step is captured first and then replayed in rounds of random order.
"""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from mxmoe_steps.errors import UserError
from mxmoe_steps.inference.gpu import blocks_of, layer_on_kernels
from mxmoe_steps.kernels.moe_layer import MoeLayer
from mxmoe_steps.kernels.plan import plan_layer
from mxmoe_steps.kernels.stacks import Blocks, Place
from mxmoe_steps.models.families import Family
from mxmoe_steps.models.gating import kernel_gating
from mxmoe_steps.models.streaming import StreamedModel
from mxmoe_steps.models.weights import read_block
from mxmoe_steps.quantizers.grid import round_to_nearest
from mxmoe_steps.schemes import ORIGINAL as SCHEME_OF_ORIGINAL
from mxmoe_steps.schemes import SHARED, Scheme
from mxmoe_steps.timing.stages import stages_of
from mxmoe_steps.timing.timer import Timer
from mxmoe_steps.timing.times import ORIGINAL, WHOLE
from mxmoe_steps.timing.traffic import Routing, sample_steps

_GATHERED = 16  # tokens up to which transformers' batched_mm is tried: it copies the weights of every chosen expert

log = logging.getLogger("mxmoe_steps")


@dataclass(frozen=True)
class Step:
    """What enters the experts of a layer: hidden states [T, H], expert ids int64 [T, k], router weights [T, k]."""

    x: torch.Tensor
    expert_ids: torch.Tensor
    weights: torch.Tensor


class Steps:
    """Sampled steps of a traced text; hidden states and router weights are random, times do not depend on them."""

    def __init__(self, routing: Routing, text: str, tokens: int, count: int, hidden: int, seed: int) -> None:
        self._routing, self._hidden, self._seed = routing, hidden, seed
        self._positions = sample_steps(routing.facts, [text], tokens, "auto", count, seed)

    def of(self, layer: int) -> Iterator[Step]:
        """The steps as they reach a layer."""
        generator = torch.Generator("cuda").manual_seed(self._seed)
        for text, positions in self._positions:
            ids = torch.from_numpy(self._routing.expert_ids(text, layer)[positions]).long().cuda()
            x = torch.randn(len(ids), self._hidden, device="cuda", generator=generator).bfloat16()
            weights = torch.rand(ids.shape, device="cuda", generator=generator).softmax(-1).bfloat16()
            yield Step(x, ids, weights)


def on_kernels(model: StreamedModel, number: int) -> MoeLayer:
    """A layer of a packed checkpoint on the kernels; `UserError` where there are none for it."""
    family = model.folder.family
    _check_routed(family)
    with model.loaded(model.layer_path(number)):
        moe = model.moe(number)
        device = next(moe.parameters()).device  # of the router, with its number
        gating = kernel_gating(family, model.folder.text)
        blocks = blocks_of(moe, family, f"{model.folder.path}: layer {number}")
        return layer_on_kernels(blocks, family, gating, device, _shared_gate(moe, family))


def under_one_scheme(original: StreamedModel, scheme: Scheme, number: int) -> MoeLayer:
    """A layer of the original on the kernels, all its blocks rounded to nearest; `UserError` where there are none.

    Within ``original.loaded(original.layer_path(number))``.
    """
    folder, moe = original.folder, original.moe(number)
    family, device = folder.family, next(moe.parameters()).device
    _check_routed(family)
    if family.without_kernels:
        raise UserError(family.without_kernels)

    def read(batches: Sequence[Sequence[Place]]) -> Iterator[Blocks]:
        for batch in batches:
            weights = torch.cat([read_block(folder, number, [expert], block, device) for expert, block in batch])
            yield weights.bfloat16() if scheme == SCHEME_OF_ORIGINAL else round_to_nearest(weights.float(), scheme)

    def bias(expert: int, block: str) -> torch.Tensor:
        return read_block(folder, number, [expert], block, device, "bias")[0]

    experts, gating = folder.expert_ids(), kernel_gating(family, folder.text)
    hidden, width = folder.raw_block(number, 0, "down").shape
    shared = folder.raw_block(number, SHARED, "down").shape[1] if SHARED in experts else 0
    plan = plan_layer(dict.fromkeys(experts, (scheme,) * 3), hidden, width, shared, gating=gating)
    return MoeLayer(plan, read, device, _shared_gate(moe, family), biases=bias if gating.biased else None)


def _check_routed(family: Family) -> None:
    if family.scales_inputs:
        raise UserError("router weights multiply inputs, and what routes is not timed")


def _shared_gate(moe: Any, family: Family) -> torch.Tensor | None:
    """A copy of the weight of the shared expert's gate, if there is one."""
    return None if family.shared_gate is None else moe.get_submodule(family.shared_gate).weight.detach().clone()


def in_transformers(moe: Any, family: Family, step: Step) -> Callable[[], torch.Tensor]:
    """Routed and shared experts of the original's MoE module."""

    def run() -> torch.Tensor:
        routed: torch.Tensor = moe.experts(step.x, step.expert_ids, step.weights)
        if family.shared is None:
            return routed
        shared = moe.get_submodule(family.shared)(step.x)
        if family.shared_gate is not None:
            shared = torch.sigmoid(moe.get_submodule(family.shared_gate)(step.x)) * shared
        return routed + shared

    return run


def captured_original(
    timer: Timer, original: StreamedModel, number: int, step: Step
) -> dict[tuple[str, str], torch.cuda.CUDAGraph]:
    """The original's experts in each of transformers' implementations that can run them, as stages."""
    graphs = {}
    for name in ("grouped_mm", *(["batched_mm"] if len(step.x) <= _GATHERED else [])):
        original.config._experts_implementation = name
        try:
            run = in_transformers(original.moe(number), original.folder.family, step)
            graphs[ORIGINAL, name] = timer.capture(run)
        except (RuntimeError, NotImplementedError, KeyError) as error:
            log.warning("time: transformers' %s cannot run layer %d: %s", name, number, str(error).splitlines()[0])
    return graphs


def layer_times(
    timer: Timer, original: StreamedModel, layers: Mapping[str, MoeLayer], number: int, step: Step,
    rounds: int, repeats: int, seed: int,
) -> dict[tuple[str, str], list[float]]:  # fmt: skip
    """(checkpoint, stage) -> microseconds in every round; within ``original.loaded(original.layer_path(number))``."""
    graphs = captured_original(timer, original, number, step)
    runs: dict[tuple[str, str], Callable[[], object]] = {}  # they hold what the graphs read
    for name, layer in layers.items():
        stages = stages_of(layer, step.x, step.expert_ids, step.weights)
        stages[WHOLE] = lambda layer=layer: layer(step.x, step.expert_ids, step.weights)  # type: ignore[misc]
        runs |= {(name, stage): run for stage, run in stages.items()}
    graphs |= {key: timer.capture(run) for key, run in runs.items()}
    times: dict[tuple[str, str], list[float]] = {key: [] for key in graphs}
    for found in timer.rounds(graphs, rounds, repeats, seed):
        for key, us in found.items():
            times[key].append(us)
    return times


def usable_layers(makers: Mapping[str, Callable[[int], MoeLayer]], number: int, said: set[str]) -> dict[str, MoeLayer]:
    """A layer from everything that makes layers, by name; why one has no kernels is logged once, in ``said``."""
    layers = {}
    for name, make in makers.items():
        try:
            layers[name] = make(number)
        except UserError as error:
            reason = f"time: {name}: layer {number} is not timed: {error}"
            if name not in said:
                log.warning("%s", reason)
            said.add(name)
    return layers
