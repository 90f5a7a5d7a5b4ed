"""Our checkpoints in transformers: importing this module lets ``from_pretrained`` read them.

``import mxmoe_steps`` is enough, before or after transformers: see `mxmoe_steps.inference.on_import`.
"""

from collections.abc import Sequence
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.utils.logging import disable_progress_bar

from mxmoe_steps.errors import UserError
from mxmoe_steps.inference.deferred_stop import defer_stop_checks
from mxmoe_steps.inference.gpu import log, use_kernels
from mxmoe_steps.inference.own_loading import OwnLoading
from mxmoe_steps.models.adapters import family_of
from mxmoe_steps.models.audit import audit
from mxmoe_steps.models.families import open_model
from mxmoe_steps.models.finite import bad_numbers
from mxmoe_steps.models.loading import auto_class, empty_model
from mxmoe_steps.models.quantization import checked_quantization
from mxmoe_steps.models.quantizer import METHOD, MixedPrecisionConfig, MixedPrecisionQuantizer

register_quantization_config(METHOD)(MixedPrecisionConfig)

_destination: ContextVar[torch.device | None] = ContextVar("destination", default=None)  # of a model that is loaded


@register_quantizer(METHOD)
class Plugin(MixedPrecisionQuantizer):
    """The quantizer of models that are loaded whole: their experts move to the kernels with the model."""

    _compileable = True
    _experts: OwnLoading | None = None

    def _process_model_before_weight_loading(
        self, model: Any, checkpoint_files: Sequence[str | Path] | None = None, device_map: Any = None, **_: Any
    ) -> None:
        super()._process_model_before_weight_loading(model, checkpoint_files)
        if not checkpoint_files:
            return
        folder = open_model(Path(checkpoint_files[0]).parent)
        audit(folder, model, get_model_conversion_mapping(model, None, self), self)
        if device_map is None:
            family = family_of(folder.path, model.config.to_dict())  # of the model's class, which may be of text alone
            inner = ("experts", *([family.shared] if family.shared else []))
            layers = map(int, self.quantization_config.blocks)
            paths = [f"{family.moe_path(layer)}.{name}" for layer in layers for name in inner]
            self._experts = OwnLoading(model, paths, self.packed_names, checkpoint_files)

    def _process_model_after_weight_loading(self, model: Any, **_: Any) -> None:
        if self._experts is not None:
            self._experts.finish(model)
            self._experts = None
        destination = _destination.get()
        self.arrange(model, destination)
        if destination is not None:
            model.to(destination)
        if (bad := bad_numbers(model)) is not None:
            raise UserError(f"{model.name_or_path}: {bad} holds NaN or infinity; run the quantize step again")
        model.mxmoe = Arrangement(model)

    def arrange(self, model: Any, destination: torch.device | None = None) -> None:
        """Where the model goes to a GPU, or is on one, move its experts to the kernels."""
        if (destination or model.device).type == "cuda":
            self._compileable = use_kernels(model, map(int, self.quantization_config.blocks), destination)

    @property
    def is_compileable(self) -> bool:
        """Whether ``generate`` may compile the decode step: on a GPU the reference arithmetic waits for it."""
        return self._compileable


defer_stop_checks(Plugin)


class Arrangement(nn.Module):
    """The last child of a loaded model: ``model.to`` visits it when all other parts have moved. Holds nothing."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = (model,)  # in a tuple it is no child

    def _apply(self, *arguments: Any, **options: Any) -> "Arrangement":
        super()._apply(*arguments, **options)
        (model,) = self.model
        model.hf_quantizer.arrange(model)
        return self


def load_quantized(
    path: str | Path,
    device: str = "cpu",
    dtype: torch.dtype | str = "auto",
    device_map: Any = None,
    trust_remote_code: bool = False,
) -> Any:
    """A transformers causal LM with packed experts from a folder that ``quantize`` wrote.

    On a GPU that there are kernels for, in bfloat16, the experts run the kernels of `mxmoe_steps.kernels`; their
    weights are then in kernel order only, and the model stays on that GPU. Anywhere else they run the reference
    arithmetic. The logger ``mxmoe_steps`` says which layers run what, and why.

    ``dtype`` is the precision of activations and of everything that is not an expert. ``device_map``: as in
    ``from_pretrained``, instead of ``device``. ``trust_remote_code``: run the model's own code that `quantize` copied.
    """
    folder = open_model(path)
    if not folder.is_packed:
        raise UserError(f"{path}/config.json: no quantization_config; give a folder that the quantize step wrote")
    checked_quantization(folder.config["quantization_config"], folder.path / "config.json")
    disable_progress_bar()
    empty_model(folder, folder.dtype, trust_remote_code)  # refuses what transformers would trip over
    destination = _destination.set(torch.empty(0, device=device).device if device_map is None else None)
    try:
        model: Any = auto_class(folder).from_pretrained(
            path, dtype=dtype, device_map=device_map, trust_remote_code=trust_remote_code
        )
    finally:
        _destination.reset(destination)
    if model.device.type != "cuda":
        log.info("experts: all layers run reference arithmetic (on the %s)", model.device.type)
    return model.eval()
