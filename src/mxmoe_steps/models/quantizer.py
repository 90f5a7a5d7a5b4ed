"""Packed modules in place of a transformers model's experts, as ``config.json`` describes them.

Beside the ``quantization_config`` (`mxmoe_steps.models.quantization`) stands an ``experts_implementation``
(`EXPERTS_IMPLEMENTATION`) that is defined here alone. transformers loads a model whose ``quant_method`` it does not
know without its experts, but refuses an unknown experts implementation.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from mxmoe_steps.errors import UserError
from mxmoe_steps.models.adapters import family_of
from mxmoe_steps.models.families import EXPERTS_IMPLEMENTATION
from mxmoe_steps.models.gating import gating_of
from mxmoe_steps.models.packed import MixedExperts, ScaledExperts, make_expert
from mxmoe_steps.models.packed_files import check_experts, check_tensors
from mxmoe_steps.models.quantization import checked_quantization
from mxmoe_steps.schemes import SHARED, Scheme, parse_scheme

METHOD = "mxmoe"


def _not_packed(*_: Any) -> torch.Tensor:
    """What an experts module runs that nothing has replaced: its weights are random."""
    raise UserError("config.json has lost the quantization_config of its packed experts; run the quantize step again")


ALL_EXPERTS_FUNCTIONS.register(EXPERTS_IMPLEMENTATION, _not_packed)


class MixedPrecisionConfig(QuantizationConfigMixin):
    """Scheme of every expert block, as stored in ``config.json``."""

    def __init__(self, **stated: Any) -> None:
        checked = checked_quantization(stated)
        self.quant_method = METHOD  # type: ignore[assignment]  # transformers knows its own methods only
        self.version: int = checked["version"]
        self.schemes: list[str] = checked["schemes"]
        self.blocks: dict[str, dict[str, list[int]]] = checked["blocks"]
        self.rotation: str | None = checked.get("rotation")

    def of(self, layer: int, expert: int) -> list[Scheme]:
        """Schemes of gate, up and down."""
        return [parse_scheme(self.schemes[number]) for number in self.blocks[str(layer)][str(expert)]]


class MixedPrecisionQuantizer(HfQuantizer):
    """Replaces experts modules before weights are loaded; the checkpoint's tensors then fit by name."""

    requires_calibration = True
    _shared: str | None = None  # module of the shared expert
    quantization_config: MixedPrecisionConfig
    packed_names: Mapping[str, str] = MappingProxyType({})  # of packed blocks' tensors in the model -> in its files

    def _process_model_before_weight_loading(
        self, model: Any, checkpoint_files: Sequence[str | Path] | None = None, **_: Any
    ) -> None:
        config, dtype = model.config, model.dtype
        config.experts_implementation = EXPERTS_IMPLEMENTATION  # `save_pretrained` writes attributes
        family = family_of(Path(model.name_or_path), config.to_dict())
        self._shared = family.shared
        config = config.get_text_config()
        gating = gating_of(family, config.to_dict())
        quantization = self.quantization_config
        rotated = quantization.rotation is not None
        check_experts(model, family, quantization.blocks)
        with torch.device("meta"):
            for layer, experts in quantization.blocks.items():
                moe = model.get_submodule(family.moe_path(int(layer)))
                down = moe.experts.down_proj
                inner = down[0].numel() // config.hidden_size
                moe.experts = (ScaledExperts if family.scales_inputs else MixedExperts)(
                    make_expert(
                        quantization.of(int(layer), expert), config.hidden_size, inner, gating, rotated, family.biased
                    )
                    for expert in range(len(experts) - (str(SHARED) in experts))
                )
                new = [moe.experts]
                if family.shared is not None:
                    old = getattr(moe, family.shared)
                    schemes = quantization.of(int(layer), SHARED)
                    new.append(make_expert(schemes, config.hidden_size, old.up_proj.out_features, gating, rotated))
                    setattr(moe, family.shared, new[-1])
                for parameter in (one for module in new for one in module.parameters()):
                    parameter.data = parameter.data.to(dtype)  # 16-bit blocks and biases are made in PyTorch's default
        if checkpoint_files:
            self.packed_names = check_tensors(model, family, sorted(map(int, quantization.blocks)), checkpoint_files)

    def update_weight_conversions(self, weight_conversions: list[Any], *_: Any) -> list[Any]:
        """Drop what stacks experts, for ours stay apart, and what renames the shared one, which has its name."""

        def is_ours(conversion: Any) -> bool:
            made, of = (" ".join(names) for names in (conversion.target_patterns, conversion.source_patterns))
            return ("experts." in of and "experts." in made) or (
                self._shared is not None and f"{self._shared}." in made
            )

        return [conversion for conversion in weight_conversions if not is_ours(conversion)]

    def is_serializable(self, *_: Any, **__: Any) -> bool:
        """``save_pretrained`` writes the packed tensors back."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Packed weights have no gradients."""
        return False
