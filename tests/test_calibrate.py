"""Expert-local losses against whole-layer forwards in float64, and against the KL they estimate."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from checkpoints import capture_tokens
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from mxmoe_steps import calibrate, capture
from mxmoe_steps.atomic import canonical_json
from mxmoe_steps.errors import UserError
from mxmoe_steps.facts import CaptureFacts
from mxmoe_steps.models.raw import facts_of
from mxmoe_steps.quantizers.grid import from_tensors, quantize_activations
from mxmoe_steps.quantizers.hadamard import rotate
from mxmoe_steps.schemes import BLOCKS, SHARED, parse_scheme
from mxmoe_steps.tables import LOSSES, read_table

RUNTIME = {"device": "cpu"}


@pytest.fixture(scope="module")
def captured(tiny_moe: Path, text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("capture")
    sources = canonical_json({"words": {"files": [str(text_file)], "separator": "-----"}})
    model = {"model": str(tiny_moe), "dtype": "float32", "trust_remote_code": False}
    text = {"sources": sources, "text": "words", "sequences": 8, "length": 64}
    capture.capture(capture.CaptureOptions(**model, **text, **RUNTIME, batch=4, out=str(out)))
    return out


def layer_file(folder: Path, layer: int) -> Path:
    return folder / f"layer-{layer:03d}.safetensors"


def calibrated(tiny_moe: Path, captured: Path, out: Path, quantizer: str, scheme: str, **extra: object) -> None:
    options = {"quantizer": quantizer, "scheme": scheme, "damping": 0.01, "out": str(out), **RUNTIME, **extra}
    calibrate.calibrate(calibrate.CalibrateOptions(model=str(tiny_moe), capture=[str(captured)], **options))


def run(tiny_moe: Path, captured: Path, out: Path, quantizer: str, scheme: str) -> pd.DataFrame:
    calibrated(tiny_moe, captured, out, quantizer, scheme)
    return read_table(LOSSES, out / f"{parse_scheme(scheme)}.parquet")[0].to_pandas()


def layer_output(moe: torch.nn.Module, tensors: dict[str, torch.Tensor], changed: tuple | None) -> torch.Tensor:
    """The MoE layer in float64, written out; ``changed`` = (expert, block, weight, its view of x)."""
    x = tensors["hidden"].double()
    result = torch.zeros_like(x)
    experts = moe.experts.gate_up_proj.shape[0]
    for expert in [*range(experts), SHARED]:
        if expert == SHARED:
            shared = moe.shared_expert
            weights = [shared.gate_proj.weight, shared.up_proj.weight, shared.down_proj.weight]
            scale = tensors["shared"].double()
        else:
            gate, up = moe.experts.gate_up_proj[expert].chunk(2)
            weights = [gate, up, moe.experts.down_proj[expert]]
            scale = ((tensors["ids"] == expert) * tensors["weights"]).sum(-1).double()
        weights = [weight.double() for weight in weights]
        if changed is not None and changed[0] == expert:
            weights[changed[1]] = changed[2].double()
        gate_in = up_in = x
        if changed is not None and changed[0] == expert and changed[1] < 2:
            quantized = changed[3](x)
            gate_in, up_in = (quantized, x) if changed[1] == 0 else (x, quantized)
        inner = torch.nn.functional.silu(gate_in @ weights[0].T) * (up_in @ weights[1].T)
        if changed is not None and changed[0] == expert and changed[1] == 2:
            inner = changed[3](inner)
        result += (inner @ weights[2].T) * scale.unsqueeze(-1)
    return result


@pytest.mark.parametrize("scheme", ["w2a16_g32", "w8a8_fp8", "w4a8_g32"])
@pytest.mark.parametrize("quantizer", ["rtn", "gptq", "rtn+hadamard", "gptq+hadamard"])
def test_losses_equal_whole_layer_differences(
    tiny_moe: Path, captured: Path, tmp_path: Path, quantizer: str, scheme: str
) -> None:
    losses = run(tiny_moe, captured, tmp_path, quantizer, scheme).set_index(["layer", "expert", "block"])
    packed = load_file(tmp_path / f"{parse_scheme(scheme)}.safetensors")
    model = AutoModelForCausalLM.from_pretrained(tiny_moe, dtype=torch.float32).requires_grad_(False)
    assert len(losses) == 2 * 5 * 3
    for layer in range(2):
        tensors = load_file(layer_file(captured, layer))
        moe = model.model.layers[layer].mlp
        original = layer_output(moe, tensors, None)
        with torch.no_grad():  # the model's own layer says the same, in its float32
            assert torch.allclose(moe(tensors["hidden"].unsqueeze(0)).squeeze(0).double(), original, atol=1e-5)
        for expert in [0, 3, SHARED]:
            for number, block in enumerate(BLOCKS):
                parts = {
                    part: packed[key]
                    for part in ("qweight", "scales", "zeros")
                    if (key := f"{layer}.{expert}.{block}.{part}") in packed
                }
                row = losses.loc[(layer, expert, block)]
                weight = from_tensors(parse_scheme(scheme), int(row["in_features"]), parts).dequantize()
                turned = rotate if quantizer.endswith("hadamard") else lambda x: x

                def seen(x: torch.Tensor, turned=turned) -> torch.Tensor:
                    return quantize_activations(turned(x), parse_scheme(scheme)).double()

                view = (expert, number, weight, seen)
                change = layer_output(moe, tensors, view) - original
                assert row["out_sq"] == pytest.approx(float(change.square().sum()), rel=2e-3, abs=1e-9)
                fisher = 0.5 * (change * tensors["gradient"].double()).sum(-1).square().mean()
                assert row["fisher"] == pytest.approx(float(fisher), rel=2e-3, abs=1e-12)


def test_experts_without_tokens_are_quantized_and_reported(tiny_moe: Path, captured: Path, tmp_path: Path) -> None:
    losses = run(tiny_moe, captured, tmp_path, "gptq", "w4a16_g32")
    ids = load_file(captured / "layer-001.safetensors")["ids"]
    counts = np.bincount(ids.flatten(), minlength=4)
    assert counts.min() == 0, "the fixture should starve an expert"
    starved = losses[(losses["layer"] == 1) & (losses["expert"] == int(counts.argmin()))]
    assert (starved["tokens"] == 0).all()
    assert starved["fallback"].all()
    assert (starved["out_sq"] == 0).all()
    packed = load_file(tmp_path / "w4a16_g32_asym.safetensors")
    codes = packed[f"1.{int(counts.argmin())}.down.qweight"]
    assert codes.unique().numel() > 16  # real codes, not zeros


def test_the_log_names_experts_with_too_few_tokens(
    tiny_moe: Path, captured: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Routed experts need 96 tokens, the shared one 160; layer 1 never chooses expert 0."""
    fewer = tmp_path / "fewer"
    fewer.mkdir()
    counts = [np.bincount(load_file(layer_file(captured, 0))["ids"].flatten(), minlength=4)]
    for layer in range(2):
        tensors = {name: whole[:150].clone() for name, whole in load_file(layer_file(captured, layer)).items()}
        facts = facts_of(layer_file(captured, layer), CaptureFacts, "") | {"sequences": 1, "length": 150}
        save_file(tensors, layer_file(fewer, layer), metadata={"mxmoe": canonical_json(facts)})
    counts.append(np.bincount(tensors["ids"].flatten(), minlength=4))
    assert counts[0].min() >= 96
    assert counts[1][0] == 0
    named = [f"{expert} ({count} of 96)" for expert, count in enumerate(counts[1]) if count < 96]
    run(tiny_moe, captured, tmp_path / "whole", "gptq", "w4a16_g32")
    warning, line, *_ = capsys.readouterr().err.splitlines()
    assert warning.startswith(
        "warning: 512 tokens of calibration text are 4 for each of an expert's 64 input features;"
    )
    assert "1,024, 8 for each" in warning
    assert line == "calibrate gptq w4a16_g32_asym: layer 0"
    run(tiny_moe, fewer, tmp_path / "gptq", "gptq", "w4a16_g32")
    assert capsys.readouterr().err.splitlines()[2:] == [
        "calibrate gptq w4a16_g32_asym: layer 1; fewer tokens than input features: experts shared (150 of 160),"
        f" {', '.join(named)}: their Hessians are mostly the layer's",
    ]
    run(tiny_moe, fewer, tmp_path / "rtn", "rtn", "w4a16_g32")  # has no Hessians
    assert capsys.readouterr().err.splitlines() == [f"calibrate rtn w4a16_g32_asym: layer {n}" for n in range(2)]


