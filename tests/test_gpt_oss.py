"""gpt_oss, whose experts are interleaved, biased and clamped: losses, packed checkpoints, and published checkpoints."""

import itertools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import capture_tokens, make_model
from packed import pack
from safetensors.torch import load_file, save_file
from synthetic import allocation_of
from transformers import AutoModelForCausalLM

import mxmoe_steps
from mxmoe_steps import calibrate, quantize
from mxmoe_steps.allocation.files import write_allocation
from mxmoe_steps.errors import UserError
from mxmoe_steps.models.adapters import FAMILIES
from mxmoe_steps.models.families import open_model
from mxmoe_steps.models.gating import gating_of
from mxmoe_steps.models.streaming import StreamedModel
from mxmoe_steps.models.weights import read_block
from mxmoe_steps.quantizers.grid import from_tensors, quantize_activations
from mxmoe_steps.quantizers.hadamard import rotate
from mxmoe_steps.quantizers.method import method_names
from mxmoe_steps.schemes import BLOCKS, parse_scheme
from mxmoe_steps.tables import LOSSES, read_table

RUNTIME = {"device": "cpu"}
SIZES = {"hidden_size": 96, "intermediate_size": 160}  # 1.5 and 2.5 groups of 64, as 2880 is 22.5 groups of 128
SCHEMES = ["w3a16_g64", "w4a8_g64", "w8a8_fp8"]
ALPHA, LIMIT = 1.702, 0.7


@pytest.fixture(scope="module")
def model() -> Any:
    """Biases are random; layer 1 never chooses expert 3."""
    model = make_model("gpt_oss", **SIZES).requires_grad_(False)
    with torch.no_grad():
        model.model.layers[1].mlp.router.bias[3] = -100
    return model


