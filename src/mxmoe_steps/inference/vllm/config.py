"""The quantization method ``mxmoe`` of vLLM: what computes each layer of its model, and the names of its tensors."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from packaging.version import InvalidVersion, Version
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig, QuantizeMethodBase

from mxmoe_steps.errors import UserError
from mxmoe_steps.inference.vllm.blocks import place_of
from mxmoe_steps.models.adapters import Family, family_of
from mxmoe_steps.models.quantizer import METHOD, MixedPrecisionConfig
from mxmoe_steps.schemes import SHARED

OLDEST, TOO_NEW = "0.25.1", "0.34"  # of vLLM

_LAYER = re.compile(r"(?:^|(?<!mtp)\.)layers\.(\d+)\.")


def check_version(found: str) -> None:
    """`UserError` unless this is a version of vLLM that has what is used here."""
    try:
        works = Version(OLDEST) <= Version(found) < Version(TOO_NEW)
    except InvalidVersion:  # "dev", of a source tree that was not built
        works = False
    if not works:
        raise UserError(f"vLLM {found}: packed checkpoints need vLLM from {OLDEST} up to and not including {TOO_NEW}")


class PackedConfig(QuantizationConfig):
    """What ``quantization_config`` of a checkpoint's ``config.json`` says; see `mxmoe_steps.models.quantization`."""

    def __init__(self, stated: Mapping[str, Any]) -> None:
        super().__init__()
        self.checkpoint = MixedPrecisionConfig(**stated)
        self.model: dict[str, Any]  # config.json
        self.family: Family
        self.layers: dict[int, Any] = {}  # their `PackedLayer`s
        # Of the model that is made. A draft model, of layers that predict tokens ahead, has none.
        self.layers_stored = frozenset(map(int, self.checkpoint.blocks))

    def get_name(self) -> str:
        """As in ``quant_method``."""
        return METHOD

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        """Reference arithmetic computes in any."""
        return [torch.bfloat16, torch.float16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        """Reference arithmetic runs anywhere."""
        return 0

    @staticmethod
    def get_config_filenames() -> list[str]:
        """It is all in config.json."""
        return []

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "PackedConfig":
        """`UserError` for a version of vLLM or of the checkpoint that is not supported."""
        from vllm import __version__

        check_version(__version__)
        return cls(config)

    def maybe_update_config(self, model_name: str, hf_config: Any = None, revision: str | None = None) -> None:
        """vLLM tells the model's config, before it builds anything; `UserError` for one of no family."""
        if hf_config.model_type.endswith("_mtp"):  # a draft model with a config of its own
            self.layers_stored = frozenset()
            return
        self.model = hf_config.to_dict()
        self.family = family_of(Path(model_name), self.model)

    def get_checkpoint_weight_mapper(self) -> Any:
        """Static in the base class, called on the instance."""
        from mxmoe_steps.inference.vllm.stream import PackedTensors

        return PackedTensors(published=self.published)

    get_cache_scale_mapper = get_checkpoint_weight_mapper  # its name up to vLLM 0.31

    def published(self, name: str, tensor: torch.Tensor) -> str | None:
        """None where the tensor is taken, else its name as vLLM's classes know it: they read what is published, and a
        packed checkpoint names the decoder as transformers does."""
        if not self.layers_stored:
            return name
        if self.take(name, tensor):
            return None
        decoder = f"{self.family.decoder}."
        return self.family.prefixes[0] + name.removeprefix(decoder) if name.startswith(decoder) else name

    def take(self, name: str, tensor: torch.Tensor) -> bool:
        """Whether a tensor of the checkpoint is of a packed block; what this rank keeps of it is kept then."""
        from vllm.distributed import get_pp_group

        place = place_of(name, self.family, self.layers_stored)
        if place is None:
            return False
        layer, expert, block, part = place
        if layer in self.layers:
            self.layers[layer].load(expert, block, part, tensor)
        elif get_pp_group().world_size == 1:
            raise UserError(f"layer {layer}: vLLM's model class asks no quantization method for its experts")
        return True

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> QuantizeMethodBase | None:
        """What computes vLLM's ``layer``; None: what does so without quantization."""
        from vllm.model_executor.layers.fused_moe import RoutedExperts
        from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod

        from mxmoe_steps.inference.vllm.routed import PackedExpertsMethod
        from mxmoe_steps.inference.vllm.shared import PackedLinearMethod

        if self.layers and all(packed.is_loaded for packed in self.layers.values()):
            self.layers_stored = frozenset()  # a draft model is made after the model, with this config
        number = self._layer_number(prefix)
        if isinstance(layer, RoutedExperts):
            if number is None:
                return None
            return PackedExpertsMethod(layer.moe_config, self._packed_layer(number))
        if not isinstance(layer, LinearBase):
            return None
        if number is not None and (blocks := self._shared_blocks(number, prefix)):
            return PackedLinearMethod(self._packed_layer(number), blocks)
        return UnquantizedLinearMethod()

    def _shared_blocks(self, number: int, prefix: str) -> tuple[str, ...]:
        """Blocks of the layer's shared expert that the linear layer ``prefix`` has; none if it is of something else."""
        from mxmoe_steps.inference.vllm.shared import BLOCKS_OF

        *_, module, name = prefix.split(".")
        is_shared = module in (self.family.shared, self.family.stored_shared)  # vLLM's classes name it as published
        return BLOCKS_OF.get(name, ()) if is_shared and str(SHARED) in self.checkpoint.blocks[str(number)] else ()

    def _layer_number(self, prefix: str) -> int | None:
        """Of the layer with packed experts that ``prefix`` is in. Those of multi-token prediction stay 16-bit."""
        found = _LAYER.search(prefix)
        return int(found[1]) if found and int(found[1]) in self.layers_stored else None

    def _packed_layer(self, number: int) -> Any:
        from mxmoe_steps.inference.vllm.layer import PackedLayer

        if number not in self.layers:
            stated = self.checkpoint.blocks[str(number)]
            schemes = {int(expert): self.checkpoint.of(number, int(expert)) for expert in stated}
            rotated = self.checkpoint.rotation is not None
            self.layers[number] = PackedLayer(number, schemes, rotated, self.family, self.family.text(self.model))
        return self.layers[number]
