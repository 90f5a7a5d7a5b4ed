"""Damaged captured layers and packed weights: calibrate and quantize refuse them, and name the file."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import capture_tokens, make_checkpoint
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mutations import mutated_bytes, refusal
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from synthetic import allocation_of

from mxmoe_steps import calibrate, quantize
from mxmoe_steps.allocation.files import write_allocation
from mxmoe_steps.errors import UserError
from mxmoe_steps.schemes import SHARED

FUZZ = settings(
    max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
SCHEMES = ["w4a16_g32_asym", "w8a8_g-1_sym_fp8"]
Tensors = dict[str, torch.Tensor]


def run_calibrate(folder: Path, capture: Path, out: Path, scheme: str) -> None:
    options = {"quantizer": "rtn", "damping": 0.01, "device": "cpu", "threads": 1}
    paths = {"model": str(folder / "model"), "capture": [str(capture)], "out": str(out)}
    calibrate.calibrate(calibrate.CalibrateOptions(**paths, scheme=scheme, **options))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, its captured layers, packed weights under two schemes, and an allocation of both."""
    folder = tmp_path_factory.mktemp("made")
    make_checkpoint("qwen2_moe", folder / "model")
    tokens = torch.randint(3, 96, (4, 24), generator=torch.Generator().manual_seed(0))
    capture_tokens(folder / "model", tokens, folder / "capture")
    for scheme in SCHEMES:
        run_calibrate(folder, folder / "capture", folder / "packed", scheme)
    rows = [[layer, expert, *SCHEMES, "w16a16"] for layer in range(2) for expert in [SHARED, *range(4)]]
    write_allocation(str(folder / "allocation.json"), allocation_of(rows, "rtn", folder / "model"))
    return folder


def run_quantize(made: Path, packed: Path, out: Path) -> bytes:
    """The weights of the checkpoint."""
    paths = {"model": str(made / "model"), "allocation": str(made / "allocation.json"), "packed": str(packed)}
    quantize.quantize(quantize.QuantizeOptions(**paths, trust_remote_code=False, out=str(out)))
    return (out / "model.safetensors").read_bytes()


def rewrite(file: Path, change: Callable[[Tensors, dict[str, Any]], object]) -> None:
    """Change the tensors and facts of a file, which then has no checksums."""
    with safe_open(file, "pt") as opened:
        facts = json.loads(opened.metadata()["mxmoe"])
    tensors = load_file(file)
    change(tensors, facts)
    save_file(tensors, file, metadata={"mxmoe": json.dumps(facts)})


def put(name: str, index: tuple[int, ...], value: float) -> Callable[[Tensors, dict[str, Any]], object]:
    return lambda tensors, _: tensors[name].__setitem__(index, value)


@pytest.mark.parametrize(
    ("scheme", "change", "said"),
    [
        (0, put("1.2.gate.scales", (3, 1), float("nan")), "1.2.gate.scales holds NaN"),
        (0, put("1.2.gate.scales", (3, 1), -1.0), "1.2.gate.scales holds NaN, infinity or a scale that is not pos"),
        (0, put("1.-1.gate.zeros", (3, 1), float("inf")), "1.-1.gate.zeros holds NaN"),
        (1, put("0.1.up.qweight", (4, 5), 0x7F), "0.1.up.qweight holds NaN"),
        (0, lambda tensors, _: tensors.pop("1.2.gate.scales"), "1.2.gate.scales is missing, expected BF16"),
        (0, lambda tensors, _: tensors.pop("1.2.gate.zeros"), "1.2.gate.zeros is missing"),
        (1, lambda tensors, _: tensors.pop("0.1.up.qweight"), "0.1.up.qweight is missing"),
        (
            0,
            lambda tensors, _: tensors.update({"1.2.gate.scales": tensors["1.2.gate.scales"].half()}),
            r"1.2.gate.scales is F16 \[96, 2\], expected BF16",
        ),
        (
            0,
            lambda tensors, _: tensors.update({"1.2.gate.qweight": tensors["1.2.gate.qweight"][:, :-1].clone()}),
            r"1.2.gate.qweight is U8 \[96, 31\], expected U8 \[96, 32\]",
        ),
        (0, lambda _, facts: facts.update(quantizer="gptq"), "quantizer is gptq, expected rtn"),
        (0, lambda _, facts: facts.update(quantizer="rtn+hadamard"), r"quantizer is rtn\+hadamard, expected rtn"),
        (0, lambda _, facts: facts.update(model="0" * 16), "model is 0000000000000000, expected"),
        (0, lambda _, facts: facts.update(scheme=SCHEMES[1]), "scheme is w8a8_g-1_sym_fp8, expected w4a16_g32_asym"),
        (0, lambda _, facts: facts.pop("model"), "model: Field required"),
    ],
)
def test_damaged_packed_weights(
    made: Path, tmp_path: Path, scheme: int, change: Callable[..., object], said: str
) -> None:
    packed = Path(shutil.copytree(made / "packed", tmp_path / "packed"))
    rewrite(packed / f"{SCHEMES[scheme]}.safetensors", change)
    with pytest.raises(UserError, match=rf"{SCHEMES[scheme]}.safetensors: .*{said}"):
        run_quantize(made, packed, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["packed"]


def test_weights_of_another_model_are_refused(made: Path, tmp_path: Path) -> None:
    make_checkpoint("qwen2_moe", tmp_path / "model")
    tensors = {file: load_file(file) for file in (tmp_path / "model").glob("*.safetensors")}
    for file, found in tensors.items():
        if "model.norm.weight" in found:
            found["model.norm.weight"] *= 1.001
        save_file(found, file, metadata={"format": "pt"})
    paths = {"allocation": str(made / "allocation.json"), "packed": str(made / "packed"), "out": str(tmp_path / "out")}
    with pytest.raises(UserError, match=r"allocation.json: was solved for another model than"):
        quantize.quantize(quantize.QuantizeOptions(model=str(tmp_path / "model"), trust_remote_code=False, **paths))
    with pytest.raises(UserError, match=r"layer-000.safetensors: was captured of another model or layer"):
        run_calibrate(tmp_path, made / "capture", tmp_path / "packed", SCHEMES[0])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]


