"""Tiny checkpoints that vLLM runs: what its model classes want in them beside what transformers writes."""

import json
from pathlib import Path
from typing import Any

from checkpoints import make_checkpoint
from packed import pack

_LATENT = {"kv_lora_rank": 512, "qk_rope_head_dim": 64}  # the only sizes of vLLM's latent attention on a CPU
_SIGMOID = {"scoring_func": "sigmoid", "topk_method": "noaux_tc", "norm_topk_prob": True}
_FULL = {"layer_types": ["full_attention", "full_attention"]}  # on a CPU linear attention is for bfloat16 alone
_LLAMA = {"interleave_moe_layer_step": 2, "attention_chunk_size": 128}

# Keys that published config.json have, and sizes
EXTRA: dict[str, dict[str, Any]] = {
    "glm4_moe": {"head_dim": 32, "routed_scaling_factor": 2.5},
    "deepseek_v2": {"scoring_func": "softmax", "topk_method": "greedy", **_LATENT},
    "deepseek_v3": {**_SIGMOID, **_LATENT},
    "glm4_moe_lite": {"first_k_dense_replace": 1, **_SIGMOID, **_LATENT},
    "deepseek_v32": {"first_k_dense_replace": 1, "index_head_dim": 128, "index_topk": 2048, **_SIGMOID, **_LATENT},
    "glm_moe_dsa": {"first_k_dense_replace": 1, "index_head_dim": 128, "index_topk": 2048, **_SIGMOID, **_LATENT},
    "minimax_m2": {"rotary_dim": 16, "scoring_func": "sigmoid", "use_routing_bias": True},
    "kimi_linear": {
        "mla_use_nope": True, "moe_router_activation_func": "sigmoid", "moe_renormalize": True, "moe_layer_freq": 1,
        "num_expert_group": 1, "topk_group": 1, "use_grouped_topk": True, "first_k_dense_replace": 0,
        "mlp_layer_types": ["sparse", "sparse"],
        "linear_attn_config": {
            "kda_layers": [], "full_attn_layers": [1, 2], "head_dim": 16, "num_heads": 2, "short_conv_kernel_size": 4,
        },
        **_FULL, **_LATENT,
    },
    "afmoe": {"score_func": "sigmoid", "route_norm": True, "n_group": 1, "topk_group": 1},
    "phimoe": {"architectures": ["PhiMoEForCausalLM"], "attention_bias": True, "lm_head_bias": True},
    "qwen3_vl_moe": {"norm_topk_prob": True},
    "glm4v_moe": {"use_qk_norm": False},
    **dict.fromkeys(("llama4", "llama4_text"), _LLAMA),
    "kimi_k25": {"architectures": ["KimiK25ForConditionalGeneration"], **_SIGMOID, **_LATENT},
    "mistral3": _LATENT,
    "aria": {"model_type": "aria_text"},
    "hy_v3": {"first_k_dense_replace": 1, "expert_hidden_dim": 96, "route_norm": True, "qk_norm": True},
    "cohere2_moe": {"sliding_window": 64, "tie_word_embeddings": True},
    "lfm2_moe": {"tie_word_embeddings": True},
    "mimo_v2_flash": {
        "hybrid_layer_pattern": [0, 1], "moe_layer_freq": [0, 1], "swa_num_attention_heads": 2, "rope_theta": 5e6,
        "swa_num_key_value_heads": 2, "swa_head_dim": 48, "swa_v_head_dim": 48, "v_head_dim": 48, "swa_rope_theta": 1e4,
        "partial_rotary_factor": 0.334, "sliding_window_size": 8, "add_swa_attention_sink_bias": True,
        "layernorm_epsilon": 1e-5, **_SIGMOID,
    },
    "jamba": {"attn_layer_period": 1, "attn_layer_offset": 0},  # vLLM has Mamba 1 on GPUs alone
    **dict.fromkeys(("qwen3_next", "qwen3_5_moe_text", "qwen3_5_moe"), _FULL),
}  # fmt: skip

# On a CPU vLLM 0.32 rotates the first head alone of queries [tokens, heads, head dim].
_ROTARY = {"compilation_config": {"custom_ops": ["all", "-rotary_embedding"]}}
_TEXT = {"limit_mm_per_prompt": {"image": 0, "video": 0}}
OPTIONS: dict[str, dict[str, Any]] = {
    **dict.fromkeys(
        ("deepseek_v2", "deepseek_v3", "glm4_moe_lite", "deepseek_v32", "glm_moe_dsa", "kimi_linear", "lfm2_moe"),
        _ROTARY,
    ),
    **dict.fromkeys(("qwen3_5_moe", "qwen3_vl_moe", "glm4v_moe", "llama4", "gemma4", "mistral3", "aria"), _TEXT),
    "kimi_k25": {
        "limit_mm_per_prompt": {"vision_chunk": 0}, "skip_tokenizer_init": False,
        "tokenizer": str(Path(__file__).parents[2] / "resources" / "demo-moe"), **_ROTARY,
    },
}  # fmt: skip

# Published files beside config.json and weights
FILES: dict[str, dict[str, Any]] = {
    "kimi_k25": {
        "preprocessor_config.json": {
            "media_proc_cfg": {
                "patch_size": 4, "merge_kernel_size": 2, "temporal_merge_kernel_size": 4, "in_patch_limit": 64,
                "in_patch_limit_each_frame": 64, "in_patch_limit_video": 64, "patch_limit_on_one_side": 16,
                "fixed_output_tokens": None, "image_mean": [0.5] * 3, "image_std": [0.5] * 3,
            },
        },
    },
}  # fmt: skip


def make_tiny(folder: Path, family: str, schemes: Any, quantizer: str = "rtn", **extra: Any) -> Path:
    """A tiny model of a ``family`` in ``folder``/model, and packed; returns the folder of that."""
    sizes = EXTRA.get(family, {}) | extra
    architectures = sizes.pop("architectures", None)
    make_checkpoint(family, folder / "model", **sizes)
    if architectures is not None:
        config = folder / "model" / "config.json"
        config.write_text(json.dumps(json.loads(config.read_text()) | {"architectures": architectures}))
    for name, content in FILES.get(family, {}).items():
        (folder / "model" / name).write_text(json.dumps(content))
    return pack(folder / "model", folder / "packed", schemes, quantizer)
