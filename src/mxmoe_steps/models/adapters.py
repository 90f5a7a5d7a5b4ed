"""What differs between model families, as data: a `Family` for every ``model_type`` that works, and why others do not.

Facts of the published checkpoints and of transformers' model classes. Stdlib only: `calibrate` and `quantize` read
weights straight from safetensors and never build a model.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from mxmoe_steps.errors import UserError
from mxmoe_steps.schemes import BLOCKS

Orientation = Literal["rows", "columns", "either", "alternating"]


@dataclass(frozen=True)
class Family:
    """One ``model_type``: where experts are in transformers' model and in the checkpoint, and what they compute.

    Modules of transformers, by path: ``decoder`` has ``layers``, an ``embedding`` and a ``norm``; ``head`` is the
    language-model head. ``moe`` is the MoE module in a layer, empty where experts and router are the layer's own;
    ``shared`` is the shared expert in it, ``shared_gate`` the gate of that, and ``router`` what routes: on hidden
    states, [1, T, H] where it is ``batched_router``, else [T, H], and, where ``router_bias`` names one, a tensor of the
    MoE module. ``is_wrapper``: a vision-language model,
    of which ``text_config`` describes the language model.

    The checkpoint: names of the decoder begin with one of ``prefixes``; ``stored_moe``, ``stored_shared`` and
    ``stored_embedding`` are the names of ``moe``, ``shared`` and ``embedding`` there, where they are others; ``blocks``
    are gate, up and down of a routed expert, ``stacked`` the tensors of gate and up and of down of all experts of a
    layer, which lie as ``orientation`` says (`mxmoe_steps.models.places.Place`; either: what fits the sizes, as in
    transformers).

    What is computed: ``activation`` is the key of ``config.json`` that names it. ``gated``: without it down multiplies
    the activation of up, and gate is a block without output features. ``biased``: blocks have biases; ``clamped``: gate
    and up are clamped (`mxmoe_steps.models.gating.Gating`); ``scales_inputs``: router weights multiply what enters an
    expert, not what leaves it; ``routed_factor``: the attribute of the MoE module that the routed experts' sum is
    multiplied by; ``normed``: a norm follows the MoE module. ``returns_more``, ``moe_returns_more``: a
    layer, or its MoE module, returns a tuple, of which hidden states are the first.

    ``only``: keys of ``config.json`` -> the values that work here, and why no others do. A key that is absent, or
    null, works. ``shared_count``: the key that says how many experts the shared one is made of; 0 means none.
    """

    decoder: str = "model"
    embedding: str = "embed_tokens"
    norm: str = "norm"
    head: str = "lm_head"
    moe: str = "mlp"
    router: str = "gate"
    router_bias: str | None = None
    batched_router: bool = False
    shared: str | None = None
    shared_gate: str | None = None
    shared_count: str | None = None
    is_wrapper: bool = False
    prefixes: tuple[str, ...] = ("model.", "")
    stored_moe: str | None = None
    stored_shared: str | None = None
    stored_embedding: str | None = None
    blocks: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")
    stacked: tuple[str, str] = ("experts.gate_up_proj", "experts.down_proj")
    orientation: Orientation = "rows"
    activation: str = "hidden_act"
    gated: bool = True
    biased: bool = False
    clamped: bool = False
    scales_inputs: bool = False
    routed_factor: str | None = None
    normed: bool = False
    returns_more: bool = False
    moe_returns_more: bool = False
    only: Mapping[str, tuple[tuple[Any, ...], str]] = field(default_factory=dict)

    @property
    def interleaved(self) -> bool:
        """Whether the checkpoint stacks experts with a column of up after each of gate."""
        return self.orientation == "alternating"

    @property
    def own_blocks(self) -> tuple[str, ...]:
        """Those of `schemes.BLOCKS` that experts have weights of."""
        return BLOCKS if self.gated else BLOCKS[1:]

    def layer_path(self, layer: int) -> str:
        """Path of a decoder layer in transformers."""
        return f"{self.decoder}.layers.{layer}"

    def moe_path(self, layer: int) -> str:
        """Path of a layer's MoE module in transformers, or of the layer where experts are its own."""
        return f"{self.layer_path(layer)}.{self.moe}" if self.moe else self.layer_path(layer)

    def prefix_of(self, stored: Iterable[str]) -> str:
        """With which of `prefixes` a checkpoint's names of the decoder begin; some were saved without ``model.``."""
        starts = {before for before, layers, _ in (name.partition("layers.") for name in stored) if layers}
        return next((prefix for prefix in self.prefixes if prefix in starts), self.prefixes[0])

    def own_name(self, stored: str, prefix: str) -> str:
        """The name of a checkpoint's tensor if the decoder's began with its path in transformers, not ``prefix``."""
        if not stored.startswith(prefix) or (not prefix and stored.startswith(f"{self.head}.")):
            return stored
        return f"{self.decoder}.{stored.removeprefix(prefix)}"

    def text(self, config: Mapping[str, Any]) -> Mapping[str, Any]:
        """The part of ``config.json`` that describes the language model."""
        return dict(config.get("text_config") or {}) if self.is_wrapper else config

    @property
    def without_kernels(self) -> str:
        """Why the experts of all its models run reference arithmetic on a GPU; empty where they do not."""
        return "" if self.moe else "router and experts are no module of their own"

    @property
    def without_tuning(self) -> str:
        """Why `tune` does not know what its layers compute; empty where it does."""
        reasons = {
            "a norm follows the experts": self.normed,
            "experts have no gate": not self.gated,
            "router weights multiply inputs": self.scales_inputs,
            "router and experts are no module of their own": not self.moe,
        }
        return next((reason for reason, holds in reasons.items() if holds), "")