@given(data=st.data())
@FUZZ
def test_damaged_bytes_of_packed_weights(made: Path, tmp_path: Path, data: st.DataObject) -> None:
    packed, out = tmp_path / "packed", tmp_path / "out"
    shutil.copytree(made / "packed", packed, dirs_exist_ok=True)
    file = packed / f"{data.draw(st.sampled_from(SCHEMES))}.safetensors"
    file.write_bytes(data.draw(mutated_bytes(file.read_bytes())))
    if said := refusal(lambda: run_quantize(made, packed, out)):
        assert f"{file.name}: " in said
        assert not out.exists()
    else:  # of each store only the blocks of the allocation count
        found = (out / "model.safetensors").read_bytes()
        assert found == run_quantize(made, made / "packed", out)
        shutil.rmtree(out)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (put("hidden", (3, 4), float("nan")), "hidden holds"),
        (put("gradient", (3, 4), float("inf")), "gradient holds"),
        (put("weights", (3, 1), float("nan")), "weights holds"),
        (put("ids", (3, 1), 4), "ids holds"),
        (put("ids", (3, 1), -1), "ids holds"),
        (put("shared", (3,), float("nan")), "shared holds"),
        (lambda tensors, _: tensors.pop("ids"), "ids is missing"),
        (lambda tensors, _: tensors.pop("shared"), "shared is missing"),
        (lambda tensors, _: tensors.pop("gradient"), "not of one capture"),
        (
            lambda tensors, _: tensors.update(weights=tensors["weights"][:-1].clone()),
            r"weights is F32 \[95, 2\], expected F32 \[96, 2\]",
        ),
        (lambda tensors, _: tensors.update(hidden=tensors["hidden"][:, :-1].clone()), r"hidden is F32 \[96, 63\]"),
        (lambda tensors, _: tensors.update(more=tensors["hidden"].clone()), "not all of which are of this model"),
        (lambda _, facts: facts.update(model="another"), "another model or layer"),
        (lambda _, facts: facts.update(layer=0), "another model or layer"),
        (lambda _, facts: facts.update(text="another"), "not of one capture"),
        (lambda _, facts: facts.update(length=-1), "length: Input should be greater"),
    ],
)
def test_damaged_captured_layers(made: Path, tmp_path: Path, change: Callable[..., object], said: str) -> None:
    capture = Path(shutil.copytree(made / "capture", tmp_path / "capture"))
    rewrite(capture / "layer-001.safetensors", change)
    with pytest.raises(UserError, match=rf"layer-001.safetensors.*{said}"):
        run_calibrate(made, capture, tmp_path / "packed", SCHEMES[0])
    assert not list(tmp_path.glob("packed/*.safetensors"))


@given(data=st.data())
@FUZZ
def test_damaged_bytes_of_captured_layers(made: Path, tmp_path: Path, data: st.DataObject) -> None:
    shutil.copytree(made / "capture", tmp_path / "capture", dirs_exist_ok=True)
    file = tmp_path / "capture" / "layer-001.safetensors"
    damaged = data.draw(mutated_bytes(file.read_bytes()))
    changed = damaged != file.read_bytes()
    file.write_bytes(damaged)
    shutil.rmtree(tmp_path / "packed", ignore_errors=True)
    if not changed:
        return
    with pytest.raises(UserError, match=r"layer-001.safetensors"):
        run_calibrate(made, tmp_path / "capture", tmp_path / "packed", SCHEMES[0])
