"""The transformers quantizer ``mxmoe``: importing this module lets ``from_pretrained`` read our checkpoints.

``config.json`` carries ``quantization_config``::

    {"quant_method": "mxmoe", "version": 1, "schemes": ["w2a16_g128_asym", ...],
     "blocks": {"0": {"-1": [1, 1, 2], "0": [0, 0, 1], ...}, ...}, "rotation": "hadamard"}

``blocks[layer][expert]`` are the scheme numbers of gate, up and down; expert -1 is the shared expert. Where there is
a ``rotation``, every packed block multiplies inputs that `mxmoe_steps.quantizers.hadamard.rotate` has rotated.
"""

from pathlib import Path
from typing import Any

import torch
from torch.utils.hooks import RemovableHandle
from transformers import AutoModelForCausalLM
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.logging import disable_progress_bar
from transformers.utils.quantization_config import QuantizationConfigMixin

from mxmoe_steps.errors import UserError
from mxmoe_steps.inference.gpu import log, use_kernels
from mxmoe_steps.inference.modules import MixedExpert, MixedExperts
from mxmoe_steps.models.families import FAMILIES, moe_path
from mxmoe_steps.models.gating import gating_of
from mxmoe_steps.schemes import SHARED, Scheme, parse_scheme

METHOD = "mxmoe"
VERSION = 1


@register_quantization_config(METHOD)
class MixedPrecisionConfig(QuantizationConfigMixin):
    """Scheme of every expert block, as stored in ``config.json``."""

    def __init__(
        self,
        schemes: list[str],
        blocks: dict[str, dict[str, list[int]]],
        version: int,
        rotation: str | None = None,
        **_: Any,
    ) -> None:
        if version != VERSION:
            raise UserError(f"the checkpoint has mxmoe format version {version}; this release reads version {VERSION}")
        if rotation not in (None, "hadamard"):
            raise UserError(f"the checkpoint rotates inputs by {rotation!r}, which this release does not know")
        self.quant_method = METHOD  # type: ignore[assignment]  # transformers knows its own methods only
        self.schemes, self.blocks, self.version, self.rotation = schemes, blocks, version, rotation

    def of(self, layer: int, expert: int) -> list[Scheme]:
        """Schemes of gate, up and down."""
        return [parse_scheme(self.schemes[number]) for number in self.blocks[str(layer)][str(expert)]]


@register_quantizer(METHOD)
class MixedPrecisionQuantizer(HfQuantizer):
    """Replaces experts modules before weights are loaded; the checkpoint's tensors then fit by name."""

    requires_calibration = True
    quantization_config: MixedPrecisionConfig
    _hook: RemovableHandle | None = None

    def _process_model_before_weight_loading(self, model: Any, **_: Any) -> None:
        config = model.config
        family = FAMILIES[config.model_type]
        gating = gating_of(family, config.to_dict())
        quantization = self.quantization_config
        rotated = quantization.rotation is not None
        with torch.device("meta"):
            for layer, experts in quantization.blocks.items():
                moe = model.get_submodule(moe_path(int(layer)))
                inner = moe.experts.down_proj.shape[1 if family.interleaved else 2]
                moe.experts = MixedExperts(
                    MixedExpert(
                        quantization.of(int(layer), expert), config.hidden_size, inner, gating, rotated, family.biased
                    )
                    for expert in range(len(experts) - (str(SHARED) in experts))
                )
                if family.shared is not None and str(SHARED) in experts:
                    old = getattr(moe, family.shared)
                    schemes = quantization.of(int(layer), SHARED)
                    new = MixedExpert(schemes, config.hidden_size, old.gate_proj.out_features, gating, rotated)
                    setattr(moe, family.shared, new)

    def _process_model_after_weight_loading(self, model: Any, **_: Any) -> None:
        self._hook = model.register_forward_pre_hook(lambda module, _: self.use_kernels(module))

    def use_kernels(self, model: Any) -> None:
        """Once the model is on a GPU, move its experts to the kernels: at the first forward, if not before."""
        if self._hook is None or model.device.type != "cuda":
            return
        self._hook.remove()
        self._hook = None
        use_kernels(model, FAMILIES[model.config.model_type], map(int, self.quantization_config.blocks))

    def update_weight_conversions(self, weight_conversions: list[Any], *_: Any) -> list[Any]:
        """Drop the converters that stack experts: ours stay apart."""
        return [
            conversion
            for conversion in weight_conversions
            if not any("experts." in source for source in conversion.source_patterns)
        ]

    def is_serializable(self, *_: Any, **__: Any) -> bool:
        """``save_pretrained`` writes the packed tensors back."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Packed weights have no gradients."""
        return False


def load_quantized(
    path: str | Path, device: str = "cpu", dtype: torch.dtype | str = "auto", device_map: Any = None
) -> Any:
    """A transformers causal LM with packed experts from a folder that ``quantize`` wrote.

    On a Hopper GPU in bfloat16 the experts run the kernels of `mxmoe_steps.kernels`; their weights are then in kernel
    order only, and the model stays on that GPU. Anywhere else they run the reference arithmetic. The logger
    ``mxmoe_steps`` says which layers run what, and why.

    ``dtype`` is the precision of activations and of everything that is not an expert. ``device_map``: as in
    ``from_pretrained``, instead of ``device``.
    """
    if not (Path(path) / "config.json").is_file():
        raise UserError(f"{path}: no config.json; give a folder that the quantize step wrote")
    disable_progress_bar()
    model: Any = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, device_map=device_map)
    if device_map is None:
        model = model.to(device)
    if model.device.type == "cuda":
        model.hf_quantizer.use_kernels(model)
    else:
        log.info("experts: all layers run reference arithmetic (on the %s)", model.device.type)
    return model.eval()