_W123 = ("w1", "w3", "w2")
_GATED = Family(shared="shared_expert", shared_gate="shared_expert_gate")
_SHARED = Family(shared="shared_experts")
_MIXTRAL = Family(stored_moe="block_sparse_moe", blocks=_W123)
# a shared_mlp beside the MoE module is copied as it is
_GRANITE = Family(moe="block_sparse_moe", router="router", stacked=("input_linear.weight", "output_linear.weight"))
_ARIA = replace(_SHARED, router="router", stacked=("experts.fc1.weight", "experts.fc2.weight"), orientation="columns")
_LLAMA = Family(
    moe="feed_forward",
    router="router",
    shared="shared_expert",
    orientation="columns",
    scales_inputs=True,
    moe_returns_more=True,
)
_EARLIER = "a layer takes keys and values of an earlier one, and only one layer is in memory at a time"
_GEMMA = Family(
    moe="",
    router="router",
    activation="hidden_activation",
    only={
        "enable_moe_block": ((True,), "it has no experts"),
        "hidden_size_per_layer_input": ((0,), "inputs of each layer that depend on tokens are not streamed"),
        "num_kv_shared_layers": ((0,), _EARLIER),
    },
)
_VISION: Mapping[str, Any] = {
    "decoder": "model.language_model", "prefixes": ("model.language_model.",), "is_wrapper": True,
}  # fmt: skip
_LLAVA: Mapping[str, Any] = {**_VISION, "prefixes": ("language_model.model.", "model.language_model.")}
_SHARED_INDEXER = {
    "indexer_types": (
        ("full",),
        "a layer with a shared indexer takes what an earlier layer chose, and only one layer is in memory at a time",
    )
}
_FACTOR = "routed_scaling_factor"

FAMILIES: Mapping[str, Family] = {
    "qwen2_moe": _GATED,
    "qwen3_moe": Family(),
    "olmoe": Family(),
    "mellum": Family(),
    "flint": Family(shared="shared_expert"),
    "mixtral": _MIXTRAL,
    "phimoe": replace(_MIXTRAL, router="router"),
    "minimax": _MIXTRAL,
    "deepseek_v2": _SHARED,
    "deepseek_v3": _SHARED,
    "kimi_k25": replace(_SHARED, **_LLAVA),
    "mistral3": replace(_SHARED, **_LLAVA),
    "glm4_moe": _SHARED,
    "dots1": _SHARED,
    "dots3_note_text": _SHARED,
    "dots3_note": replace(_SHARED, **{**_VISION, "prefixes": ("model.language_model.", "model.")}),
    "axk2": _SHARED,
    "bailing_hybrid": replace(_SHARED, stored_embedding="word_embeddings"),
    "gpt_oss": Family(router="router", orientation="alternating", biased=True, clamped=True, moe_returns_more=True),
    "qwen3_next": _GATED,
    "qwen3_5_moe_text": replace(_GATED, prefixes=("model.", "model.language_model.", "")),
    "qwen3_5_moe": replace(_GATED, **_VISION),
    "qwen3_vl_moe": Family(**_VISION, orientation="either"),
    "glm4_moe_lite": _SHARED,
    "glm4v_moe": replace(_SHARED, **_VISION),
    "minimax_m2": replace(_MIXTRAL, router_bias="e_score_correction_bias"),
    "ernie4_5_moe": replace(
        _SHARED,
        shared_count="moe_num_shared_experts",
        only={"use_bias": ((False,), "biases of the shared expert's blocks are read nowhere")},
    ),
    "cohere2_moe": replace(
        _SHARED,
        shared_count="num_shared_experts",
        only={
            "shared_expert_combination_strategy": (
                ("sum",),
                "the layer's output is the mean of routed and shared experts, not their sum",
            )
        },
    ),
    "granitemoe": _GRANITE,
    "granitemoeshared": _GRANITE,
    "granitemoehybrid": _GRANITE,
    "granitemoe_swa": _GRANITE,
    "deepseek_v32": _SHARED,
    "glm_moe_dsa": replace(_SHARED, returns_more=True, only=_SHARED_INDEXER),
    "hunyuan_v1_moe": Family(shared="shared_mlp"),
    "hy_v3": replace(_SHARED, stored_shared="shared_mlp", router_bias="e_score_correction_bias"),
    "solar_open": _SHARED,
    "exaone_moe": _SHARED,
    "kolibri1": replace(_SHARED, normed=True),
    "laguna": replace(_SHARED, stored_shared="shared_expert", routed_factor=_FACTOR),
    "beam": Family(normed=True, routed_factor=_FACTOR),
    "afmoe": replace(_SHARED, router="router", router_bias="expert_bias", batched_router=True, normed=True),
    "flex_olmo": Family(normed=True),
    "mimo_v2_flash": Family(),
    "kimi_linear": replace(_MIXTRAL, shared="shared_experts"),
    "lfm2_moe": Family(moe="feed_forward", blocks=_W123, norm="embedding_norm", router_bias="expert_bias"),
    "jamba": Family(moe="feed_forward", router="router", norm="final_layernorm"),
    "aria_text": _ARIA,
    "aria": replace(_ARIA, **_LLAVA),
    "llama4_text": _LLAMA,
    "llama4": replace(
        _LLAMA,
        decoder="language_model.model",
        head="language_model.lm_head",
        prefixes=("language_model.model.",),
        is_wrapper=True,
    ),
    "gemma4_text": _GEMMA,
    "gemma4": replace(_GEMMA, **_VISION),
    "nemotron_h": Family(
        embedding="embeddings",
        norm="norm_f",
        prefixes=("backbone.", "model."),
        moe="mixer",
        shared="shared_experts",
        gated=False,
        activation="mlp_hidden_act",
        stacked=("experts.up_proj", "experts.down_proj"),
        only={
            "moe_latent_size": ((), "routed experts see a projection of what the shared expert sees"),
            "mlp_bias": ((False,), "biases of blocks are read nowhere"),
        },
    ),
}

