"""A whole MoE layer on the GPU: hidden states to hidden states, every block under its own scheme.

    sort -> dispatch (+ quantize) -> gate/up grouped GEMM -> SwiGLU (+ quantize) -> down grouped GEMM -> combine

Six launches, whatever the mixture; the router stays the model's own. Where gate and up have the same scheme in every
expert, their launch ends with SwiGLU: then the fourth only quantizes, or is left out where down blocks read bfloat16.
Between launches lie bfloat16 gate and up (if SwiGLU is one), bfloat16 or 8-bit products, and bfloat16 rows of the down
blocks; sums are float32. Nothing waits for the GPU, and after the first call a call can be captured in a CUDA graph.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from operator import attrgetter
from typing import Any

import torch

from mxmoe_steps.kernels.formats import PHASES, KernelConfig
from mxmoe_steps.kernels.launch import Activations, GroupGemmKernel, problem_table, processors
from mxmoe_steps.kernels.layouts import PAD_CHUNKS, KernelWeights, gate_and_up, kernel_weights, original_weights
from mxmoe_steps.kernels.plan import LaunchPlan, LayerPlan, Source
from mxmoe_steps.kernels.routing import Routed, combine, dispatch, quantize, sort_by_expert, swiglu
from mxmoe_steps.quantizers.grid import QuantizedWeight

Block = QuantizedWeight | torch.Tensor  # [N, K]
Read = Callable[[int, str], Block]  # expert (`SHARED` for the shared one) and block kind to its weights

MOST_TOKENS = 32768  # at a time: bounds the intermediates, and 32-bit offsets into them
MOST_ELEMENTS = 2**30


@dataclass(frozen=True)
class LayerGemm:
    """One of the layer's grouped GEMMs, weights and problems on a GPU; ``columns``: width of a row of its output."""

    plan: LaunchPlan
    columns: int
    weights: list[KernelWeights]
    problems: torch.Tensor
    needs: torch.Tensor
    kernels: dict[str, GroupGemmKernel]

    def __call__(self, given: dict[str, Activations], routed: Routed) -> torch.Tensor:
        """bfloat16 [rows, columns] from the operands [rows, K]."""
        device = routed.offsets.device
        experts = routed.offsets.shape[0] - 1 - routed.shared
        phase = self.plan.phase(routed.chosen.numel(), experts, routed.shared, processors(device))
        out = torch.empty(routed.rows, self.columns, dtype=torch.bfloat16, device=device)
        return self.kernels[phase](given, self.weights, self.problems, routed.offsets, out)


class MoeLayer:
    """The experts of one layer in kernel order on ``device``."""

    def __init__(self, plan: LayerPlan, read: Read, device: torch.device) -> None:
        """Arrange the blocks that ``read`` returns, each once; at most one stack is in memory twice."""
        self.plan, self.device = plan, device
        columns = plan.intermediate if plan.gate_up.gated else 2 * plan.intermediate
        self.gate_up = _prepare(plan, plan.gate_up, columns, read, device)
        self.down = _prepare(plan, plan.down, plan.hidden, read, device)

    def __call__(
        self, x: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor, gate: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Routed and shared experts' sum, bfloat16 [tokens, hidden].

        ``x``: bfloat16 [tokens, hidden]; ``chosen``: int64 [tokens, top_k]; ``weights``: bfloat16 or float32, the
        same shape; ``gate``: bfloat16 [tokens], the logit of the shared expert's gate, if it has one.
        """
        per_token = (chosen.shape[1] + self.plan.slices) * max(2 * self.plan.intermediate, self.plan.hidden)
        at_once = min(MOST_TOKENS, MOST_ELEMENTS // per_token)
        with torch.cuda.device(self.device):  # kernels go to the current device
            if x.shape[0] <= at_once:
                return self._run(x, chosen, weights, gate)
            gates = [None] * len(x) if gate is None else gate.split(at_once)
            parts = zip(x.split(at_once), chosen.split(at_once), weights.split(at_once), gates, strict=False)
            return torch.cat([self._run(*part) for part in parts])

    def _run(
        self, x: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor, gate: torch.Tensor | None
    ) -> torch.Tensor:
        if not x.shape[0]:
            return torch.empty_like(x)
        up, down = self.gate_up, self.down
        routed = sort_by_expert(chosen, self.plan.experts, self.plan.slices)
        given = dispatch(x, routed, up.needs, up.plan.operands)
        return combine(down(self.activate(up(given, routed), routed), routed), routed, weights, gate)

    def activate(self, made: torch.Tensor, routed: Routed) -> dict[str, Activations]:
        """The down blocks' operands from what the gate/up launch made: gate and up, or already their product."""
        act = quantize if self.gate_up.plan.gated else swiglu
        return act(made, routed, self.down.needs, self.down.plan.operands)


@cache
def _kernel(config: KernelConfig) -> GroupGemmKernel:
    """Layers share kernels."""
    return GroupGemmKernel(config)


def _prepare(plan: LayerPlan, launch: LaunchPlan, columns: int, read: Read, device: torch.device) -> LayerGemm:
    weights = [_stack([_entries(read, source) for source in sources], device) for sources in launch.stacks]
    problems = problem_table(launch.problems, weights, plan.experts + plan.slices, columns, device, launch.gated)
    needs = torch.tensor(launch.needs, dtype=torch.int32, device=device)
    kernels = {phase: _kernel(launch.config(phase)) for phase in PHASES}
    return LayerGemm(launch, columns, weights, problems, needs, kernels)


def _entries(read: Read, source: Source) -> KernelWeights:
    """Kernel order of a block, cut into entries along its inner width: rows of gate and up, columns of down."""
    count = source.entries

    def cut(values: torch.Tensor) -> torch.Tensor:
        if source.block != "down":
            return values.unflatten(0, (count, -1))
        if values.shape[1] == 1:  # one scale for all columns
            return values.expand(count, *values.shape)
        return values.unflatten(1, (count, -1)).transpose(0, 1)

    blocks = ("gate", "up") if source.block == "gate_up" else (source.block,)
    given = [read(source.expert, block) for block in blocks]

    def entries(part: Callable[[Any], torch.Tensor]) -> torch.Tensor:
        parts = [cut(part(weight)) for weight in given]
        return parts[0] if len(parts) == 1 else gate_and_up(*parts)

    first = given[0]  # up has the same scheme
    if isinstance(first, torch.Tensor):
        return original_weights(entries(lambda weight: weight))
    zeros = None if first.zeros is None else entries(attrgetter("zeros"))
    codes, scales = entries(attrgetter("codes")), entries(attrgetter("scales"))
    return kernel_weights(QuantizedWeight(first.scheme, codes, scales, zeros))


def _stack(parts: Sequence[KernelWeights], device: torch.device) -> KernelWeights:
    """One stack of all entries of ``parts``, which have one format and one shape."""
    first = parts[0]
    data = [part.data.to(device) for part in parts]
    if first.format.decoded:
        pad = PAD_CHUNKS * first.format.chunk_bytes
        data = [*(each[:-pad] for each in data), data[0].new_zeros(pad)]
    scales = None
    if first.channel_scales is not None:
        scales = torch.cat([part.channel_scales.to(device) for part in parts if part.channel_scales is not None])
    entries = sum(part.entries for part in parts)
    return KernelWeights(first.format, entries, first.out_features, first.in_features, torch.cat(data), scales)
