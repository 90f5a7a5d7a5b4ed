"""What the tiny random checkpoint of every supported family has that others do not; see `checkpoints.SIZES`."""

from typing import Any

_LATENT = {"q_lora_rank": None, "kv_lora_rank": 16, "qk_nope_head_dim": 16, "qk_rope_head_dim": 16, "v_head_dim": 16}
_GROUPS = {"n_group": 1, "topk_group": 1}
_DENSE_FIRST = {"first_k_dense_replace": 1, **_GROUPS}
_SPARSE_LAST = {"mlp_layer_types": ["dense", "sparse"]}
_INDEXER = {"q_lora_rank": 32, "index_topk": 6, "index_head_dim": 32, "index_n_heads": 2, "head_dim": 16}
_WINDOW_FIRST = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 8, "head_dim": 32}
_DELTA_FIRST = {
    "num_experts": 4, "shared_expert_intermediate_size": 128, "head_dim": 32, "linear_key_head_dim": 16,
    "linear_value_head_dim": 16, "linear_num_key_heads": 2, "linear_num_value_heads": 4,
    "layer_types": ["linear_attention", "full_attention"],
}  # fmt: skip
_GRANITE = {"num_local_experts": 4, "embedding_multiplier": 3.0, "logits_scaling": 2.0, "residual_multiplier": 0.5}
_HALF_ROTARY = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}}
_MULTI_ROTARY = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [8, 4, 4]}}
_QWEN_VISION = {
    "depth": 1, "hidden_size": 32, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": 64, "patch_size": 4,
    "num_position_embeddings": 16, "deepstack_visual_indexes": [0],
}  # fmt: skip
_DOTS = {
    "n_routed_experts": 4, "n_shared_experts": 1, "shared_experts_intermediate_size": 128,
    "layer_types": ["indexed_attention", "indexed_attention"], **_GROUPS, **_SPARSE_LAST, **_LATENT, **_INDEXER,
}  # fmt: skip
_LLAMA = {
    "num_local_experts": 4, "num_experts_per_tok": 1, "intermediate_size_mlp": 96, "head_dim": 32,
    "moe_layers": [1], "attention_chunk_size": 8,
}  # fmt: skip
_GEMMA = {
    "num_experts": 4, "top_k_experts": 2, "enable_moe_block": True, "hidden_size_per_layer_input": 0,
    "global_head_dim": 32, "final_logit_softcapping": 3.0, "vocab_size_per_layer_input": 96, **_WINDOW_FIRST,
}  # fmt: skip