_STREAMS = "a layer takes several streams of hidden states, not one"
_SHARED_FUSED = "transformers joins gate and up of the shared expert into one matrix"
_SEES = "names of the vision tower's tensors begin as those of the language model do"
_SINK = "the router weighs shared experts, too"
_TWO_STACKS = "an encoder and a decoder, not one stack of layers"

REFUSED: Mapping[str, str] = {
    "axk1": "a norm inside of the MoE module follows the sum of routed and shared experts",
    "dbrx": "experts lie in one matrix of all experts' rows, which is no linear block of its own",
    "deepseek_ocr2": _SEES,
    "deepseek_v4": _STREAMS,
    "diffusion_gemma": "it generates by diffusion, and has no next token whose likelihood could be measured",
    "doge": "experts are single rows of an embedding, not linear blocks",
    "ernie4_5_vl_moe": "a layer has two sets of experts, one for text and one for images",
    "glm5_next": _STREAMS,
    "hy_v4": _STREAMS,
    "inkling2": _STREAMS,
    "inkling2_text": _STREAMS,
    "inkling_mm_model": _SINK,
    "inkling_text": _SINK,
    "jetmoe": "attention has experts, too, and their router is not that of the MoE module",
    "longcat_flash": "some experts have no weights, and a layer has two attentions",
    "minimax_m3_vl": _SHARED_FUSED,
    "minimax_m3_vl_text": _SHARED_FUSED,
    "mistral4": "transformers loads it as the language model of mistral3, which is supported",
    "mistral_large4": _EARLIER,
    "mistral_large4_text": _EARLIER,
    "muse_spark": "routed experts see a projection of the hidden states, and a norm follows each of them",
    "nllb-moe": _TWO_STACKS,
    "openai_privacy_filter": "it classifies tokens, and has no next token whose likelihood could be measured",
    "qwen3_omni_moe": "two language models have experts, one that thinks and one that talks",
    "qwen3_omni_moe_thinker": "it is the half of qwen3_omni_moe that thinks",
    "qwen4_exp": _STREAMS,
    "qwen4_exp_text": _STREAMS,
    "step3p7": "experts are clamped at limits that differ from layer to layer",
    "switch_transformers": _TWO_STACKS,
    "unlimited_ocr": _SEES,
    "zaya": "a router takes what the router of the layer before gave",
}


def family_of(where: Path, config: Mapping[str, Any]) -> Family:
    """The family of a ``config.json`` in the folder ``where``; `UserError` says why there is none."""
    model_type = str(config.get("model_type"))
    if model_type in REFUSED:
        raise UserError(f"{where}/config.json: model_type {model_type!r} is not supported: {REFUSED[model_type]}")
    if model_type not in FAMILIES:
        raise UserError(
            f"{where}/config.json: model_type {config.get('model_type')!r} is not supported;"
            f" supported are {', '.join(sorted(FAMILIES))}"
        )
    family = FAMILIES[model_type]
    text = family.text(config)
    none = family.shared_count is not None and text.get(family.shared_count) == 0
    for key, (values, why) in family.only.items():
        if none and key.startswith("shared_expert"):
            continue
        stated = text.get(key)
        for value in stated if isinstance(stated, list) else [stated]:
            if value is not None and value not in values:
                raise UserError(f"{where}/config.json: {key} {value!r} of {model_type} is not supported: {why}")
    return replace(family, shared=None) if none else family
