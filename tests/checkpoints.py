"""Tiny random checkpoints of every supported family."""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

from mxmoe_steps import capture
from mxmoe_steps.models.borders import Borders, runs_of
from mxmoe_steps.models.identity import fingerprint
from mxmoe_steps.models.streaming import StreamedModel
from mxmoe_steps.options.shared import Waiting

SIZES: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 96,
    "moe_intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_LATENT = {"q_lora_rank": None, "kv_lora_rank": 16, "qk_nope_head_dim": 16, "qk_rope_head_dim": 16, "v_head_dim": 16}
_GROUPS = {"first_k_dense_replace": 1, "n_group": 1, "topk_group": 1}
FAMILY_SIZES: dict[str, dict[str, Any]] = {
    "qwen2_moe": {"num_experts": 4, "shared_expert_intermediate_size": 128},
    "qwen3_moe": {"num_experts": 4, "head_dim": 32},
    "olmoe": {"num_experts": 4},
    "mixtral": {"num_local_experts": 4},
    "phimoe": {"num_local_experts": 4},
    "minimax": {"num_local_experts": 4, "layer_types": ["full_attention", "full_attention"]},
    "deepseek_v2": {"n_routed_experts": 4, "n_shared_experts": 2, **_GROUPS, **_LATENT},
    "deepseek_v3": {"n_routed_experts": 4, "n_shared_experts": 1, **_GROUPS, **_LATENT},
    "glm4_moe": {"n_routed_experts": 4, "n_shared_experts": 1, **_GROUPS},
    "gpt_oss": {"num_local_experts": 4, "head_dim": 32, "swiglu_limit": 0.7},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, **_GROUPS},
}


def make_model(family: str, dtype: torch.dtype = torch.float32, **extra: Any) -> Any:
    """A random model whose experts, norms and biases all matter."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **(SIZES | FAMILY_SIZES[family] | extra))
    model: Any = AutoModelForCausalLM.from_config(config, dtype=dtype)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.1)
            elif name.endswith("norm.weight"):
                parameter.uniform_(0.9, 1.1)
            else:
                parameter.normal_(0, 0.02)
    return model.eval()


def make_checkpoint(family: str, path: Path, **extra: Any) -> None:
    """The same, saved in shards as its family publishes them."""
    make_model(family, **extra).save_pretrained(path, max_shard_size="100KB")


def capture_tokens(checkpoint: Path, tokens: torch.Tensor, out: Path, batch: int = 2) -> dict[int, dict[str, Any]]:
    """What `capture` writes for tokens instead of a text, by layer; ``out`` keeps its files."""
    model = StreamedModel(checkpoint, "float32", "cpu")
    options = Waiting(out=out, borders=out)
    borders = Borders(model, tokens, "mxmoe_steps.capture", options)
    runs = runs_of([len(tokens)], batch)
    facts = {"text": "random", "model": fingerprint(model.folder)}
    facts |= dict(zip(("sequences", "length"), tokens.shape, strict=True))
    capture.capture_backward(model, borders, runs, 0, facts, seed=2)
    return {layer: load_file(out / f"layer-{layer:03d}.safetensors") for layer in model.folder.moe_layers}
