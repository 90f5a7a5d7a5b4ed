"""MoE modules of a loaded model on the GPU kernels: which of them can, and their replacement.

The others keep the reference arithmetic of `mxmoe_steps.models.packed`, and one log line says which layers and why.
"""

import importlib.util
import logging
from collections.abc import Iterable, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mxmoe_steps.errors import UserError
from mxmoe_steps.gating import Gating
from mxmoe_steps.inference.reading import reader
from mxmoe_steps.inference.top_k import TopKByMaxima
from mxmoe_steps.kernels.architectures import require
from mxmoe_steps.kernels.moe_layer import IN_KERNEL_ORDER, MoeLayer
from mxmoe_steps.kernels.plan import LayerPlan, plan_layer
from mxmoe_steps.kernels.stacks import Place
from mxmoe_steps.models.adapters import Family, family_of
from mxmoe_steps.models.finite import BadNumbersError
from mxmoe_steps.models.gating import kernel_gating
from mxmoe_steps.models.operators import define, register
from mxmoe_steps.models.packed import StoredBlock, stored_block
from mxmoe_steps.schemes import SHARED

log = logging.getLogger("mxmoe_steps")


def _experts(layer: MoeLayer, hidden: torch.Tensor, expert_ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Routed and shared experts of hidden states [T, H], expert ids and their weights [T, k]."""
    if hidden.device != layer.device:
        raise UserError(
            f"the experts are in kernel order on {layer.device}, their input is on {hidden.device};"
            " load the checkpoint again for that device"
        )
    return layer(hidden, expert_ids, weights)


_experts_on_kernels = define(
    "experts_on_kernels(Tensor hidden, Tensor expert_ids, Tensor weights, int number) -> Tensor", _experts
)


class KernelMoe(nn.Module):
    """A MoE module whose experts, routed and shared, are a `MoeLayer`; the router stays the model's own. Computes on
    bfloat16 hidden states.
    """

    def __init__(self, moe: nn.Module, family: Family, layer: MoeLayer) -> None:
        super().__init__()
        self.layer, self.number = layer, register(layer)
        self.family = family
        self.factor: float | None = None if family.routed_factor is None else getattr(moe, family.routed_factor)
        for name in (family.router, family.shared_gate):
            if name is not None:
                self.add_module(name, moe.get_submodule(name))
        if family.router_bias is not None:
            bias = getattr(moe, family.router_bias, None)
            hold: Any = self.register_parameter if isinstance(bias, nn.Parameter) else self.register_buffer
            hold(family.router_bias, bias)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """[..., H] to [..., H], and router weights where the model's own module returns more."""
        tokens = hidden.reshape(-1, hidden.shape[-1])
        with TopKByMaxima() if torch.compiler.is_compiling() else nullcontext():
            weights, expert_ids = self._route(tokens)
        if self.family.scales_inputs:
            out = self._of_scaled(tokens, expert_ids, weights)
        else:
            out = _experts_on_kernels(self.layer, tokens.bfloat16(), expert_ids, weights, key=self.number)
        out = out.to(hidden.dtype).view(hidden.shape)
        return (out, weights) if self.family.moe_returns_more else out

    def _route(self, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Weights and expert ids [T, k]."""
        router: Any = getattr(self, self.family.router)
        if self.family.scales_inputs:
            scores, _ = router(tokens)  # of all experts; those that are not chosen have 0
            return scores.topk(router.top_k)
        _, weights, expert_ids = router(*self._routed_by(tokens))
        return weights if self.factor is None else weights * self.factor, expert_ids

    def _of_scaled(self, tokens: torch.Tensor, expert_ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """A token for every choice, times its weight, and one for the shared expert, which is the layer's last."""
        last = torch.full_like(expert_ids[:, :1], self.layer.plan.experts - 1)
        expert_ids = torch.cat([expert_ids, last], 1)
        scaled = torch.cat([tokens[:, None] * weights[..., None], tokens[:, None]], 1)
        once = torch.ones(expert_ids.numel(), 1, dtype=torch.bfloat16, device=tokens.device)
        rows = scaled.flatten(0, 1).bfloat16()
        out = _experts_on_kernels(self.layer, rows, expert_ids.view(-1, 1), once, key=self.number)
        return out.view(scaled.shape).sum(1)

    def _routed_by(self, tokens: torch.Tensor) -> list[torch.Tensor]:
        """What the family's router is called with."""
        bias = [] if self.family.router_bias is None else [getattr(self, self.family.router_bias)]
        return [tokens.unsqueeze(0) if self.family.batched_router else tokens, *bias]

    def _save_to_state_dict(self, *_: Any) -> None:
        raise UserError(IN_KERNEL_ORDER)


def expert_modules(moe: nn.Module, family: Family) -> dict[int, nn.Module]:
    """Number -> module of gate_proj, up_proj and down_proj, of a transformers MoE module with packed experts."""
    routed = dict(enumerate(moe.get_submodule("experts").children()))
    return routed if family.shared is None else routed | {SHARED: moe.get_submodule(family.shared)}


def blocks_of(moe: nn.Module, family: Family, where: str) -> dict[Place, StoredBlock]:
    """The blocks of a transformers MoE module with packed experts; ``where``: how messages call the module."""
    return {
        (number, block): stored_block(expert.get_submodule(f"{block}_proj"), f"{where}, expert {number}, {block}")
        for number, expert in expert_modules(moe, family).items()
        for block in family.own_blocks
    }


def kernel_blocks(moe: nn.Module, family: Family, where: str) -> dict[Place, StoredBlock]:
    """`blocks_of` as a layer on the kernels numbers their experts. Where router weights multiply inputs, the shared
    expert is one more routed one: it alone sees tokens as they are."""
    blocks = blocks_of(moe, family, where)
    if not family.scales_inputs:
        return blocks
    downs = [block for (_, kind), block in blocks.items() if kind == "down"]
    if len({down.in_features for down in downs}) > 1:
        raise UserError("router weights multiply inputs, and the shared expert is of another width than the others")
    return {(number % len(downs), kind): block for (number, kind), block in blocks.items()}


def plan_of(blocks: Mapping[Place, StoredBlock], family: Family, gating: Gating, elsewhere: bool = False) -> LayerPlan:
    """The launches of a layer of packed ``blocks``; `UserError` says why there are no kernels for it.

    ``blocks``: of experts numbered from 0, and of `SHARED` if there is one; ``elsewhere``: other GPUs have more, see
    `LayerPlan`.
    """
    if family.without_kernels:
        raise UserError(family.without_kernels)
    schemes = {}
    for number in {number: None for number, _ in blocks}:
        *_, up, down = own = [blocks[number, block].scheme for block in family.own_blocks]
        schemes[number] = (own[0], up, down)
    down_proj = blocks[0, "down"]
    shared = blocks.get((SHARED, "down"), down_proj)
    widths = down_proj.out_features, down_proj.in_features, shared.in_features
    rotated = any(block.rotated for block in blocks.values())
    return plan_layer(schemes, *widths, elsewhere, gating, rotated)


def check_hardware(device: torch.device, dtype: torch.dtype) -> None:
    """`UserError` if the kernels do not run there, on hidden states of that precision."""
    if device.type != "cuda":
        raise UserError(f"on the {device.type}")
    require(torch.cuda.get_device_capability(device), torch.cuda.get_device_name(device))
    if dtype != torch.bfloat16:
        raise UserError(f"the kernels compute in bfloat16, not in {str(dtype).removeprefix('torch.')}")
    if importlib.util.find_spec("tvm_ffi") is None:
        raise UserError("the extra [cuda] is not installed: pip install 'mxmoe-steps[cuda]'")


def layer_on_kernels(
    blocks: Mapping[Place, StoredBlock],
    family: Family,
    gating: Gating,
    device: torch.device,
    gate: torch.Tensor | None = None,
    elsewhere: bool = False,
) -> MoeLayer:
    """`plan_of` these blocks with their weights in kernel order on ``device``, or its `UserError`.

    ``gate``: weight [1, H] of the shared expert's gate, if it has one. `BadNumbersError` names a block that holds no
    numbers.
    """

    def bias(expert: int, block: str) -> torch.Tensor:
        return blocks[expert, block].parts["bias"]

    plan = plan_of(blocks, family, gating, elsewhere)
    return MoeLayer(plan, reader(blocks, device), device, gate, biases=bias if gating.biased else None)


def _replacement(moe: nn.Module, family: Family, gating: Gating, device: torch.device, where: str) -> KernelMoe:
    router = next(moe.get_submodule(family.router).parameters())
    check_hardware(device, router.dtype)
    gate: Any = None if family.shared_gate is None else moe.get_submodule(family.shared_gate).to(device)
    gate_weight = None if gate is None else gate.weight.detach()
    blocks = kernel_blocks(moe, family, where)
    return KernelMoe(moe, family, layer_on_kernels(blocks, family, gating, device, gate_weight))


def use_kernels(model: Any, layers: Iterable[int], device: torch.device | None = None) -> bool:
    """Move the experts of ``layers`` to the kernels, where there are any for them; log what runs what.

    ``device``: by default each layer's own. Returns whether all of them run the kernels now.
    """
    config = model.config.get_text_config().to_dict()
    family = family_of(Path(model.name_or_path), model.config.to_dict())
    gating = kernel_gating(family, config)
    moved: list[int] = []
    stayed: dict[str, list[int]] = {}
    for layer in layers:
        path = family.moe_path(layer)
        moe = model.get_submodule(path)
        if isinstance(moe, KernelMoe):
            continue
        here = device or next(moe.get_submodule(family.router).parameters()).device
        try:
            replacement = _replacement(moe, family, gating, here, f"{model.name_or_path}: layer {layer}")
        except BadNumbersError:
            raise
        except UserError as error:
            stayed.setdefault(str(error), []).append(layer)
            continue
        model.set_submodule(path, replacement)
        moved.append(layer)
    parts = [f"layers {_ranges(moved)} run the GPU kernels"] if moved else []
    parts += [f"layers {_ranges(numbers)} run reference arithmetic ({why})" for why, numbers in stayed.items()]
    unexpected = stayed and (device or model.device).type == "cuda"
    if parts:
        log.log(logging.WARNING if unexpected else logging.INFO, "experts: %s", "; ".join(parts))
    return not stayed


def _ranges(numbers: list[int]) -> str:
    """``[0, 1, 2, 5]`` as ``0-2, 5``."""
    firsts = [number for number in numbers if number - 1 not in numbers]
    lasts = [number for number in numbers if number + 1 not in numbers]
    return ", ".join(f"{low}" if low == high else f"{low}-{high}" for low, high in zip(firsts, lasts, strict=True))
