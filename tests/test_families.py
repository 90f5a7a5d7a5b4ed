"""Every supported family on a tiny random checkpoint: names, hooks, losses, and a packed checkpoint that loads."""

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import SIZES, block_weight, capture_tokens, make_checkpoint, make_model, moe_of
from family_sizes import FAMILY_SIZES, VISION_SIZES
from packed import pack
from safetensors.torch import load_file, save_file
from synthetic import allocation_of
from transformers import AutoModelForCausalLM

import mxmoe_steps
from mxmoe_steps import calibrate, quantize
from mxmoe_steps.allocation.files import write_allocation
from mxmoe_steps.errors import UserError
from mxmoe_steps.inference.gpu import expert_modules
from mxmoe_steps.job_memory import Sizes
from mxmoe_steps.models.__main__ import main
from mxmoe_steps.models.adapters import FAMILIES, REFUSED
from mxmoe_steps.models.families import ModelFolder, open_model
from mxmoe_steps.models.loading import auto_class
from mxmoe_steps.models.packed import PackedLinear
from mxmoe_steps.models.weights import read_block
from mxmoe_steps.schemes import BLOCKS, SHARED
from mxmoe_steps.timing.blocks import blocks_of

# The others' experts are like those of one of these; what calibrate makes of them is in test_identity
CALIBRATED = {
    "qwen2_moe", "qwen3_moe", "olmoe", "mixtral", "phimoe", "minimax", "deepseek_v2", "deepseek_v3", "glm4_moe",
    "dots1", "gpt_oss", "qwen3_5_moe", "qwen3_vl_moe", "granitemoe", "llama4", "gemma4", "nemotron_h", "ernie4_5_moe",
}  # fmt: skip


def test_every_family_is_covered() -> None:
    assert set(FAMILY_SIZES) == set(FAMILIES)


def check_blocks(folder: ModelFolder, model: Any, family: str) -> None:
    """Layers, experts and shapes of blocks are those of transformers' model."""
    layers = [layer for layer in range(folder.layers) if hasattr(moe_of(model, family, layer), "experts")]
    assert folder.moe_layers == layers
    assert folder.experts == 4
    assert folder.vocabulary == 96
    blocks = blocks_of(folder, sizes=True)
    assert len(blocks) == len(layers) * len(folder.expert_ids()) * 3
    layer = model.get_submodule(FAMILIES[family].layer_path(layers[-1]))
    assert Sizes.of(folder).layer >= sum(parameter.numel() for parameter in layer.parameters())
    assert Sizes.of(folder).experts * len(layers) >= blocks.params.sum()
    gate = 96 if FAMILIES[family].gated else 0
    for block, shape in (("gate", (4, gate, 64)), ("up", (4, 96, 64)), ("down", (4, 64, 96))):
        weights = read_block(folder, layers[-1], range(4), block)
        assert weights.shape == shape
        for expert in (0, 3):
            assert folder.raw_block(layers[-1], expert, block).read() == weights[expert].numpy().tobytes()
            if block in FAMILIES[family].own_blocks:
                assert torch.equal(
                    weights[expert], block_weight(moe_of(model, family, layers[-1]), family, expert, block)
                )