def test_gptq_loses_less_than_rounding(tiny_moe: Path, captured: Path, tmp_path: Path) -> None:
    rounded = run(tiny_moe, captured, tmp_path / "rtn", "rtn", "w2a16_g32")
    trained = run(tiny_moe, captured, tmp_path / "gptq", "gptq", "w2a16_g32")
    assert trained["out_sq"].sum() < 0.9 * rounded["out_sq"].sum()


def test_fisher_estimates_kl(tiny_moe: Path, captured: Path, tmp_path: Path, text_file: Path) -> None:
    """1/2 (gradient . change)^2 with labels drawn from the model is the second-order KL of a change."""
    losses = run(tiny_moe, captured, tmp_path, "rtn", "w3a16_g32").set_index(["layer", "expert", "block"])
    packed = load_file(tmp_path / "w3a16_g32_asym.safetensors")
    model = AutoModelForCausalLM.from_pretrained(tiny_moe, dtype=torch.float32).requires_grad_(False)
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, model.config.vocab_size, (64, 64), generator=generator)
    # Both sides on the same random tokens: capture them rather than the text.
    inputs = capture_tokens(tiny_moe, tokens, tmp_path / "capture")
    names = ("qweight", "scales", "zeros")
    weight = from_tensors(
        parse_scheme("w3a16_g32"), 160, {part: packed[f"0.-1.down.{part}"] for part in names}
    ).dequantize()
    shared = model.model.layers[0].mlp.shared_expert
    with torch.no_grad():
        before = torch.log_softmax(model(tokens).logits, -1)
        hidden = inputs[0]["hidden"]
        inner = shared.act_fn(shared.gate_proj(hidden)) * shared.up_proj(hidden)
        change = (inner @ (weight - shared.down_proj.weight).T) * inputs[0]["shared"].unsqueeze(-1)
        estimate = 0.5 * (change * inputs[0]["gradient"]).sum(-1).square().mean()
        shared.down_proj.weight.copy_(weight)
        after = torch.log_softmax(model(tokens).logits, -1)
    kl = (before.exp() * (before - after)).sum(-1).mean()
    assert losses.loc[(0, SHARED, "down"), "fisher"] > 0
    assert float(estimate) == pytest.approx(float(kl), rel=0.35)


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


