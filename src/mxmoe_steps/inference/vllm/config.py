"""The quantization method ``mxmoe`` of vLLM: what computes each layer of its model, and the names of its tensors."""

import re
from collections.abc import Mapping
from typing import Any

import torch
from packaging.version import Version
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig, QuantizeMethodBase

from mxmoe_steps.errors import UserError
from mxmoe_steps.models.adapters import FAMILIES, SERVED, Family
from mxmoe_steps.models.quantizer import METHOD, MixedPrecisionConfig
from mxmoe_steps.schemes import BLOCKS, SHARED

OLDEST, TOO_NEW = "0.25.1", "0.34"  # of vLLM

FLAT_NAME = "packed_{}_{}_{}"  # of a parameter that loads a part of a block of an expert
_LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.")


def check_version(found: str) -> None:
    """`UserError` unless this is a version of vLLM that has what is used here."""
    if not Version(OLDEST) <= Version(found) < Version(TOO_NEW):
        raise UserError(f"vLLM {found}: packed checkpoints need vLLM from {OLDEST} up to and not including {TOO_NEW}")


class PackedConfig(QuantizationConfig):
    """What ``quantization_config`` of a checkpoint's ``config.json`` says; see `mxmoe_steps.models.quantization`."""

    def __init__(self, stated: Mapping[str, Any]) -> None:
        super().__init__()
        self.checkpoint = MixedPrecisionConfig(**stated)
        self.model: dict[str, Any] = {}  # config.json
        self.layers: dict[int, Any] = {}  # their `PackedLayer`s
        self.names: set[tuple[str, ...]] = set()  # of a MoE module and of gate, up and down, in vLLM's model

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

    @property
    def family(self) -> Family:
        """Of the model."""
        return FAMILIES[self.model["model_type"]]

    def maybe_update_config(self, model_name: str, hf_config: Any = None, revision: str | None = None) -> None:
        """vLLM tells the model's config."""
        self.model = hf_config.to_dict()
        family = self.model.get("model_type")
        if family not in SERVED:
            raise UserError(f"{model_name}: model_type {family!r} is none of {', '.join(sorted(SERVED))}")

    def get_checkpoint_weight_mapper(self) -> Any:
        """Our names of routed experts, the same for every family, to those that vLLM's model class looks up.

        Static in the base class, called on the instance, once the model is built and has told `names`.
        """
        from vllm.model_executor.models.utils import WeightsMapper

        if self.family.interleaved:  # vLLM's loader of gpt_oss looks parameters up by these names
            flat = r".mlp.experts.routed_experts." + FLAT_NAME.format(r"\1", r"\2", r"\3")
            return WeightsMapper(orig_to_new_regex={re.compile(r"\.mlp\.experts\.(\d+)\.(\w+)_proj\.(\w+)$"): flat})
        regex = {
            re.compile(rf"\.mlp\.experts\.(\d+)\.{block}_proj\."): rf".{module}.experts.\1.{name}."
            for module, *names in self.names
            for block, name in zip(BLOCKS, names, strict=True)
        }
        return WeightsMapper(orig_to_new_regex=regex)

    get_cache_scale_mapper = get_checkpoint_weight_mapper  # its name up to vLLM 0.31

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> QuantizeMethodBase | None:
        """What computes vLLM's ``layer``; None: what does so without quantization."""
        from vllm.model_executor.layers.fused_moe import RoutedExperts
        from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod

        from mxmoe_steps.inference.vllm.routed import PackedExpertsMethod
        from mxmoe_steps.inference.vllm.shared import BLOCKS_OF, PackedLinearMethod

        number = self._layer_number(prefix)
        if isinstance(layer, RoutedExperts):
            if number is None:
                return None
            theirs = (layer.ckpt_gate_proj_name, str(layer.ckpt_up_proj_name), layer.ckpt_down_proj_name)
            if (names := (prefix.split(".")[-2], *theirs)) != ("mlp", "gate_proj", "up_proj", "down_proj"):
                self.names.add(names)
            return PackedExpertsMethod(layer.moe_config, self._packed_layer(number))
        if not isinstance(layer, LinearBase):
            return None
        *_, module, name = prefix.split(".")
        if number is not None and module == self.family.shared and str(SHARED) in self.checkpoint.blocks[str(number)]:
            return PackedLinearMethod(self._packed_layer(number), BLOCKS_OF[name])
        return UnquantizedLinearMethod()

    def _layer_number(self, prefix: str) -> int | None:
        """Of the layer with packed experts that ``prefix`` is in. Those of multi-token prediction stay 16-bit."""
        found = _LAYER.search(prefix)
        return int(found[1]) if found and found[1] in self.checkpoint.blocks else None

    def _packed_layer(self, number: int) -> Any:
        from mxmoe_steps.inference.vllm.layer import PackedLayer

        if number not in self.layers:
            stated = self.checkpoint.blocks[str(number)]
            schemes = {int(expert): self.checkpoint.of(number, int(expert)) for expert in stated}
            rotated = self.checkpoint.rotation is not None
            self.layers[number] = PackedLayer(number, schemes, rotated, self.family, self.model)
        return self.layers[number]
