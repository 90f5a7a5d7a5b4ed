"""Every supported family on a tiny random checkpoint: names, hooks, losses, and a packed checkpoint that loads."""

import argparse
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import mxmoe_steps
from mxmoe_steps import calibrate, capture, quantize
from mxmoe_steps.allocation.files import write_allocation
from mxmoe_steps.models.families import FAMILIES, open_model
from mxmoe_steps.models.loading import load_model
from mxmoe_steps.models.weights import read_block
from mxmoe_steps.schemes import SHARED

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
EXTRA: dict[str, dict[str, Any]] = {
    "qwen2_moe": {"num_experts": 4, "shared_expert_intermediate_size": 128},
    "qwen3_moe": {"num_experts": 4, "head_dim": 32},
    "olmoe": {"num_experts": 4},
    "mixtral": {"num_local_experts": 4},
    "phimoe": {"num_local_experts": 4},
    "minimax": {"num_local_experts": 4, "layer_types": ["full_attention", "full_attention"]},
    "deepseek_v2": {"n_routed_experts": 4, "n_shared_experts": 2, "first_k_dense_replace": 1, "n_group": 1},
    "deepseek_v3": {"n_routed_experts": 4, "n_shared_experts": 1, "first_k_dense_replace": 1, "n_group": 1},
    "glm4_moe": {"n_routed_experts": 4, "n_shared_experts": 1, "first_k_dense_replace": 1, "n_group": 1},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "first_k_dense_replace": 1, "n_group": 1},
}
LATENT = {"q_lora_rank": None, "kv_lora_rank": 16, "qk_nope_head_dim": 16, "qk_rope_head_dim": 16, "v_head_dim": 16}


def make_checkpoint(family: str, path: Path) -> None:
    extra = EXTRA[family] | ({"topk_group": 1} if "n_group" in EXTRA[family] else {})
    if family.startswith("deepseek"):
        extra |= LATENT
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **SIZES, **extra)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.1)
    model.save_pretrained(path)


def test_every_family_is_covered() -> None:
    assert set(EXTRA) == set(FAMILIES)


@pytest.mark.parametrize("family", sorted(EXTRA))
def test_a_packed_checkpoint_loads_and_computes_the_same(family: str, tmp_path: Path) -> None:
    make_checkpoint(family, tmp_path / "model")
    folder, model = load_model(tmp_path / "model", "float32", "cpu")
    layers = [1] if "first_k_dense_replace" in EXTRA[family] else [0, 1]
    assert folder.moe_layers == layers
    assert folder.experts == 4
    for block, shape in (("gate", (4, 96, 64)), ("up", (4, 96, 64)), ("down", (4, 64, 96))):
        assert read_block(folder, layers[0], range(4), block).shape == shape

    tokens = torch.randint(3, 96, (2, 24), generator=torch.Generator().manual_seed(1))
    captured = capture.capture_batch(folder, model, tokens, True, torch.Generator().manual_seed(2))
    assert sorted(captured) == layers
    from safetensors.torch import save_file

    for layer, tensors in captured.items():
        assert tensors["hidden"].shape == (48, 64)
        assert tensors["ids"].shape == tensors["weights"].shape == (48, 2)
        assert ("shared" in tensors) == (FAMILIES[family].shared is not None)
        assert tensors["gradient"].abs().max() > 0
        (tmp_path / "capture").mkdir(exist_ok=True)
        save_file({k: v.contiguous() for k, v in tensors.items()}, tmp_path / f"capture/layer-{layer:03d}.safetensors")

    for scheme in ("w8a16_g-1_sym", "w8a8_g-1_sym"):
        options = {"quantizer": "gptq", "scheme": scheme, "damping": 0.01, "out": str(tmp_path / "packed")}
        runtime = {"device": "cpu", "threads": 1, "seed": 0}
        calibrate.calibrate(
            argparse.Namespace(model=str(tmp_path / "model"), capture=str(tmp_path / "capture"), **options, **runtime)
        )
    experts = [SHARED] * (FAMILIES[family].shared is not None) + [0, 1, 2, 3]
    assignment = [[layer, expert, "w8a16_g-1_sym", "w16a16", "w8a8_g-1_sym"] for layer in layers for expert in experts]
    write_allocation(str(tmp_path / "allocation.json"), {"assignment": assignment, "quantizer": "gptq"})
    quantize.quantize(
        argparse.Namespace(
            model=str(tmp_path / "model"),
            allocation=str(tmp_path / "allocation.json"),
            packed=str(tmp_path / "packed"),
            out=str(tmp_path / "checkpoint"),
        )
    )
    packed = mxmoe_steps.load_quantized(str(tmp_path / "checkpoint"))
    with torch.no_grad():
        expected, got = model(tokens).logits, packed(tokens).logits
    error = (got - expected).norm() / expected.norm()
    assert 0 < error < 0.05  # 8 bits; a mislaid expert or gate would give an error near 1
    assert open_model(tmp_path / "checkpoint").config["quantization_config"]["quant_method"] == "mxmoe"
