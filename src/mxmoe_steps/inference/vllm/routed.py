"""What vLLM calls for the routed experts of a layer: create their weights, load them, compute.

vLLM wants one tensor for each kind of weight of a layer, in which all experts lie. Ours have no common shape: empty
parameters stand under the names that it looks up, and their loaders hand each expert's tensor to `Blocks`.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn
from vllm.config import get_current_vllm_config
from vllm.model_executor.layers.fused_moe import FusedMoEMethodBase, RoutedExperts
from vllm.model_executor.utils import set_weight_attrs

from mxmoe_steps.errors import UserError
from mxmoe_steps.inference.vllm.blocks import Blocks, Share
from mxmoe_steps.inference.vllm.config import FLAT_NAME
from mxmoe_steps.inference.vllm.layer import PackedLayer, packed_layer
from mxmoe_steps.models.packed import MixedExpert, MixedExperts
from mxmoe_steps.schemes import BLOCKS, SHARED

_SHARDS = {"w1": "gate", "w3": "up", "w2": "down"}


class PackedExpertsMethod(FusedMoEMethodBase):
    """Routed experts that `packed` computes; the router and what adds ranks' results are vLLM's."""

    def __init__(self, moe: Any, packed: PackedLayer) -> None:
        super().__init__(moe)
        self.packed = packed

    @property
    def topk_indices_dtype(self) -> torch.dtype:
        """What the kernels sort."""
        return torch.int64

    def maybe_roundup_sizes(self, hidden_size: int, intermediate_size_per_partition: int, *_: Any) -> tuple[int, int]:
        """Nothing is padded."""
        return hidden_size, intermediate_size_per_partition

    def get_fused_moe_quant_config(self, layer: RoutedExperts) -> None:
        """For vLLM's own kernels only."""
        return None

    def create_weights(
        self, layer: RoutedExperts, num_experts: int, hidden_size: int, *_: Any, params_dtype: torch.dtype, **__: Any
    ) -> None:
        """Packed experts of this rank, empty, on the current device, and parameters that load them."""
        packed, moe, parallel = self.packed, self.moe, self.moe.moe_parallel_config
        stored = len(packed.schemes.keys() - {SHARED})
        if moe.num_experts != stored:
            raise UserError(
                f"layer {packed.number}: vLLM has {moe.num_experts} routed experts, the checkpoint {stored}: packed"
                " experts are neither copied nor fused with shared ones"
            )
        if layer.apply_router_weight_on_input:
            raise UserError(f"layer {packed.number}: vLLM multiplies inputs by router weights; packed experts do not")
        share = Share(parallel.tp_rank, parallel.tp_size)
        inner, rotated, biased = moe.intermediate_size, packed.rotated, packed.family.biased
        shapes = {"gate": (inner, hidden_size), "up": (inner, hidden_size), "down": (hidden_size, inner)}
        here = [e for e in range(moe.num_experts) if layer._map_global_expert_id_to_local_expert_id(e) != -1]
        self.blocks, experts = Blocks(packed.number, share), []
        for number in here:
            schemes = packed.schemes[number]
            expert = MixedExpert(schemes, hidden_size, inner // share.ranks, packed.gating, rotated, biased)
            for block, scheme in zip(BLOCKS, schemes, strict=True):
                self.blocks.add(number, block, scheme, shapes[block], expert.get_submodule(f"{block}_proj"))
            experts.append(expert)
        packed.experts = MixedExperts(experts)
        packed.device = torch.empty(0).device
        if len(here) < moe.num_experts:
            packed.local = torch.full((moe.num_experts,), len(here))  # a number that no expert here has
            packed.local[here] = torch.arange(len(here))

        def loader(part: str) -> Callable[..., bool | None]:
            def load(
                param: Any,
                loaded_weight: torch.Tensor,
                weight_name: str,
                shard_id: str,
                expert_id: int,
                return_success: bool = False,
            ) -> bool | None:
                kept = layer._map_global_expert_id_to_local_expert_id(expert_id) != -1
                if kept:
                    self.blocks.load(expert_id, _SHARDS[shard_id], part, loaded_weight)
                return kept if return_success else None

            return load

        for prefix in ("w13_", "w2_"):
            register_loaders(layer, prefix, params_dtype, loader)
        if packed.family.interleaved:
            for place, tensor in self.blocks.missing():
                register_loader(layer, FLAT_NAME.format(*place), tensor.dtype, partial(self._load, place))

    def _load(self, place: tuple[int, str, str], _: nn.Parameter, loaded_weight: torch.Tensor) -> None:
        self.blocks.load(*place, loaded_weight)

    def process_weights_after_loading(self, layer: RoutedExperts) -> None:
        """Check that all have come."""
        self.blocks.finish()
        context = get_current_vllm_config().compilation_config.static_forward_context
        self.packed.runner = context[layer.layer_name]
        self.packed.loaded()

    def apply(
        self, layer: RoutedExperts, x: torch.Tensor, topk_weights: torch.Tensor, topk_ids: torch.Tensor, **_: Any
    ) -> torch.Tensor:
        """[T, H] of hidden states [T, H] and the router's choice [T, k]."""
        return packed_layer(self.packed, x, topk_ids, topk_weights, key=layer.layer_name)


def register_loaders(layer: nn.Module, prefix: str, dtype: torch.dtype, loader: Callable[[str], Any]) -> None:
    """Empty parameters of ``layer`` under all names that a tensor may come by, each loaded by ``loader(part)``."""
    types = {"qweight": torch.uint8, "scales": torch.bfloat16, "zeros": torch.bfloat16, "weight": dtype, "bias": dtype}
    for part, kind in types.items():
        register_loader(layer, prefix + part, kind, loader(part))


def register_loader(layer: nn.Module, name: str, dtype: torch.dtype, load: Callable[..., Any]) -> None:
    """An empty parameter of ``layer`` whose tensors go to ``load``."""
    parameter = nn.Parameter(torch.empty(0, dtype=dtype), requires_grad=False)
    set_weight_attrs(parameter, {"weight_loader": load})
    layer.register_parameter(name, parameter)