FAMILY_SIZES: dict[str, dict[str, Any]] = {
    "qwen2_moe": {"num_experts": 4, "shared_expert_intermediate_size": 128},
    "qwen3_moe": {"num_experts": 4, "head_dim": 32},
    "olmoe": {"num_experts": 4},
    "mixtral": {"num_local_experts": 4},
    "phimoe": {"num_local_experts": 4},
    "minimax": {"num_local_experts": 4, "layer_types": ["full_attention", "full_attention"]},
    "deepseek_v2": {"n_routed_experts": 4, "n_shared_experts": 2, **_DENSE_FIRST, **_LATENT},
    "deepseek_v3": {"n_routed_experts": 4, "n_shared_experts": 1, **_DENSE_FIRST, **_LATENT},
    "glm4_moe": {"n_routed_experts": 4, "n_shared_experts": 1, **_DENSE_FIRST},
    "gpt_oss": {"num_local_experts": 4, "head_dim": 32, "swiglu_limit": 0.7},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, **_DENSE_FIRST},
    "qwen3_next": _DELTA_FIRST,
    "qwen3_5_moe_text": _DELTA_FIRST,
    "qwen3_5_moe": _DELTA_FIRST,
    "qwen3_vl_moe": {"num_experts": 4, "head_dim": 32, **_MULTI_ROTARY},
    "glm4_moe_lite": {"n_routed_experts": 4, "n_shared_experts": 1, **_GROUPS, **_SPARSE_LAST, **_LATENT},
    "glm4v_moe": {
        "n_routed_experts": 4, "n_shared_experts": 1, "head_dim": 32, **_DENSE_FIRST,
        "rope_parameters": {
            "rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 2, 2], "partial_rotary_factor": 0.5,
        },
    },
    "minimax_m2": {"num_local_experts": 4, "head_dim": 32, **_HALF_ROTARY},
    "ernie4_5_moe": {"moe_num_experts": 4, "moe_k": 2, "moe_num_shared_experts": 2},
    "granitemoe": _GRANITE,
    "granitemoeshared": {"shared_intermediate_size": 96, **_GRANITE},
    "granitemoehybrid": {
        "shared_intermediate_size": 96, "layer_types": ["mamba", "attention"], "mamba_n_heads": 8, "mamba_d_head": 16,
        "mamba_d_state": 16, **_GRANITE,
    },
    "deepseek_v32": {
        "n_routed_experts": 4, "n_shared_experts": 1, **_GROUPS, **_SPARSE_LAST, **_LATENT, **_INDEXER,
    },
    "glm_moe_dsa": {
        "n_routed_experts": 4, "n_shared_experts": 1, **_GROUPS, **_SPARSE_LAST, **_LATENT, **_INDEXER,
    },
    "hunyuan_v1_moe": {"num_experts": 4, "moe_topk": 2, "head_dim": 32},
    "solar_open": {"n_routed_experts": 4, "n_shared_experts": 1, "head_dim": 32},
    "exaone_moe": {"num_experts": 4, "num_shared_experts": 1, **_WINDOW_FIRST, **_SPARSE_LAST},
    "afmoe": {"num_experts": 4, "num_shared_experts": 1, "num_dense_layers": 1, "mup_enabled": True, **_WINDOW_FIRST},
    "flex_olmo": {"num_experts": 4},
    "mimo_v2_flash": {
        "n_routed_experts": 4, "num_key_value_heads": 1, "head_dim": 48, "v_head_dim": 32, "sliding_window": 8,
        "layer_types": ["full_attention", "sliding_attention"], **_SPARSE_LAST,
    },
    "kimi_linear": {
        "num_experts": 4, "num_experts_per_token": 2, "num_shared_experts": 1, "linear_head_dim": 16,
        "linear_num_heads": 2, "layer_types": ["linear_attention", "full_attention"], **_LATENT, **_SPARSE_LAST,
    },
    "lfm2_moe": {"num_experts": 4, "num_dense_layers": 1, "layer_types": ["conv", "full_attention"]},
    "jamba": {
        "num_experts": 4, "expert_layer_period": 2, "expert_layer_offset": 1, "attn_layer_period": 2,
        "attn_layer_offset": 1,
    },
    "llama4": _LLAMA,
    "gemma4": _GEMMA,
    "gemma4_text": _GEMMA,
    "kimi_k25": {
        "model_type": "deepseek_v3", "n_routed_experts": 4, "n_shared_experts": 1, **_DENSE_FIRST, **_LATENT,
        "q_lora_rank": 32,
    },
    "axk2": {
        "n_routed_experts": 4, "n_shared_experts": 1, "gated_norm_rank": 8, **_GROUPS, **_SPARSE_LAST, **_LATENT,
        **_INDEXER,
    },
    "bailing_hybrid": {
        "num_experts": 4, "num_shared_experts": 1, "head_dim": 16, "num_attention_heads": 4, "num_key_value_heads": 4,
        "layer_types": ["linear_attention", "full_attention"], **_LATENT, **_GROUPS, **_SPARSE_LAST,
    },
    "dots3_note_text": _DOTS,
    "dots3_note": _DOTS,
    "flint": {"num_experts": 4, "shared_expert_intermediate_size": 128, "mlp_only_layers": [0], **_WINDOW_FIRST},
    "granitemoe_swa": {"shared_intermediate_size": 96, **_GRANITE, **_WINDOW_FIRST},
    "hy_v3": {"num_experts": 4, "num_shared_experts": 1, "head_dim": 32, **_SPARSE_LAST},
    "kolibri1": {"num_experts": 4, "shared_expert_intermediate_size": 128, **_WINDOW_FIRST},
    "laguna": {
        "num_experts": 4, "shared_expert_intermediate_size": 128, "moe_routed_scaling_factor": 1.5, **_SPARSE_LAST,
        **_WINDOW_FIRST,
    },
    "mellum": {"num_experts": 4, **_WINDOW_FIRST},
    "beam": {"num_experts": 4, **_GROUPS, **_SPARSE_LAST, **_WINDOW_FIRST},
    "mistral3": {
        "model_type": "mistral4", "n_routed_experts": 4, "n_shared_experts": 1, **_DENSE_FIRST, **_LATENT,
        "q_lora_rank": 32,
    },
    "cohere2_moe": {
        "num_experts": 4, "num_shared_experts": 2, "shared_expert_combination_strategy": "sum", **_WINDOW_FIRST,
    },
    "llama4_text": _LLAMA,
    "aria_text": {"moe_num_experts": 4, "moe_topk": 2, "moe_num_shared_experts": 2},
    "aria": {"moe_num_experts": 4, "moe_topk": 2, "moe_num_shared_experts": 2},
    "nemotron_h": {
        "n_routed_experts": 4, "n_shared_experts": 1, "moe_shared_expert_intermediate_size": 128,
        "layers_block_type": ["mamba", "moe", "attention", "moe"], "mamba_num_heads": 4, "mamba_head_dim": 16,
        "ssm_state_size": 16, "n_groups": 1, "chunk_size": 8, "head_dim": 32,
    },
}  # fmt: skip

AUDIO_SIZES: dict[str, dict[str, Any]] = {
    "dots3_note": {
        "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32,
        "adapter_input_size": 32, "downsample_hidden_size": 8, "feature_size": 16,
    },
}  # fmt: skip

_VISION = {
    "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32, "patch_size": 4,
}  # fmt: skip

VISION_SIZES: dict[str, dict[str, Any]] = {  # of wrappers
    "kimi_k25": {**_VISION, "pos_emb_height": 8, "pos_emb_width": 8},
    "mistral3": {**_VISION, "image_size": 8, "head_dim": 16},
    "dots3_note": {**_VISION, "adapter_in_dim": 32, "mlp_layer_types": ["dense"]},
    "aria": {**_VISION, "model_type": "idefics3_vision", "image_size": 8},
    "qwen3_5_moe": _QWEN_VISION,
    "qwen3_vl_moe": _QWEN_VISION,
    "glm4v_moe": {
        "depth": 1, "hidden_size": 32, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": 64, "patch_size": 4,
        "image_size": 8, "spatial_merge_size": 2,
    },
    "llama4": {
        "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 128, "image_size": 8,
        "patch_size": 4, "vision_output_dim": 32, "projector_input_dim": 32, "projector_output_dim": 32,
        "pixel_shuffle_ratio": 1.0,
    },
    "gemma4": {
        "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 16,
        "intermediate_size": 32, "patch_size": 4,
    },
}  # fmt: skip
