"""Every supported family on a tiny random checkpoint: names, hooks, losses, and a packed checkpoint that loads."""

import itertools
from pathlib import Path

import pytest
import torch
from checkpoints import block_weight, capture_tokens, make_checkpoint, moe_of
from family_sizes import FAMILY_SIZES
from packed import pack
from synthetic import allocation_of

import mxmoe_steps
from mxmoe_steps import calibrate, quantize
from mxmoe_steps.allocation.files import write_allocation
from mxmoe_steps.inference.gpu import expert_modules
from mxmoe_steps.models.adapters import FAMILIES
from mxmoe_steps.models.families import open_model
from mxmoe_steps.models.loading import auto_class
from mxmoe_steps.models.packed import PackedLinear
from mxmoe_steps.models.weights import read_block
from mxmoe_steps.schemes import SHARED


def test_every_family_is_covered() -> None:
    assert set(FAMILY_SIZES) == set(FAMILIES)


@pytest.mark.parametrize("family", sorted(FAMILY_SIZES))
def test_a_packed_checkpoint_loads_and_computes_the_same(family: str, tmp_path: Path) -> None:
    make_checkpoint(family, tmp_path / "model")
    folder = open_model(tmp_path / "model")
    model = auto_class(folder).from_pretrained(tmp_path / "model", dtype=torch.float32)
    layers = [layer for layer in range(folder.layers) if hasattr(moe_of(model, family, layer), "experts")]
    assert folder.moe_layers == layers
    assert folder.experts == 4
    gate = 96 if FAMILIES[family].gated else 0
    for block, shape in (("gate", (4, gate, 64)), ("up", (4, 96, 64)), ("down", (4, 64, 96))):
        assert read_block(folder, layers[0], range(4), block).shape == shape

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
                model=str(tmp_path / "model"), capture=str(tmp_path / "capture"), **options, **runtime
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