@pytest.fixture
def layers_done(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by every layer that is calibrated; a layer in the negative stops the run instead, once."""
    original, done = calibrate.calibrate_layer, []

    def count(folder: object, layer: int, *args: object) -> object:
        if -1 - layer in done:
            done.remove(-1 - layer)
            raise KeyboardInterrupt
        done.append(layer)
        return original(folder, layer, *args)

    monkeypatch.setattr(calibrate, "calibrate_layer", count)
    return done


@pytest.mark.parametrize("ranges", [[[1, 2], [0, 1]], [[1, 9]], [[0, 2]], [[5, 9]]])
def test_layers_in_jobs_of_their_own_write_the_bytes_of_one_job(
    tiny_moe: Path, captured: Path, tmp_path: Path, layers_done: list[int], ranges: list[list[int]]
) -> None:
    calibrated(tiny_moe, captured, tmp_path / "whole", "gptq", "w3a16_g32")
    assert layers_done == [0, 1]
    for layers in ranges:
        calibrated(tiny_moe, captured, tmp_path / "parts", "gptq", "w3a16_g32", layers=layers)
        assert not (tmp_path / "parts" / "w3a16_g32_asym.parquet").exists()
    calibrated(tiny_moe, captured, tmp_path / "parts", "gptq", "w3a16_g32")
    assert sorted(layers_done) == [0, 0, 1, 1], "no layer is done twice"
    assert contents(tmp_path / "parts") == contents(tmp_path / "whole")


def test_a_stopped_run_goes_on_where_it_was_unless_something_changed(
    tiny_moe: Path, captured: Path, tmp_path: Path, layers_done: list[int]
) -> None:
    for scheme, damping, expected in (("w3a16_g32", 0.01, [0, 1]), ("w2a16_g32", 0.02, [0, 0, 1])):
        layers_done[:] = [-2]  # stop at layer 1
        with pytest.raises(KeyboardInterrupt):
            calibrated(tiny_moe, captured, tmp_path / "stopped", "gptq", scheme)
        assert not (tmp_path / "stopped" / f"{parse_scheme(scheme)}.parquet").exists()
        calibrated(tiny_moe, captured, tmp_path / "stopped", "gptq", scheme, damping=damping)
        assert layers_done == expected
        calibrated(tiny_moe, captured, tmp_path / "whole", "gptq", scheme, damping=damping)
    assert contents(tmp_path / "stopped") == contents(tmp_path / "whole")


def part_of(captured: Path, out: Path, rows: slice, **changed: object) -> Path:
    """The capture of some of the tokens, with other facts."""
    out.mkdir()
    for layer in range(2):
        tensors = {name: whole[rows].clone() for name, whole in load_file(layer_file(captured, layer)).items()}
        facts = facts_of(layer_file(captured, layer), CaptureFacts, "") | {"sequences": len(tensors["ids"]) // 64}
        save_file(tensors, layer_file(out, layer), metadata={"mxmoe": canonical_json(facts | changed)})
    return out


def test_domains_are_quantized_together_and_measured_apart(tiny_moe: Path, captured: Path, tmp_path: Path) -> None:
    first = part_of(captured, tmp_path / "a", slice(3 * 64), text="a")
    second = part_of(captured, tmp_path / "b", slice(3 * 64, None), text="b")
    options = {"quantizer": "gptq", "scheme": "w3a16_g32", "damping": 0.01, **RUNTIME}
    tables = {}
    for name, folders in (("whole", [captured]), ("parts", [first, second])):
        out = tmp_path / name
        calibrate.calibrate(
            calibrate.CalibrateOptions(model=str(tiny_moe), capture=list(map(str, folders)), out=str(out), **options)
        )
        rows, facts = read_table(LOSSES, out / "w3a16_g32_asym.parquet")
        tables[name] = rows.to_pandas(), facts["domains"]
    whole, parts = (load_file(tmp_path / name / "w3a16_g32_asym.safetensors") for name in tables)
    assert sum(int((whole[key] != parts[key]).sum()) for key in whole) < 1e-3 * sum(map(torch.numel, whole.values()))
    assert tables["whole"][1] == {"words": 512}
    assert tables["parts"][1] == {"a": 192, "b": 320}
    for loss in ("out_sq", "fisher"):
        rows = tables["parts"][0]
        assert rows[loss].to_numpy() == pytest.approx((rows[f"{loss}.a"] + rows[f"{loss}.b"]).to_numpy(), rel=1e-12)
        assert rows[loss].sum() == pytest.approx(tables["whole"][0][loss].sum(), rel=0.02)
        assert (tables["whole"][0][f"{loss}.words"] == tables["whole"][0][loss]).all()
        assert rows[f"{loss}.a"].sum() > 0


def test_domains_that_do_not_belong_together(tiny_moe: Path, captured: Path, tmp_path: Path) -> None:
    same = part_of(captured, tmp_path / "same", slice(64))
    bare = part_of(captured, tmp_path / "bare", slice(64), text="bare")
    for layer in range(2):
        tensors = load_file(layer_file(bare, layer))
        facts = facts_of(layer_file(bare, layer), CaptureFacts, "")
        del tensors["gradient"]
        save_file(tensors, layer_file(bare, layer), metadata={"mxmoe": canonical_json(facts)})
    for other, said in ((same, r"are captures of the same text, words"), (bare, r"bare: holds no gradients")):
        options = {"quantizer": "rtn", "scheme": "w3a16_g32", "out": str(tmp_path / "out"), **RUNTIME}
        with pytest.raises(UserError, match=said):
            calibrate.calibrate(
                calibrate.CalibrateOptions(model=str(tiny_moe), capture=[str(captured), str(other)], **options)
            )


def test_missing_capture_is_one_clear_error(tiny_moe: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"layer-000.safetensors: no such captured layer"):
        run(tiny_moe, tmp_path, tmp_path / "out", "rtn", "w4a16")
    assert not (tmp_path / "out").exists()


def test_nan_weights_name_layer_expert_and_block(tiny_moe: Path, captured: Path, tmp_path: Path) -> None:
    import shutil

    broken = tmp_path / "broken"
    shutil.copytree(tiny_moe, broken)
    tensors = load_file(broken / "model.safetensors")
    tensors["model.layers.1.mlp.experts.2.up_proj.weight"][3, 5] = float("nan")
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match="layer 1, expert 2, up"):
        run(broken, captured, tmp_path / "out", "rtn", "w4a16")


def test_a_full_gpu_says_what_helps(
    tiny_moe: Path, captured: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(calibrate, "calibrate_layer", full)
    with pytest.raises(UserError, match=r"layer 0 does not fit in the GPU's memory: lower calibrate\.sequences"):
        run(tiny_moe, captured, tmp_path, "rtn", "w4a16")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("how", ["cut", "flipped"])
def test_damaged_layers_of_an_earlier_run_are_made_again(
    tiny_moe: Path, captured: Path, tmp_path: Path, how: str
) -> None:
    calibrated(tiny_moe, captured, tmp_path / "whole", "rtn", "w4a16_g32")
    calibrated(tiny_moe, captured, tmp_path / "out", "rtn", "w4a16_g32", layers=[0, 2])
    (file,) = (tmp_path / "out").glob(".w4a16_g32_asym.layers/layer-001.safetensors")
    data = bytearray(file.read_bytes())
    data[-9] ^= 0x10
    file.write_bytes(data[: len(data) // 2] if how == "cut" else data)
    calibrated(tiny_moe, captured, tmp_path / "out", "rtn", "w4a16_g32")
    for name in ("w4a16_g32_asym.parquet", "w4a16_g32_asym.safetensors"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
