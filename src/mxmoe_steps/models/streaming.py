"""A causal LM of which one part at a time is in memory.

The model is built without weights (meta device). `StreamedModel.loaded` gives one decoder layer, or the embedding, or
the head, its weights from safetensors through transformers' own converters, and takes them away again; text passes
through a layer in runs of a few sequences, and what leaves it waits in a file (`mxmoe_steps.models.rows`). Memory is
one part of the model and one run, whatever the size of the checkpoint and of the text.

The functions imported from transformers' loading code are internal to it; only this module and `audit` touch them.
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mxmoe_steps.errors import MORE_MEMORY, UserError, out_of_memory
from mxmoe_steps.models.audit import audit
from mxmoe_steps.models.families import ModelFolder, open_model
from mxmoe_steps.models.finite import bad_numbers
from mxmoe_steps.models.heard import Call, heard_calls, logits_of
from mxmoe_steps.models.loading import empty_model, resolve_device
from mxmoe_steps.models.quantization import checked_quantization
from mxmoe_steps.models.weights import check_block_weights, open_tensors
from mxmoe_steps.schemes import BLOCKS

_LOGITS = 1 << 25  # logits that exist at one time


class StreamedModel:
    """The causal LM of a checkpoint folder, original or packed by `quantize`; in evaluation mode, without gradients.

    ``dtype`` is the precision of activations and of everything that is not packed; ``auto`` is the checkpoint's own.
    Raises `UserError` for a checkpoint that is not what the model class expects (`mxmoe_steps.models.audit`).
    """

    def __init__(self, path: str | Path, dtype: str, device: str, trust_remote_code: bool = False) -> None:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.utils.logging import disable_progress_bar

        disable_progress_bar()
        self.folder: ModelFolder = open_model(path)
        self.device = resolve_device(device)
        self.model: Any = empty_model(self.folder, self.folder.dtype if dtype == "auto" else dtype, trust_remote_code)
        self.dtype: torch.dtype = self.model.dtype
        self._quantizer = self._replace_packed_modules()
        self._conversions: Any = get_model_conversion_mapping(self.model, None, self._quantizer)
        self._parameters = audit(self.folder, self.model, self._conversions, self._quantizer)
        self.model.eval().requires_grad_(False)
        self.family = self.folder.family
        self.decoder: Any = self.model.get_submodule(self.family.decoder)
        self.final_norm: Any = self.decoder.get_submodule(self.family.norm)
        self.config: Any = self.model.config.get_text_config()
        self.layers = len(self.decoder.layers)
        for name, module in self.decoder.named_children():
            if name != "layers":
                self._make_buffers(module)
        self.arguments = cache(self._arguments)

    def _replace_packed_modules(self) -> Any:
        """The quantizer of a packed checkpoint, after it gave the model its packed modules; None for an original."""
        if not self.folder.is_packed:
            return None
        from mxmoe_steps.models.quantizer import MixedPrecisionConfig, MixedPrecisionQuantizer

        stated = checked_quantization(self.folder.config["quantization_config"], self.folder.path / "config.json")
        quantizer = MixedPrecisionQuantizer(MixedPrecisionConfig(**stated))
        quantizer.preprocess_model(self.model, checkpoint_files=sorted(set(self.folder.files.values())))
        return quantizer

    @contextmanager
    def loaded(self, *modules: str) -> Iterator[None]:
        """Within the block the named modules, e.g. ``model.layers.3``, have their weights.

        `UserError` names what is missing, misshapen, NaN or infinite.
        """
        try:
            for module in modules:
                self._load(module)
            yield
        finally:
            for module in modules:
                self.model.get_submodule(module).to("meta")

    @property
    def embedding(self) -> str:
        """Path of the embedding."""
        return f"{self.family.decoder}.{self.family.embedding}"

    @contextmanager
    def head(self) -> Iterator[None]:
        """Within the block the final norm and the language-model head have their weights; see `log_probs`."""
        norm, head = f"{self.family.decoder}.{self.family.norm}", self.model.get_submodule(self.family.head)
        if f"{self.family.head}.weight" in self._parameters.values():
            with self.loaded(norm, self.family.head):
                yield
            return
        with self.loaded(norm, self.embedding):
            head.weight = self.model.get_submodule(self.embedding).weight
            yield
        head.to("meta")

    @contextmanager
    def whole(self) -> Iterator[Any]:
        """Within the block all modules have their weights: transformers' own model, which generates, too."""
        layers = {self.layer_path(layer) for layer in range(self.layers)}
        owners = {parameter.rpartition(".")[0] for parameter in self._parameters.values()}
        owners = {owner for owner in owners if not any(f"{owner}.".startswith(f"{layer}.") for layer in layers)}
        around = {self._apart(owner) for owner in owners}
        with self.loaded(*sorted(layers | around)):
            head = self.model.get_submodule(self.family.head)
            if head.weight.is_meta:  # tied
                head.weight = self.model.get_submodule(self.embedding).weight
            yield self.model
            head.to("meta")

    def _apart(self, module: str) -> str:
        """The largest part of the model around ``module`` that is no part of the decoder, such as its vision tower.

        How transformers names one tensor of it may depend on others.
        """
        steps = module.split(".")
        paths = (".".join(steps[:count]) for count in range(1, len(steps) + 1))
        return next((path for path in paths if not f"{self.family.decoder}.".startswith(f"{path}.")), module)

    def _load(self, module: str) -> None:
        from transformers.core_model_loading import convert_and_load_state_dict_in_model
        from transformers.modeling_utils import LoadStateDictConfig

        target = self.model.get_submodule(module)
        names = [name for name, parameter in self._parameters.items() if parameter.startswith(f"{module}.")]
        loading = LoadStateDictConfig(
            device_map={"": self.device},
            dtype=self.dtype,
            dtype_plan=self.model._get_dtype_plan(self.dtype),
            hf_quantizer=self._quantizer,
            weight_mapping=copy.deepcopy(self._conversions),
        )
        with open_tensors(self.folder, names) as tensors:
            info, _ = convert_and_load_state_dict_in_model(self.model, tensors, loading)
        for parameter, error in info.conversion_errors.items():
            if out_of_memory(error):
                raise UserError(f"{self.folder.path}: no memory for {parameter}, of {module}; {MORE_MEMORY}")
        for problems in (info.mismatched_keys, info.conversion_errors, info.error_msgs):
            for problem in problems:
                raise UserError(f"{self.folder.path}: {module}: {problem} does not fit what config.json describes")
        self._make_buffers(target)
        target.requires_grad_(False)
        for name, parameter in (*target.named_parameters(), *target.named_buffers()):
            if parameter.is_meta:
                raise UserError(f"{self.folder.path}: the checkpoint holds no weights for {module}.{name}")
        if (bad := bad_numbers(target)) is not None:
            self._refuse_not_finite(module, bad)

    def _refuse_not_finite(self, module: str, name: str) -> None:
        """`UserError` that names layer, expert and block where an expert's weights are to blame."""
        for layer in self.folder.moe_layers:
            if module == self.layer_path(layer) and not self.folder.is_packed:
                for block in BLOCKS:
                    check_block_weights(self.folder, layer, block)
        raise UserError(f"{self.folder.path}: {module}.{name}: the weights hold NaN or infinity; download them again")

    def _make_buffers(self, root: nn.Module) -> None:
        """Compute what no checkpoint holds (rotary frequencies, decay slopes) as transformers does."""
        for module in root.modules():
            empty = {name: buffer for name, buffer in module.named_buffers(recurse=False) if buffer.is_meta}
            if empty and type(module).__module__.startswith("transformers"):
                for name, buffer in empty.items():
                    setattr(module, name, torch.empty_like(buffer, device=self.device))
                self.model._init_weights(module)

    def embed(self, tokens: torch.Tensor) -> torch.Tensor:
        """[B, L] token ids to what enters the first layer, [B, L, H]; within ``loaded(embedding)``."""
        (hidden, *_), _ = self._heard(input_ids=tokens.to(self.device))[0]
        return hidden

    def _arguments(self, batch: int, length: int) -> list[Call]:
        """What the decoder hands to each layer beside hidden states: masks, positions and rotary embeddings.

        They depend on shapes alone.
        """
        shape = (batch, length, self.config.hidden_size)
        calls = self._heard(inputs_embeds=torch.zeros(shape, dtype=self.dtype, device=self.device))
        return [(others, named) for (_, *others), named in calls]

    def _heard(self, **inputs: torch.Tensor) -> list[Call]:
        returned = (None,) if self.family.returns_more else ()
        return heard_calls(self.decoder, self.final_norm, inputs, returned)

    def run_layer(self, layer: int, hidden: torch.Tensor) -> torch.Tensor:
        """[B, L, H] through one decoder layer; within ``loaded(layer_path(layer))``."""
        others, named = self.arguments(*hidden.shape[:2])[layer]
        output: Any = self.decoder.layers[layer](hidden, *others, **named)
        return output[0] if self.family.returns_more else output

    def log_probs(self, hidden: torch.Tensor) -> torch.Tensor:
        """Final hidden states [n, H], normed, to log-probabilities of the next token, float32 [n, V]; within `head`."""
        owner = self.model.get_submodule(self.family.head.rpartition(".")[0])
        return torch.log_softmax(logits_of(owner, hidden).float(), dim=-1)

    @property
    def head_rows(self) -> int:
        """Tokens whose logits may exist at one time: a vocabulary is wide."""
        return max(1, _LOGITS // self.config.vocab_size)

    def layer_path(self, layer: int) -> str:
        """Path of a decoder layer."""
        return self.family.layer_path(layer)

    def summing(self, layer: int) -> Any:
        """The module whose output is the sum of routed experts and shared expert, [..., H]."""
        return self.moe(layer) if self.family.moe else self.moe(layer).experts

    def shared_factor(self, layer: int, hidden: torch.Tensor) -> torch.Tensor | None:
        """Factor of the shared expert's output, float32 [T], for what enters the experts, [T, H]; None without one."""
        family = self.folder.family
        if family.shared is None:
            return None
        if family.shared_gate is None:
            return torch.ones(len(hidden), device=hidden.device)
        gate = self.moe(layer).get_submodule(family.shared_gate)
        return torch.sigmoid(gate(hidden)).squeeze(-1).float()

    def moe(self, layer: int) -> Any:
        """Router, experts and shared expert of a decoder layer; the layer itself where they are its own."""
        return self.model.get_submodule(self.family.moe_path(layer))
