"""What vLLM calls for the linear layers of a shared expert: gate and up beside each other, and down."""

from typing import Any

import torch
from torch import nn
from vllm.model_executor.layers.linear import LinearMethodBase

from mxmoe_steps.inference.vllm.blocks import Blocks, Share
from mxmoe_steps.inference.vllm.layer import PackedLayer
from mxmoe_steps.schemes import BLOCKS, SHARED

BLOCKS_OF = {"gate_up_proj": ("gate", "up"), **{f"{block}_proj": (block,) for block in BLOCKS}}  # of a linear layer


class PackedLinearMethod(LinearMethodBase):
    """Some ``blocks`` of the shared expert of a layer, whose results lie beside each other."""

    def __init__(self, packed: PackedLayer, blocks: tuple[str, ...]) -> None:
        self.packed, self.names = packed, blocks

    def create_weights(
        self,
        layer: Any,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        **_: Any,
    ) -> None:
        """No weights: what says which tensors are to come. ``layer.packed`` has the blocks that stay here."""
        ranks = input_size // input_size_per_partition * (output_size // sum(output_partition_sizes))
        share = Share(layer.tp_rank if ranks > 1 else 0, ranks)
        self.blocks = Blocks(self.packed.number, share)
        self.packed.blocks.append(self.blocks)
        schemes = dict(zip(BLOCKS, self.packed.schemes[SHARED], strict=True))
        for block, features in zip(self.names, output_partition_sizes, strict=True):
            shape = (features, input_size) if block == "down" else (features * ranks, input_size)
            self.blocks.add(SHARED, block, schemes[block], shape, self.packed.rotated)
        layer.packed = nn.ModuleDict()

    def process_weights_after_loading(self, layer: Any) -> None:
        """Check that all have come."""
        blocks = self.packed.finish(self.blocks)
        del self.blocks
        self.packed.shared |= blocks
        self.packed.shared_modules |= {kind: layer.packed for _, kind in blocks}
        self.packed.loaded()

    def apply(self, layer: Any, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """[..., K] to [..., N]."""
        return torch.cat([layer.packed[name](x) for name in self.names], -1)