@pytest.fixture(scope="module")
def checkpoint(model: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gpt-oss") / "model"
    model.save_pretrained(path, max_shard_size="200KB")
    config = json.loads((path / "config.json").read_text())
    del config["swiglu_alpha"]  # published configurations do not have it
    (path / "config.json").write_text(json.dumps(config))
    return path


@pytest.fixture(scope="module")
def captured(checkpoint: Path) -> dict[int, dict[str, torch.Tensor]]:
    tokens = torch.randint(3, 96, (8, 24), generator=torch.Generator().manual_seed(1))
    return capture_tokens(checkpoint, tokens, checkpoint.parent / "capture")


def run_calibrate(checkpoint: Path, out: Path, quantizer: str, scheme: str) -> None:
    paths = {"model": str(checkpoint), "capture": [str(checkpoint.parent / "capture")], "out": str(out)}
    calibrate.calibrate(
        calibrate.CalibrateOptions(**paths, quantizer=quantizer, scheme=scheme, damping=0.01, **RUNTIME)
    )


def stored(folder: Path, scheme: str, key: str, in_features: int) -> torch.Tensor:
    """A block's dequantized weight [N, K] from what calibrate wrote."""
    packed = load_file(folder / f"{parse_scheme(scheme)}.safetensors")
    parts = {part: packed[f"{key}.{part}"] for part in ("qweight", "scales", "zeros") if f"{key}.{part}" in packed}
    return from_tensors(parse_scheme(scheme), in_features, parts).dequantize()


View = Callable[[torch.Tensor], torch.Tensor]


def layer_output(
    moe: Any, tensors: dict[str, torch.Tensor], expert: int = -1, block: int = -1, weight: Any = None, view: Any = None
) -> torch.Tensor:
    """The routed sum in float64, written out; one block may have another weight and view of its input."""
    x = tensors["hidden"].double()
    result = torch.zeros_like(x)
    experts = {name: parameter.double() for name, parameter in moe.experts.named_parameters()}
    for number in range(4):
        gate_up, gate_up_bias = experts["gate_up_proj"][number], experts["gate_up_proj_bias"][number]
        weights = [gate_up[:, ::2].T, gate_up[:, 1::2].T, experts["down_proj"][number].T]
        biases = [gate_up_bias[::2], gate_up_bias[1::2], experts["down_proj_bias"][number]]
        views: list[View] = [lambda x: x] * 3
        if number == expert:
            weights[block], views[block] = weight.double(), view
        gate, up = (views[n](x) @ weights[n].T + biases[n] for n in (0, 1))
        gate, up = (
            torch.minimum(gate, torch.tensor(LIMIT)),
            torch.maximum(torch.minimum(up, torch.tensor(LIMIT)), torch.tensor(-LIMIT)),
        )
        inner = (up + 1) * gate / (1 + torch.exp(-ALPHA * gate))
        scale = ((tensors["ids"] == number) * tensors["weights"]).sum(-1, keepdim=True).double()
        result += (views[2](inner) @ weights[2].T + biases[2]) * scale
    return result


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("quantizer", method_names())
def test_losses_equal_differences_of_the_whole_layer(
    model: Any,
    checkpoint: Path,
    captured: dict[int, dict[str, torch.Tensor]],
    tmp_path: Path,
    quantizer: str,
    scheme: str,
) -> None:
    run_calibrate(checkpoint, tmp_path, quantizer, scheme)
    losses = read_table(LOSSES, tmp_path / f"{parse_scheme(scheme)}.parquet")[0].to_pandas()
    assert len(losses) == 2 * 4 * 3
    turned = rotate if quantizer.endswith("hadamard") else lambda x: x
    for layer, tensors in captured.items():
        moe = model.model.layers[layer].mlp
        original = layer_output(moe, tensors)
        with torch.no_grad():  # the model's own layer says the same, in its float32
            assert torch.allclose(moe(tensors["hidden"].unsqueeze(0))[0].squeeze(0).double(), original, atol=1e-5)
        for row in losses[losses["layer"] == layer].itertuples():
            if row.tokens == 0:
                continue
            weight = stored(tmp_path, scheme, f"{layer}.{row.expert}.{row.block}", row.in_features)

            def seen(x: torch.Tensor) -> torch.Tensor:
                return quantize_activations(turned(x.float()), parse_scheme(scheme)).double()

            changed = layer_output(moe, tensors, row.expert, BLOCKS.index(row.block), weight, seen)
            change = changed - original
            assert row.out_sq == pytest.approx(float(change.square().sum()), rel=2e-3, abs=1e-9)
            fisher = 0.5 * (change * tensors["gradient"].double()).sum(-1).square().mean()
            assert row.fisher == pytest.approx(float(fisher), rel=2e-3, abs=1e-12)
    starved = losses[(losses["layer"] == 1) & (losses["expert"] == 3)]
    assert (starved["tokens"] == 0).all()
    assert (starved["out_sq"] == 0).all()
    assert starved["fallback"].all() == quantizer.startswith("gptq")


def test_many_values_are_beyond_the_clamp(model: Any, captured: dict[int, dict[str, torch.Tensor]]) -> None:
    """What the other tests of this family stand on."""
    experts = model.model.layers[0].mlp.experts
    products = captured[0]["hidden"] @ experts.gate_up_proj[0] + experts.gate_up_proj_bias[0]
    assert experts.limit == LIMIT
    assert experts.alpha == ALPHA
    assert 0.05 < float((products[:, ::2] > LIMIT).float().mean()) < 0.5
    assert 0.1 < float((products[:, 1::2].abs() > LIMIT).float().mean()) < 0.6


def test_a_change_of_up_is_the_difference_of_its_clamped_values() -> None:
    generator = torch.Generator().manual_seed(0)
    product, change = (torch.randn(1000, generator=generator, dtype=torch.float64) * size for size in (1.0, 0.5))
    gating = gating_of(FAMILIES["gpt_oss"], {"swiglu_limit": LIMIT})
    expected = gating.of_up(product + change) - gating.of_up(product)
    assert torch.allclose(gating.change_of_up(product, change), expected, atol=1e-15)
    small = torch.full((1,), 1e-12, dtype=torch.float32)
    assert torch.equal(gating.change_of_up(torch.tensor([0.3]), small), small), "nothing cancels"


@pytest.fixture(scope="module")
def packed(checkpoint: Path, captured: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every kind of block, 16-bit ones too, in turn."""
    root = tmp_path_factory.mktemp("packed")
    names = ["w3a16_g64_asym", "w2a16_g64_asym", "w16a16", "w8a16_g-1_sym"]
    for name in names:
        if name != "w16a16":
            run_calibrate(checkpoint, root / "gptq", "gptq", name)
    choices = [(layer, expert) for layer in range(2) for expert in range(4)]
    assignment = [
        [layer, expert, *(names[(layer + expert + number) % 4] for number in range(3))] for layer, expert in choices
    ]
    write_allocation(str(root / "allocation.json"), allocation_of(assignment, "gptq", checkpoint))
    paths = {"allocation": str(root / "allocation.json"), "packed": str(root / "gptq"), "out": str(root / "out")}
    quantize.quantize(quantize.QuantizeOptions(trust_remote_code=False, model=str(checkpoint), **paths))
    return root


def test_a_packed_checkpoint_is_the_original_with_dequantized_weights(
    model: Any, checkpoint: Path, packed: Path
) -> None:
    expected = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    loaded = mxmoe_steps.load_quantized(str(packed / "out"))
    tokens = torch.randint(3, 96, (3, 24), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        original = expected(tokens).logits
        for layer, expert, *schemes in json.loads((packed / "allocation.json").read_text())["assignment"]:
            experts = expected.model.layers[layer].mlp.experts
            gate_up, bias = experts.gate_up_proj[expert], experts.gate_up_proj_bias[expert]
            weights = [gate_up[:, ::2].T, gate_up[:, 1::2].T, experts.down_proj[expert].T]
            biases = [bias[::2], bias[1::2], experts.down_proj_bias[expert]]
            for block, scheme, weight, bias in zip(BLOCKS, schemes, weights, biases, strict=True):
                linear = loaded.model.layers[layer].mlp.experts[expert].get_submodule(f"{block}_proj")
                assert torch.equal(linear.bias, bias)
                if scheme == "w16a16":
                    assert torch.equal(linear.weight, weight)
                    continue
                weight.copy_(stored(packed / "gptq", scheme, f"{layer}.{expert}.{block}", weight.shape[1]))
                assert torch.equal(linear.dequantize(), weight)
        reference = expected(tokens).logits
        assert (reference - original).norm() / original.norm() > 0.02
        assert torch.allclose(loaded(tokens).logits, reference, atol=1e-5)


def test_a_packed_checkpoint_streams_and_saves(packed: Path, tmp_path: Path) -> None:
    loaded = mxmoe_steps.load_quantized(str(packed / "out"))
    tokens = torch.randint(3, 96, (2, 24), generator=torch.Generator().manual_seed(3))
    streamed = StreamedModel(packed / "out", "float32", "cpu")
    loaded.save_pretrained(tmp_path)
    with torch.no_grad():
        expected = torch.log_softmax(loaded(tokens, use_cache=False).logits, -1)
        with streamed.loaded("model.embed_tokens"):
            hidden = streamed.embed(tokens)
        for layer in range(streamed.layers):
            with streamed.loaded(streamed.layer_path(layer)):
                hidden = streamed.run_layer(layer, hidden)
        with streamed.head():
            assert torch.equal(streamed.log_probs(streamed.decoder.norm(hidden)), expected)
        again = mxmoe_steps.load_quantized(str(tmp_path))
        assert torch.equal(torch.log_softmax(again(tokens, use_cache=False).logits, -1), expected)


def test_bfloat16_biases_keep_their_bytes(checkpoint: Path, tmp_path: Path) -> None:
    AutoModelForCausalLM.from_pretrained(checkpoint, dtype="bfloat16").save_pretrained(tmp_path / "model")
    dealt = itertools.cycle(["w3a16_g64", "w2a16_g64", "w16a16", "w8a16"])
    out = pack(tmp_path / "model", tmp_path / "packed", lambda *_: (next(dealt), next(dealt), next(dealt)))
    before = load_file(tmp_path / "model" / "model.safetensors")
    after = load_file(out / "model.safetensors")
    assert not [name for name in after if "gate_up_proj" in name or name.endswith("experts.down_proj")]
    for layer in range(2):
        prefix = f"model.layers.{layer}.mlp.experts"
        for expert in range(4):
            gate_up = before[f"{prefix}.gate_up_proj_bias"][expert]
            expected = [gate_up[::2], gate_up[1::2], before[f"{prefix}.down_proj_bias"][expert]]
            for block, bias in zip(BLOCKS, expected, strict=True):
                assert torch.equal(after[f"{prefix}.{expert}.{block}_proj.bias"], bias)
                assert after[f"{prefix}.{expert}.{block}_proj.bias"].dtype == torch.bfloat16
    loaded = mxmoe_steps.load_quantized(str(out))
    assert loaded(torch.arange(9)[None]).logits.isfinite().all()


def test_a_nan_bias_is_named(checkpoint: Path, captured: Any, tmp_path: Path) -> None:
    shutil.copytree(checkpoint, tmp_path / "model")
    name = "model.layers.1.mlp.experts.gate_up_proj_bias"
    file = open_model(tmp_path / "model").files[name]
    tensors = load_file(file)
    tensors[name][2, 5] = float("nan")  # an odd column is up's
    save_file(tensors, file, metadata={"format": "pt"})
    folder = open_model(tmp_path / "model")
    assert read_block(folder, 1, range(4), "gate", parameter="bias").shape == (4, 160)
    with pytest.raises(UserError, match="layer 1, expert 2, up: the biases hold NaN or infinity"):
        read_block(folder, 1, range(4), "up", parameter="bias")
