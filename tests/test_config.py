"""The configuration: what it accepts, what it says when it does not, and what it spells out."""

import copy
from pathlib import Path
from typing import Any

import pytest
import yaml

from mxmoe_steps import config
from mxmoe_steps.errors import UserError
from mxmoe_steps.schemes import parse_scheme

ROOT = Path(__file__).parents[1]


@pytest.fixture
def values(tiny_moe: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.chdir(ROOT)
    loaded = yaml.safe_load((ROOT / "config" / "config.yaml").read_text(encoding="utf-8"))
    loaded["model"]["path"] = str(tiny_moe)
    return loaded


def edited(values: dict[str, Any], path: str, value: Any) -> dict[str, Any]:
    result = copy.deepcopy(values)
    *parents, last = path.split(".")
    at: Any = result
    for key in parents:
        at = at[int(key)] if isinstance(at, list) else at[key]
    at[int(last) if isinstance(at, list) else last] = value
    return result


def test_the_demo_is_valid_and_names_its_points(values: dict[str, Any]) -> None:
    found = config.points(config.load_config(values, "demo"))
    names = [point.name for point in found]
    assert len(set(names)) == len(names)
    assert "b2.25_t64_block_gptq_r0.75" in names
    ours = [point for point in found if point.granularity != "uniform"]
    baselines = [point for point in found if point.granularity == "uniform"]
    assert {(p.budget_bits, p.granularity) for p in ours} == {
        (budget, kind) for budget in (2.25, 3.25, 5.0) for kind in ("block", "expert", "layer")
    }
    assert {(p.budget_bits, p.quantizer, p.goal, p.value) for p in baselines} == {
        (budget, quantizer, "r", 1.0) for budget in (2.25, 3.25, 5.0) for quantizer in ("rtn", "gptq")
    }


def test_ceilings_replace_r(values: dict[str, Any]) -> None:
    grids = [
        {"budget_bits": 3, "tokens": 64, "max_time_us": [80.0, 120.5]},
        {"budget_bits": 3, "tokens": 64, "max_loss": 0.25},
    ]
    names = [point.name for point in config.points(config.load_config(values | {"sweep": grids}, "ceilings"))]
    ours = [name for name in names if "uniform" not in name]
    assert ours == ["b3_t64_block_gptq_loss0.25", "b3_t64_block_gptq_us120.5", "b3_t64_block_gptq_us80"]


@pytest.mark.parametrize(
    ("path", "value", "says"),
    [
        ("solve.metrik", "fisher", r"solve: unknown key 'metrik'; did you mean 'metric'\?"),
        ("modell", {}, r"unknown key 'modell'; did you mean 'model'\?"),
        ("calibrate.sequences", "32", r"calibrate.sequences: .*integer; found '32'"),
        ("calibrate.damping", "1e-3", r"calibrate.damping: .*1\.0e-3 rather than 1e-3"),
        ("calibrate.schemes", ["w2a16", "w5a16"], r"calibrate.schemes: scheme 'w5a16': no such pair of widths"),
        ("calibrate.schemes", ["w2a16", "w2a16_g128_asym"], r"two entries are the same scheme"),
        ("calibrate.schemes", ["w3a16", "w4a16"], r"budget_bits 2.25 is below 3.25.*w3a16_g128_asym"),
        ("calibrate.text", "mixd", r"calibrate.text: 'mixd' is not a text source; did you mean 'mixed'\?"),
        ("texts.mixed", {"mix": ["english", "klingon"]}, r"texts.mixed.mix: 'klingon' is not a text source"),
        ("texts.english", {"packge": "wiki-en"}, r"texts.english: needs exactly one of the keys"),
        ("texts.english", {"files": ["missing.txt"]}, r"texts.english.files: no such file missing.txt"),
        ("solve.traffic", "english2", r"solve.traffic: 'english2' is not one of trace.texts"),
        ("calibrate.quantizers", ["gptq"], r"quantizer: 'rtn' is not in calibrate.quantizers"),
        ("calibrate.gradient", False, r"metric fisher needs calibrate.gradient: true"),
        ("sweep.0.granularity", "blok", r"sweep.0.granularity.*found 'blok'"),
        ("sweep.0.budget_bits", [0.0], r"budget_bits must lie in \(0, 16\]"),
        ("sweep.0.r", 1.5, r"r must lie in \[0, 1\]"),
        ("sweep.0.tokens", [], r"tokens is empty"),
        ("sweep.0", {"budget_bits": 3, "tokens": 1, "r": 1.0, "max_loss": 0.1}, r"max_loss and r exclude each other"),
        ("sweep.0", {"budget_bits": 3, "tokens": 1, "max_time_us": -5.0}, r"must be positive"),
        ("runtime.device", "gpu", r"runtime.device.*found 'gpu'"),
        ("model.path", "no/such/folder", r"model folder no/such/folder does not exist"),
    ],
)
def test_mistakes_name_the_key_and_the_fix(values: dict[str, Any], path: str, value: Any, says: str) -> None:
    with pytest.raises(UserError, match=says):
        config.load_config(edited(values, path, value), "my.yaml")


def test_an_unsupported_family_lists_the_supported_ones(values: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama"}', encoding="utf-8")
    with pytest.raises(UserError, match="model_type 'llama' is not supported; supported are deepseek_v2"):
        config.load_config(edited(values, "model.path", str(tmp_path)), "my.yaml")


def test_several_mistakes_are_reported_together(values: dict[str, Any]) -> None:
    broken = edited(edited(values, "runtime.threads", 0), "trace.length", "long")
    with pytest.raises(UserError) as error:
        config.load_config(broken, "my.yaml")
    assert "runtime.threads" in str(error.value)
    assert "trace.length" in str(error.value)


def test_the_reference_page_is_current() -> None:
    page = (ROOT / "config" / "README.md").read_text(encoding="utf-8")
    assert page == config.reference(), "run: python -m mxmoe_steps.config > config/README.md"


@pytest.mark.parametrize(
    ("text", "name", "bits"),
    [
        ("w4a16", "w4a16_g128_asym", 4.25),
        ("w2a16", "w2a16_g128_asym", 2.25),
        ("w1a16", "w1a16_g128_asym", 1.25),
        ("w4a16_g-1_sym", "w4a16_g-1_sym", 4 + 16 / 256),
        ("w8a8", "w8a8_g-1_sym", 8 + 16 / 256),
        ("w8a8_fp8", "w8a8_g-1_sym_fp8", 8 + 16 / 256),
        ("w4a8_fp8", "w4a8_g128_sym_fp8", 4.125),
        ("w16a16", "w16a16", 16),
    ],
)
def test_schemes_have_one_name_and_true_bits(text: str, name: str, bits: float) -> None:
    scheme = parse_scheme(text)
    assert scheme.name == name
    assert parse_scheme(scheme.name) == scheme
    assert scheme.bits(256) == bits


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("w4", "is not of the form"),
        ("w7a16", "no such pair of widths"),
        ("w4a16_fp8", "fp8 is an 8-bit activation format"),
        ("w8a8_asym", "symmetric"),
        ("w4a16_g100", "multiple of 32"),
        ("w16a16_g128", "write w16a16"),
    ],
)
def test_malformed_schemes_are_explained(text: str, says: str) -> None:
    with pytest.raises(UserError, match=says):
        parse_scheme(text)
