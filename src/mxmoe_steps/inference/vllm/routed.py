"""What vLLM calls for the routed experts of a layer: create their weights, load them, compute.

vLLM wants one tensor for each kind of weight of a layer, in which all experts lie. Ours have no common shape: its layer
gets no parameters, and their tensors do not come through its loaders (`mxmoe_steps.inference.vllm.stream`).
"""

from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from torch import nn
from vllm.config import get_current_vllm_config
from vllm.model_executor.layers.fused_moe import FusedMoEMethodBase, RoutedExperts
from vllm.model_executor.model_loader.weight_utils import default_weight_loader

from mxmoe_steps.errors import UserError
from mxmoe_steps.inference.vllm.blocks import Blocks, Share, place_in_experts
from mxmoe_steps.inference.vllm.layer import PackedLayer, packed_layer
from mxmoe_steps.schemes import BLOCKS, SHARED


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

    def create_weights(self, layer: RoutedExperts, num_experts: int, hidden_size: int, *_: Any, **__: Any) -> None:
        """No weights: what says which tensors are to come, for the current device."""
        packed, moe, parallel = self.packed, self.moe, self.moe.moe_parallel_config
        stored = len(packed.schemes.keys() - {SHARED})
        if moe.num_experts != stored:
            raise UserError(
                f"layer {packed.number}: vLLM has {moe.num_experts} routed experts, the checkpoint {stored}: packed"
                " experts are neither copied nor fused with shared ones"
            )
        if packed.family.scales_inputs != layer.apply_router_weight_on_input:
            raise UserError(f"layer {packed.number}: vLLM's router weights multiply other than the family's")
        if packed.family.scales_inputs and moe.experts_per_token != 1:
            raise UserError(f"layer {packed.number}: router weights multiply inputs, which takes one expert a token")
        share = Share(parallel.tp_rank, parallel.tp_size)
        inner, rotated, biased = moe.intermediate_size, packed.rotated, packed.family.biased
        shapes = {"gate": (inner, hidden_size), "up": (inner, hidden_size), "down": (hidden_size, inner)}
        here = [e for e in range(moe.num_experts) if layer._map_global_expert_id_to_local_expert_id(e) != -1]
        self.blocks = Blocks(packed.number, share)
        packed.blocks.append(self.blocks)
        for number in here:
            for block, scheme in zip(BLOCKS, packed.schemes[number], strict=True):
                if block in packed.family.own_blocks:
                    self.blocks.add(number, block, scheme, shapes[block], rotated, biased)
        packed.device = torch.empty(0).device
        if len(here) < moe.num_experts:
            packed.local = torch.full((moe.num_experts,), len(here))  # a number that no expert here has
            packed.local[here] = torch.arange(len(here))

        layer.load_weights = partial(self._load, dict(layer.named_parameters(recurse=False)))

    def _load(self, own: dict[str, nn.Parameter], weights: Iterable[tuple[str, torch.Tensor]]) -> list[str]:
        """In place of the layer's loader: its ``own`` parameters, and what begins with the number of an expert.

        The router's correction is such a parameter; vLLM 0.32 leaves it out (laguna). Blocks come here where the model
        tells vLLM's loader of no quantization method, as jamba.
        """
        loaded = []
        for name, tensor in weights:
            if name in own:
                default_weight_loader(own[name], tensor)
                loaded.append(name)
            else:
                self.packed.load(*place_in_experts(name), tensor)
        return loaded

    def process_weights_after_loading(self, layer: RoutedExperts) -> None:
        """Check that all have come."""
        blocks = self.packed.finish(self.blocks)
        del self.blocks
        here = {number: place for place, number in enumerate(dict.fromkeys(number for number, _ in blocks))}
        self.packed.routed = {(here[number], kind): block for (number, kind), block in blocks.items()}
        context = get_current_vllm_config().compilation_config.static_forward_context
        self.packed.runner = context[layer.layer_name]
        self.packed.loaded()

    def apply(
        self, layer: RoutedExperts, x: torch.Tensor, topk_weights: torch.Tensor, topk_ids: torch.Tensor, **_: Any
    ) -> torch.Tensor:
        """[T, H] of hidden states [T, H] and the router's choice [T, k]."""
        return packed_layer(self.packed, x, topk_ids, topk_weights, key=layer.layer_name)
