"""Damaged packed checkpoints: loading ends in an error that names the block and its part, or in the right weights."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import make_checkpoint
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mutations import mutated_bytes, mutated_json, refusal
from packed import pack
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import mxmoe_steps
from mxmoe_steps.errors import UserError
from mxmoe_steps.models.streaming import StreamedModel

FUZZ = settings(
    max_examples=30, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
SCHEMES = ("w4a16", "w8a8_fp8", "w16a16")  # of gate, up and down
EXPERT = "model.layers.1.mlp.experts.2"
TOKENS = torch.arange(3, 15).unsqueeze(0)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("packed")
    make_checkpoint("qwen2_moe", folder / "model")
    return pack(folder / "model", folder, lambda *_: SCHEMES)


@pytest.fixture
def damaged(checkpoint: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(checkpoint, tmp_path / "damaged"))


def whole_model(path: Path) -> Any:
    return mxmoe_steps.load_quantized(str(path))


def by_transformers(path: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(path)


def by_layers(path: Path) -> None:
    model = StreamedModel(path, "float32", "cpu")
    for layer in range(2):
        with model.loaded(model.layer_path(layer)):
            pass


WAYS = [whole_model, by_transformers, by_layers]


def without(name: str) -> Callable[[dict[str, torch.Tensor]], object]:
    return lambda tensors: tensors.pop(name)


def with_value(name: str, index: tuple[int, int], value: float) -> Callable[[dict[str, torch.Tensor]], object]:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[name] = tensors[name].clone()
        tensors[name][index] = value

    return change


def as_made_by(name: str, make: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[dict[str, torch.Tensor]], object]:
    return lambda tensors: tensors.update({name: make(tensors[name])})


@pytest.mark.parametrize("load", WAYS)
@pytest.mark.parametrize(
    ("change", "said"),
    [
        (without(f"{EXPERT}.gate_proj.scales"), "layer 1, expert 2, gate: scales is missing"),
        (without(f"{EXPERT}.gate_proj.zeros"), "layer 1, expert 2, gate: zeros is missing"),
        (without(f"{EXPERT}.up_proj.qweight"), "layer 1, expert 2, up: qweight is missing"),
        (without(f"{EXPERT}.down_proj.weight"), "layer 1, expert 2, down: weight is missing"),
        (
            without("model.layers.0.mlp.shared_expert.up_proj.scales"),
            "layer 0, expert -1, up: scales is missing",
        ),
        (with_value(f"{EXPERT}.gate_proj.scales", (3, 0), float("nan")), "experts.2.gate_proj.scales"),
        (with_value(f"{EXPERT}.gate_proj.scales", (3, 0), 0.0), "experts.2.gate_proj.scales"),
        (with_value(f"{EXPERT}.gate_proj.zeros", (3, 0), float("inf")), "experts.2.gate_proj.zeros"),
        (with_value(f"{EXPERT}.up_proj.qweight", (5, 7), 0xFF), "experts.2.up_proj.qweight"),
        (with_value(f"{EXPERT}.down_proj.weight", (5, 7), float("inf")), "experts.2.down_proj.weight"),
        (with_value("model.layers.1.mlp.gate.weight", (1, 1), float("nan")), "mlp.gate.weight"),
        (
            as_made_by(f"{EXPERT}.gate_proj.qweight", lambda old: old[:-1].clone()),
            r"layer 1, expert 2, gate: qweight is U8 \[95, 32\] in model.safetensors, expected U8 \[96, 32\]",
        ),
        (
            as_made_by(f"{EXPERT}.gate_proj.scales", torch.Tensor.float),
            r"layer 1, expert 2, gate: scales is F32 \[96, 1\] in model.safetensors, expected BF16 \[96, 1\]",
        ),
        (
            as_made_by(f"{EXPERT}.down_proj.weight", lambda old: old.to(torch.uint8)),
            "layer 1, expert 2, down: weight is U8",
        ),
        (
            lambda tensors: tensors.update({f"{EXPERT}.up_proj.zeros": torch.zeros(96, 1)}),
            f"{EXPERT}.up_proj.zeros belongs to no block",
        ),
    ],
)
def test_damaged_tensors(damaged: Path, load: Callable[[Path], Any], change: Callable[..., object], said: str) -> None:
    tensors = load_file(damaged / "model.safetensors")
    change(tensors)
    save_file(tensors, damaged / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=said):
        load(damaged)


@pytest.mark.parametrize("load", WAYS)
@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda blocks: blocks["1"]["2"].__setitem__(0, -1), r"blocks.1.2\[0\]: Input should be greater than or equal"),
        (lambda blocks: blocks["1"]["2"].__setitem__(0, 3), "blocks.1.2: 3 is not the number of one of 3 schemes"),
        (lambda blocks: blocks["1"]["2"].pop(), r"blocks.1.2\[2\]: Field required"),
        (lambda blocks: blocks["1"].pop("2"), "lacks layer 1, expert 2, which the model has"),
        (lambda blocks: blocks["1"].pop("-1"), "lacks layer 1, expert -1, which the model has"),
        (lambda blocks: blocks.pop("1"), "lacks layer 1, expert"),
        (lambda blocks: blocks["1"].update({"4": [0, 0, 0]}), "names layer 1, expert 4, which the model does not"),
        (lambda blocks: blocks.update({"2": blocks["1"]}), "names layer 2, which the model does not have"),
        (lambda blocks: blocks["1"].update({"02": [0, 0, 0]}), "blocks.1.02"),
    ],
)
def test_damaged_numbers_of_schemes(
    damaged: Path, load: Callable[[Path], Any], change: Callable[..., object], said: str
) -> None:
    config = json.loads((damaged / "config.json").read_text())
    change(config["quantization_config"]["blocks"])
    (damaged / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=said):
        load(damaged)


def test_a_checkpoint_without_its_quantization_is_refused(damaged: Path) -> None:
    config = json.loads((damaged / "config.json").read_text())
    del config["quantization_config"]
    (damaged / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"config.json: no quantization_config; give a folder that the quantize step"):
        whole_model(damaged)


@pytest.mark.parametrize("load", WAYS)
def test_a_tensor_beside_the_experts_is_missed(damaged: Path, load: Callable[[Path], Any]) -> None:
    tensors = load_file(damaged / "model.safetensors")
    del tensors["model.layers.1.mlp.gate.weight"]
    save_file(tensors, damaged / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"model\.layers\.1\.mlp\.gate\.weight"):
        load(damaged)


def logits(path: Path) -> torch.Tensor | None:
    """What a checkpoint computes; None if it is refused."""
    try:
        with torch.no_grad():
            return torch.as_tensor(whole_model(path)(TOKENS).logits)
    except UserError:
        return None


@given(data=st.data())
@FUZZ
def test_a_damaged_quantization(checkpoint: Path, tmp_path: Path, data: st.DataObject) -> None:
    folder = Path(shutil.copytree(checkpoint, tmp_path / "damaged", dirs_exist_ok=True))
    config = json.loads((folder / "config.json").read_text())
    text = data.draw(mutated_json(config["quantization_config"]))
    marked = json.dumps(config | {"quantization_config": "HERE"})
    (folder / "config.json").write_text(marked.replace('"HERE"', text))
    found = logits(folder)
    assert found is None or torch.equal(found, whole_model(checkpoint)(TOKENS).logits)


@given(data=st.data())
@FUZZ
def test_a_damaged_configuration(checkpoint: Path, tmp_path: Path, data: st.DataObject) -> None:
    """What transformers takes may mean another model, and anything else is an error that names the file."""
    folder = Path(shutil.copytree(checkpoint, tmp_path / "damaged", dirs_exist_ok=True))
    (folder / "config.json").write_text(data.draw(mutated_json(json.loads((checkpoint / "config.json").read_text()))))
    for load in (whole_model, by_layers):
        said = refusal(lambda load=load: load(folder))
        assert not said or str(folder) in said


@given(data=st.data())
@FUZZ
def test_a_damaged_header(checkpoint: Path, tmp_path: Path, data: st.DataObject) -> None:
    folder = Path(shutil.copytree(checkpoint, tmp_path / "damaged", dirs_exist_ok=True))
    whole = (folder / "model.safetensors").read_bytes()
    length = 8 + int.from_bytes(whole[:8], "little")
    (folder / "model.safetensors").write_bytes(data.draw(mutated_bytes(whole[:length])) + whole[length:])
    found = logits(folder)
    assert found is None or torch.equal(found, whole_model(checkpoint)(TOKENS).logits)
