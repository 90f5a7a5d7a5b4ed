"""The six launches of a MoE layer one by one, as functions to time."""

from collections.abc import Callable

import torch

from mxmoe_steps.kernels.moe_layer import MoeLayer

STAGES = ("sort", "dispatch", "gate_up", "swiglu", "down", "combine")


def stages_of(
    layer: MoeLayer, x: torch.Tensor, expert_ids: torch.Tensor, weights: torch.Tensor
) -> dict[str, Callable[[], object]]:
    """Stage -> its launch on what the stages before it make of x [T, H], expert ids and router weights [T, k].

    Without ``swiglu`` where that is part of ``gate_up``.
    """
    up, down = layer.gate_up, layer.down
    routed = layer.sort(expert_ids)
    activations, logits = layer.dispatch(x, routed)
    products = up(activations, routed)
    inner = layer.activate(products, routed)
    rows = down(inner, routed)
    stages: dict[str, Callable[[], object]] = {
        "sort": lambda: layer.sort(expert_ids),
        "dispatch": lambda: layer.dispatch(x, routed),
        "gate_up": lambda: up(activations, routed),
        "swiglu": lambda: layer.activate(products, routed),
        "down": lambda: down(inner, routed),
        "combine": lambda: layer.combine(rows, routed, weights, logits),
    }
    if up.plan.gated and down.plan.operands == ("bf16",) and not down.plan.rotated:
        del stages["swiglu"]
    return stages
