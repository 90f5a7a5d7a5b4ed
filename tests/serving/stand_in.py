"""What stands in on a CPU for GPU kernels, ours and vLLM's, so that what is around them can be tested there."""

import sys
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch

from mxmoe_steps.kernels.plan import LayerPlan
from mxmoe_steps.kernels.reference import product
from mxmoe_steps.quantizers.hadamard import rotate
from mxmoe_steps.schemes import BLOCKS, SHARED


class Kernels:
    """`MoeLayer` in torch, exact, on the CPU."""

    calls = 0

    def __init__(
        self, plan: LayerPlan, read: Any, device: torch.device, gate: torch.Tensor | None, biases: Any = None
    ) -> None:
        self.plan, self.gate, self.experts = plan, gate, plan.experts - plan.elsewhere
        numbers = [*range(self.experts), *([SHARED] if plan.slices else [])]
        places = [(number, block) for number in numbers for block in BLOCKS]
        stacks = read([[place] for place in places])
        self.weights = {place: self._dense(stack[0]) for place, stack in zip(places, stacks, strict=True)}
        self.biases = {place: 0.0 if biases is None else biases(*place).clone() for place in self.weights}

    def _dense(self, block: Any) -> torch.Tensor:
        if isinstance(block, torch.Tensor):
            return block.float()
        return rotate(block.dequantize()) if self.plan.rotated else block.dequantize()

    def _run(self, expert: int, x: torch.Tensor) -> torch.Tensor:
        def linear(block: str, rows: torch.Tensor) -> torch.Tensor:
            return rows @ self.weights[expert, block].T + self.biases[expert, block]

        return linear("down", product(self.plan.gating, linear("gate", x), linear("up", x)))

    def __call__(self, x: torch.Tensor, expert_ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        assert expert_ids.dtype == torch.int64
        Kernels.calls += 1
        out = torch.zeros_like(x)
        for expert in range(self.experts):
            out += self._run(expert, x) * (weights * (expert_ids == expert)).sum(-1, keepdim=True)
        if self.plan.slices:
            out += self._run(SHARED, x) * (1 if self.gate is None else (x @ self.gate.T).sigmoid())
        return out


def stand_in(replace: Callable[[Any, str, Any], Any] = setattr) -> None:
    """As if the CPU were a Hopper GPU."""
    from vllm.model_executor.layers import utils

    from mxmoe_steps.inference import gpu
    from mxmoe_steps.inference.vllm import layer

    replace(layer, "check_hardware", lambda *_: None)
    replace(gpu, "MoeLayer", Kernels)
    replace(Kernels, "calls", 0)
    # On a CPU vLLM packs 16-bit weights in an order of its own, and the kernels read those of a shared expert's gate.
    replace(utils, "dispatch_cpu_unquantized_gemm", _keep_order)


def _keep_order(linear: Any, **_: Any) -> None:
    linear.cpu_linear = torch.nn.functional.linear


def fill_cpu_gaps(replace: Callable[[Any, str, Any], Any] = setattr) -> None:
    """What vLLM 0.32 has for GPUs and not for CPUs: experts without a gate, router corrections without groups, and a
    start with numba imported, as its class of Kimi K2.5 does: it looks into every module, and fails on llvmlite's."""
    from vllm.model_executor.layers.fused_moe.config import FusedMoEConfig
    from vllm.model_executor.layers.fused_moe.router.cpu_router import CPURouter
    from vllm.triton_utils import dispatcher

    check, routing, rebind = FusedMoEConfig.__post_init__, CPURouter._compute_routing, dispatcher._rebind_kernels

    def unchecked(config: Any) -> None:
        with suppress(NotImplementedError):
            check(config)

    def corrected(router: Any, hidden: torch.Tensor, logits: torch.Tensor, kind: Any, **more: Any) -> Any:
        if router.use_grouped_topk or router.custom_routing_function or router.scoring_func == "sqrtsoftplus":
            return routing(router, hidden, logits, kind, **more)
        scores = logits.float().softmax(-1) if router.scoring_func == "softmax" else logits.float().sigmoid()
        bias = 0 if router.e_score_correction_bias is None else router.e_score_correction_bias
        expert_ids = (scores + bias).topk(router.top_k, -1).indices
        weights = scores.gather(-1, expert_ids)
        if router.renormalize:
            weights = weights / weights.sum(-1, keepdim=True)
        return weights * router.routed_scaling_factor, expert_ids.to(torch.int32)

    def rebind_others(overrides: Any) -> None:
        hidden = {name: sys.modules.pop(name) for name in list(sys.modules) if name.startswith("llvmlite")}
        rebind(overrides)
        sys.modules.update(hidden)

    replace(FusedMoEConfig, "__post_init__", unchecked)
    replace(dispatcher, "_rebind_kernels", rebind_others)
    replace(CPURouter, "_compute_routing", corrected)
