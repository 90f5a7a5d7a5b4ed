"""A whole MoE layer on the GPU: hidden states to hidden states, every block under its own scheme.

    sort -> dispatch (+ quantize) -> gate/up grouped GEMM -> SwiGLU (+ quantize) -> down grouped GEMM -> combine

Six launches, whatever the mixture; the router stays the model's own. Where gate and up have the same scheme in every
expert, their launch ends with SwiGLU: then the fourth only quantizes, or is left out where down blocks read bfloat16.
The gate of a shared expert is multiplied where its tokens are dispatched. Where experts are no plain SwiGLU, the fourth
launch is `activate.Activate`; biases of gate and up are added there, those of down in the last launch. Rotated inputs
of packed blocks are made in float32 where they are rounded, in the second and the fourth launch.
Between launches lie bfloat16 gate and up (if SwiGLU is one), bfloat16 or 8-bit products, and bfloat16 rows of the down
blocks; sums are float32. Nothing waits for the GPU. What launches own is made with the layer, so that its first call
can be captured in a CUDA graph.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

from mxmoe_steps.errors import UserError
from mxmoe_steps.kernels.architecture import Architecture, Configuration
from mxmoe_steps.kernels.build import Kernel, TokenKernel
from mxmoe_steps.kernels.launch import (
    Activations,
    GroupGemm,
    GroupGemmKernel,
    architecture_of,
    check_device,
    check_tensor,
    problem_table,
    processors,
)
from mxmoe_steps.kernels.layouts import entries_at_once
from mxmoe_steps.kernels.limits import MAX_ENTRIES
from mxmoe_steps.kernels.plan import LaunchPlan, LayerPlan
from mxmoe_steps.kernels.routing import Routed, activate, combine, dispatch, prepare, quantize, sort_by_expert, swiglu
from mxmoe_steps.kernels.stacks import Read, stack
from mxmoe_steps.kernels.together import build_together

ReadBias = Callable[[int, str], torch.Tensor]  # a block to its bias [N]

MOST_TOKENS = 32768  # at a time: bounds the intermediates, and 32-bit offsets into them
MOST_ELEMENTS = 2**30
MOST_PROCESSES = 8  # that compile

IN_KERNEL_ORDER = "the experts are in kernel order; copy the checkpoint, or load it on the CPU to save it"


@dataclass(frozen=True)
class LayerGemm:
    """One of the layer's grouped GEMMs on a GPU; ``columns``: width of a row of its output; ``gemms`` by phase.

    ``zeroed``: rows that no expert here writes are zero.
    """

    plan: LaunchPlan
    by_warp: bool
    columns: int
    needs: torch.Tensor
    gemms: dict[str, GroupGemm]
    zeroed: bool

    def __call__(self, activations: dict[str, Activations], routed: Routed) -> torch.Tensor:
        """bfloat16 [rows, columns] from the operands [rows, K]."""
        device = routed.offsets.device
        experts = routed.offsets.shape[0] - 1 - routed.slices
        phase = routed.architecture.phase_for(
            routed.expert_ids.numel(), experts, routed.slices, self.plan.strips, processors(device), self.by_warp
        )
        new = torch.zeros if self.zeroed else torch.empty
        out = new(routed.rows, self.columns, dtype=torch.bfloat16, device=device)
        return self.gemms[phase](activations, routed.offsets, out)


class MoeLayer:
    """The experts of one layer in kernel order on ``device``."""

    def __init__(
        self,
        plan: LayerPlan,
        read: Read,
        device: torch.device,
        gate: torch.Tensor | None = None,
        architecture: Architecture | None = None,
        biases: ReadBias | None = None,
    ) -> None:
        """Arrange the blocks that ``read`` returns, each once; at most one stack is in memory twice.

        ``gate``: weight of the shared expert's gate, bfloat16 [1, hidden] on ``device``, if it has one.
        ``architecture``: by default that of ``device``. ``biases``: of a plan whose gating is biased. `UserError` if
        the architecture's kernels do not run the plan.
        """
        self.architecture = architecture or architecture_of(device)
        plan.check(self.architecture)
        if gate is not None:
            check_tensor("the shared expert's gate", gate, torch.bfloat16, 2, device, (1, plan.hidden))
        self.plan, self.device, self.gate = plan, device, gate
        columns = plan.intermediate * (1 if plan.gate_up.gated else plan.gating.columns)
        self.inner_biases: torch.Tensor | None = None
        self.down_biases: torch.Tensor | None = None
        if biases is not None:
            self.inner_biases, self.down_biases = self._biases(biases)
        names = (*self.architecture.token_kernels, *plan.token_kernels)
        gemms = [gemm for launch in (plan.gate_up, plan.down) for gemm in launch.kernels(self.architecture).values()]
        _build((*(TokenKernel(name, self.architecture) for name in names), *gemms))
        with torch.cuda.device(device):
            prepare(device, names, self.architecture)
            self.gate_up = self._prepare(plan.gate_up, columns, read)
            self.down = self._prepare(plan.down, plan.hidden, read)

    def __deepcopy__(self, _: dict[int, Any]) -> "MoeLayer":
        """A copy of a model has the same layer: it never changes."""
        return self

    def __reduce__(self) -> str:
        raise UserError(IN_KERNEL_ORDER)

    def __call__(self, x: torch.Tensor, expert_ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """Routed and shared experts' sum, bfloat16 [tokens, hidden].

        ``x``: bfloat16 [tokens, hidden]; ``expert_ids``: int64 [tokens, top_k], below ``plan.experts``; ``weights``:
        bfloat16 or float32, the same shape.
        """
        check_device(x, "x")
        tokens, top_k = expert_ids.shape
        check_tensor("x", x, torch.bfloat16, 2, self.device, (tokens, self.plan.hidden))
        check_tensor("expert ids", expert_ids, torch.int64, 2, self.device)
        kind = torch.bfloat16 if weights.dtype == torch.bfloat16 else torch.float32
        check_tensor("weights", weights, kind, 2, self.device, (tokens, top_k))
        entries = top_k + self.plan.slices
        if entries > MAX_ENTRIES:
            raise UserError(f"{entries} experts of a token, slices of a shared one included; at most {MAX_ENTRIES}")
        at_once = min(MOST_TOKENS, MOST_ELEMENTS // (entries * max(2 * self.plan.intermediate, self.plan.hidden)))
        if torch.cuda.current_device() != self.device.index:  # kernels go to the current device
            with torch.cuda.device(self.device):
                return self(x, expert_ids, weights)
        if 0 < tokens <= at_once:
            return self._run(x, expert_ids, weights)
        parts = zip(x.split(at_once), expert_ids.split(at_once), weights.split(at_once), strict=True)
        return torch.cat([self._run(*part) for part in parts]) if tokens else torch.empty_like(x)

    def _run(self, x: torch.Tensor, expert_ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        routed = self.sort(expert_ids)
        activations, logits = self.dispatch(x, routed)
        inner = self.activate(self.gate_up(activations, routed), routed)
        return self.combine(self.down(inner, routed), routed, weights, logits)

    def sort(self, expert_ids: torch.Tensor) -> Routed:
        """The router's choices [tokens, top_k], sorted by expert."""
        return sort_by_expert(expert_ids, self.plan.experts, self.plan.slices, self.architecture)

    def dispatch(self, x: torch.Tensor, routed: Routed) -> tuple[dict[str, Activations], torch.Tensor | None]:
        """The gate and up blocks' operands of ``x`` [tokens, hidden]; logits of the shared expert's gate."""
        up = self.gate_up
        return dispatch(x, routed, up.needs, up.plan.operands, self.gate, up.plan.rotated)

    def activate(self, gate_up: torch.Tensor, routed: Routed) -> dict[str, Activations]:
        """The down blocks' operands from the output of the gate/up launch: gate and up, or already their product."""
        gating, needs = self.plan.gating, self.down.needs
        operands, rotated = self.down.plan.operands, self.down.plan.rotated
        if not gating.plain:
            return activate(gate_up, routed, needs, operands, gating, self.inner_biases, rotated)
        act = quantize if self.gate_up.plan.gated else swiglu
        return act(gate_up, routed, needs, operands, rotated)

    def combine(
        self, rows: torch.Tensor, routed: Routed, weights: torch.Tensor, logits: torch.Tensor | None
    ) -> torch.Tensor:
        """The layer's output from the rows of the down blocks; ``logits``: of the shared expert's gate."""
        return combine(rows, routed, weights, logits, self.down_biases)

    def _biases(self, read: ReadBias) -> tuple[torch.Tensor, torch.Tensor]:
        """bfloat16 [experts, columns], of what enters `activate` and of the down blocks; zeros of experts elsewhere."""
        plan, blocks = self.plan, ("gate", "up") if self.plan.gating.gated else ("up",)

        def stack(*kinds: str) -> torch.Tensor:
            padding = 0 if kinds == ("down",) else plan.padding
            rows = [
                torch.cat([torch.nn.functional.pad(read(expert, kind).bfloat16(), (0, padding)) for kind in kinds])
                for expert in range(plan.experts - plan.elsewhere)
            ]
            return torch.stack([*rows, *([torch.zeros_like(rows[0])] if plan.elsewhere else [])]).to(self.device)

        return stack(*blocks), stack("down")

    def _prepare(self, launch: LaunchPlan, columns: int, read: Read) -> LayerGemm:
        plan, device = self.plan, self.device
        at_once = entries_at_once(plan.intermediate * (1 + launch.gated), plan.hidden)
        weights = [stack(read, sources, at_once, device) for sources in launch.stacks]
        problems = problem_table(launch.problems, weights, plan.experts + plan.slices, columns, device, launch.gated)
        needs = torch.tensor(launch.needs, dtype=torch.int32, device=device)
        kernels = launch.kernels(self.architecture)
        gemms = {phase: GroupGemm(_kernel(config), weights, problems) for phase, config in kernels.items()}
        zeroed = plan.elsewhere and launch is plan.down  # the sum reads all rows of a token
        return LayerGemm(launch, self.architecture.by_warp(launch.formats), columns, needs, gemms, zeroed)


@cache
def _build(kernels: tuple[Kernel, ...]) -> None:
    """Layers share kernels: what they need is compiled together, and looked for once."""
    build_together(kernels, min(MOST_PROCESSES, os.cpu_count() or 1))


@cache
def _kernel(config: Configuration) -> GroupGemmKernel:
    """Layers share kernels."""
    return GroupGemmKernel(config)