@pytest.mark.parametrize("family", sorted(CALIBRATED))
def test_a_packed_checkpoint_loads_and_computes_the_same(family: str, tmp_path: Path) -> None:
    make_checkpoint(family, tmp_path / "model")
    folder = open_model(tmp_path / "model")
    model = auto_class(folder).from_pretrained(tmp_path / "model", dtype=torch.float32)
    check_blocks(folder, model, family)
    layers = folder.moe_layers
    tokens = torch.randint(3, 96, (2, 24), generator=torch.Generator().manual_seed(1))
    captured = capture_tokens(tmp_path / "model", tokens, tmp_path / "capture")
    assert sorted(captured) == layers
    for tensors in captured.values():
        assert tensors["hidden"].shape == (48, 64)
        assert tensors["ids"].shape == tensors["weights"].shape == (48, 1 if family == "llama4" else 2)
        assert ("shared" in tensors) == (FAMILIES[family].shared is not None)
        assert tensors["gradient"].abs().max() > 0

    for scheme in ("w8a16_g-1_sym", "w8a8_g-1_sym"):
        options = {"quantizer": "gptq", "scheme": scheme, "damping": 0.01, "out": str(tmp_path / "packed")}
        runtime = {"device": "cpu", "threads": 1, "seed": 0}
        calibrate.calibrate(
            calibrate.CalibrateOptions(
                model=str(tmp_path / "model"), capture=[str(tmp_path / "capture")], **options, **runtime
            )
        )
    experts = [SHARED] * (FAMILIES[family].shared is not None) + [0, 1, 2, 3]
    assignment = [[layer, expert, "w8a16_g-1_sym", "w16a16", "w8a8_g-1_sym"] for layer in layers for expert in experts]
    write_allocation(str(tmp_path / "allocation.json"), allocation_of(assignment, "gptq", tmp_path / "model"))
    quantize.quantize(
        quantize.QuantizeOptions(
            trust_remote_code=False,
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
    # 8 bits, whose error relu squared doubles; a mislaid expert or gate would give an error near 1
    assert 0 < error < (0.05 if FAMILIES[family].gated else 0.1)
    assert open_model(tmp_path / "checkpoint").config["quantization_config"]["quant_method"] == "mxmoe"


@pytest.mark.parametrize("family", sorted(FAMILY_SIZES))
def test_a_packed_checkpoint_generates_what_transformers_does_with_its_weights(family: str, tmp_path: Path) -> None:
    """With the caches of every kind of layer; w16a16 blocks are those of the checkpoint."""
    make_checkpoint(family, tmp_path / "model")
    dealt = itertools.cycle(["w3a16_g32", "w4a16_g32", "w16a16", "w8a16_g-1_sym"])
    path = pack(tmp_path / "model", tmp_path / "packed", lambda *_: (next(dealt), next(dealt), next(dealt)))
    packed, folder = mxmoe_steps.load_quantized(path), open_model(tmp_path / "model")
    model = auto_class(folder).from_pretrained(tmp_path / "model", dtype=torch.float32)
    check_blocks(folder, model, family)
    tokens = torch.randint(3, 96, (2, 11), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        original = model(tokens).logits
        for layer in folder.moe_layers:
            moe = moe_of(model, family, layer)
            for expert, module in expert_modules(moe_of(packed, family, layer), FAMILIES[family]).items():
                for block in FAMILIES[family].own_blocks:
                    linear = module.get_submodule(f"{block}_proj")
                    weight = linear.dequantize() if isinstance(linear, PackedLinear) else linear.weight
                    block_weight(moe, family, expert, block).copy_(weight)
        expected = model(tokens).logits
        assert (expected - original).norm() / original.norm() > 0.01
        torch.testing.assert_close(packed(tokens).logits, expected, rtol=1e-4, atol=1e-5)
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    assert torch.equal(packed.generate(tokens, **options), model.generate(tokens, **options))


@pytest.mark.parametrize("family", ["qwen3_5_moe", "qwen3_vl_moe", "llama4", "gemma4"])
def test_what_is_not_the_language_models_experts_is_copied(family: str, tmp_path: Path) -> None:
    """The vision tower, and layers that predict tokens ahead, which transformers drops."""
    make_checkpoint(family, tmp_path / "model")
    ahead = {"mtp.layers.0.mlp.experts.0.up_proj.weight": torch.ones(96, 64), "mtp.norm.weight": torch.ones(64)}
    file = sorted((tmp_path / "model").glob("*.safetensors"))[0]
    save_file(load_file(file) | ahead, file, metadata={"format": "pt"})
    index = tmp_path / "model" / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"] |= dict.fromkeys(ahead, file.name)
    index.write_text(json.dumps(content))
    path = pack(tmp_path / "model", tmp_path / "packed", lambda *_: ("w4a16_g32",) * 3)
    before, after = (open_model(folder) for folder in (tmp_path / "model", path))
    replaced = {
        before.place(layer, expert, block).tensor
        for layer in before.moe_layers
        for expert in before.expert_ids()
        for block in BLOCKS
    }
    kept = set(before.files) - replaced
    assert any("vision" in name or "visual" in name for name in kept)
    assert set(ahead) <= kept
    for name in kept:
        assert after.raw(name).read() == before.raw(name).read()
    assert not replaced & set(after.files)


def test_the_text_class_loads_the_language_model_of_a_wrapper(tmp_path: Path) -> None:
    """``AutoModelForCausalLM``, for which transformers has a class of the text model alone."""
    make_checkpoint("qwen3_5_moe", tmp_path / "model")
    path = pack(tmp_path / "model", tmp_path / "packed", lambda *_: ("w4a16_g32", "w16a16", "w3a16_g32"))
    tokens = torch.randint(3, 96, (2, 11), generator=torch.Generator().manual_seed(3))
    text, whole = AutoModelForCausalLM.from_pretrained(path), mxmoe_steps.load_quantized(path)
    assert type(text).__name__ == "Qwen3_5MoeForCausalLM"
    with torch.no_grad():
        assert torch.equal(text(tokens).logits, whole(tokens).logits)


@pytest.mark.parametrize(
    ("family", "changes", "why"),
    [
        (
            "gemma4",
            {"num_kv_shared_layers": 1},
            "num_kv_shared_layers 1 of gemma4 is not supported: a layer takes keys",
        ),
        (
            "glm_moe_dsa",
            {"indexer_types": ["full", "shared"]},
            "indexer_types 'shared' of glm_moe_dsa .* shared indexer",
        ),
        (
            "nemotron_h",
            {"moe_latent_size": 32},
            "moe_latent_size 32 of nemotron_h is not supported: routed experts see",
        ),
        (
            "cohere2_moe",
            {"shared_expert_combination_strategy": "average"},
            "shared_expert_combination_strategy 'average' of cohere2_moe .* mean of routed and shared experts",
        ),
        ("deepseek_v3", {"model_type": "axk1"}, "'axk1' is not supported: a norm inside of the MoE module"),
        ("mixtral", {"model_type": "longcat_flash"}, "'longcat_flash' is not supported: some experts have no weights"),
    ],
)
def test_what_cannot_work_is_refused_with_the_reason(
    family: str, changes: dict[str, Any], why: str, tmp_path: Path
) -> None:
    sizes = SIZES | FAMILY_SIZES[family] | changes
    config = {"text_config": sizes} if family in VISION_SIZES else sizes
    (tmp_path / "config.json").write_text(json.dumps({"model_type": family} | config))
    with pytest.raises(UserError, match=why):
        open_model(tmp_path)


def test_the_command_prints_every_family_and_refusal(capsys: pytest.CaptureFixture[str]) -> None:
    main()
    printed = capsys.readouterr().out
    assert all(f"`{name}`" in printed for name in (*FAMILIES, *REFUSED))
    assert not set(FAMILIES) & set(REFUSED)


@pytest.mark.parametrize(
    ("family", "without"),
    [
        ("ernie4_5_moe", {"moe_num_shared_experts": 0}),
        ("cohere2_moe", {"num_shared_experts": 0, "shared_expert_combination_strategy": "average"}),
    ],
)
def test_a_model_without_shared_expert_in_a_family_that_has_them(
    family: str, without: dict[str, Any], tmp_path: Path
) -> None:
    make_checkpoint(family, tmp_path / "model", **without)
    assert SHARED not in open_model(tmp_path / "model").expert_ids()
    path = pack(tmp_path / "model", tmp_path / "packed", lambda *_: ("w4a16_g32",) * 3)
    mxmoe_steps.load_quantized(path)(torch.arange(5)[None])


def test_stacked_experts_are_read_as_transformers_reads_them_whichever_way_they_lie(tmp_path: Path) -> None:
    """Published ones are transposed; those that transformers saves, and square ones, need not be."""
    for inner in (96, 32):  # 2 x 32 = 64 features: gate and up are square, and taken as they are
        model = make_model("qwen3_vl_moe", moe_intermediate_size=inner)
        path = tmp_path / str(inner)
        model.save_pretrained(path)
        folder = open_model(path)
        weight = model.get_submodule(folder.family.moe_path(1)).experts.gate_up_proj
        for block, expected in zip(BLOCKS, weight.chunk(2, dim=1), strict=False):
            assert torch.equal(read_block(folder, 1, range(4), block), expected)
            assert folder.raw_block(1, 2, block).read() == expected[2].detach().numpy().tobytes()
