"""The configuration: what it accepts, what it says when it does not, and what it spells out."""

import copy
import functools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from mxmoe_steps.config import reference
from mxmoe_steps.config.loading import load_config
from mxmoe_steps.config.points import points
from mxmoe_steps.errors import UserError
from mxmoe_steps.schemes import parse_scheme
from mxmoe_steps.values import exact, typed

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


def test_the_papers_example_is_valid(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    config = load_config(yaml.safe_load((ROOT / "config" / "w4a4.yaml").read_text(encoding="utf-8")), "w4a4")
    assert config.profile.hardware == "rtx4090"
    assert {point.budget_bits for point in points(config)} == {5.0}


def test_the_demo_is_valid_and_names_its_points(values: dict[str, Any]) -> None:
    found = points(load_config(values, "demo"))
    names = [point.name for point in found]
    assert len(set(names)) == len(names)
    assert "b2.25_t64_block_gptq_r0.75" in names
    ours = [point for point in found if point.granularity != "uniform"]
    baselines = [point for point in found if point.granularity == "uniform"]
    assert {(p.budget_bits, p.granularity) for p in ours} == {
        *((budget, kind) for budget in (2.25, 3.25, 5.0) for kind in ("block", "expert")),
        (5.0, "layer"),
    }
    assert {(p.budget_bits, p.quantizer, p.goal, p.value) for p in baselines} == {
        (budget, quantizer, "r", 1.0) for budget in (2.25, 3.25, 5.0) for quantizer in ("rtn", "gptq")
    }


def test_ceilings_replace_r(values: dict[str, Any]) -> None:
    grids = [
        {"budget_bits": 3, "tokens": 64, "max_time_us": [80.0, 120.5]},
        {"budget_bits": 3, "tokens": 64, "max_loss": 0.25},
    ]
    names = [point.name for point in points(load_config(values | {"sweep": grids}, "ceilings"))]
    ours = [name for name in names if "uniform" not in name]
    assert ours == ["b3_t64_block_gptq_loss0.25", "b3_t64_block_gptq_us120.5", "b3_t64_block_gptq_us80"]


@pytest.mark.parametrize(
    ("path", "value", "says"),
    [
        ("solve.domains", "best", r"solve.domains: .*'sum', 'relative' or 'worst'; found 'best'"),
        ("solve.domain_weights", ["code=0"], r"solve.domain_weights: .*'0' is not a positive number; write e.g."),
        ("solve.domain_weights", ["cod=2"], r"solve.domain_weights: 'cod' is not a calibrated domain; did you mean"),
        ("solve.no_worse_than_uniform", ["mixed"], r"'mixed' is not a calibrated domain; known: code, english"),
        ("solve", {"traffic": "mixed", "scope": "layer", "domains": "worst"}, r"use them with scope: model"),
        ("solve.metrik", "fisher", r"solve: unknown key 'metrik'; did you mean 'metric'\?"),
        ("modell", {}, r"unknown key 'modell'; did you mean 'model'\?"),
        ("calibrate.sequences", "32", r"calibrate.sequences: .*integer; found '32'"),
        ("calibrate.damping", "1e-3", r"calibrate.damping: .*1\.0e-3 rather than 1e-3"),
        ("calibrate.schemes", ["w2a16", "w5a16"], r"calibrate.schemes.1: scheme 'w5a16': no such pair of widths"),
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
        ("sweep.0.budget_bits", [0.0], r"sweep.0.budget_bits.0: .*greater than 0; found 0.0"),
        ("sweep.0.r", 1.5, r"sweep.0.r.0: .*less than or equal to 1; found 1.5"),
        ("sweep.0.tokens", [], r"tokens is empty"),
        ("sweep.0", {"budget_bits": 3, "tokens": 1, "r": 1.0, "max_loss": 0.1}, r"max_loss and r exclude each other"),
        (
            "sweep.0",
            {"budget_bits": 3, "tokens": 1, "max_time_us": -5.0},
            r"max_time_us.0: .*greater than 0; found -5.0",
        ),
        ("extrapolate.shape", "qwen", r"extrapolate.shape: no shape 'qwen'; known are qwen1.5-moe, "),
        ("extrapolate.budget_bits", [1.0], r"extrapolate: budget_bits 1 is below 1.25, what the smallest candidate"),
        ("runtime.device", "gpu", r"runtime.device.*found 'gpu'"),
        ("model.path", "no/such/folder", r"model folder no/such/folder does not exist"),
        ("model.path", "~/no/such/folder", r"model folder /.*/no/such/folder does not exist"),
        ("model.path", "resources/{demo}", r"model.path: .*cannot hold '\{'"),
        ("model.path", "", r"model.path: .*at least 1 character"),
        ("model.name", "profile", r"model.name: 'profile' is taken in results/"),
        ("model.name", "Report.html", r"model.name: 'Report.html' is taken"),
        ("model.name", "logs", r"model.name: 'logs' is taken"),
        ("model.name", "m" * 300, r"model.name: .*at most 100 characters"),
        ("texts.-x", {"package": "wiki-en"}, r"texts: '-x' is no name for a text"),
        ("texts.a/b", {"package": "wiki-en"}, r"texts: 'a/b' is no name for a text"),
        ("texts.a{b}", {"package": "wiki-en"}, r"texts: 'a\{b\}' is no name for a text"),
        ("texts.english", {"files": ["a{b}.txt"]}, r"texts: .*a path cannot hold '\{'"),
        ("texts.english", {"files": "a.txt"}, r"texts.english.files: must be a list of strings"),
        ("trace.texts", ["english", "mixed", "english"], r"trace.texts: 'english' is listed twice"),
        ("evaluate.texts", ["code", "code"], r"evaluate.texts: 'code' is listed twice"),
        ("trace.sequences", 10**12, r"trace.sequences: .*less than or equal to 1048576"),
        ("calibrate.length", 10**12, r"calibrate.length: .*less than or equal to 1048576"),
        ("calibrate.damping", float("inf"), r"calibrate.damping: .*finite number"),
        ("calibrate.damping", float("nan"), r"calibrate.damping: .*finite number"),
        ("calibrate.damping", 1e300, r"calibrate.damping: .*less than or equal to 1"),
        (
            "calibrate.schemes",
            ["w2a16", f"w4a16_g{10**20}"],
            r"calibrate.schemes.1: scheme 'w4a16_g1000.*not of the form",
        ),
        ("calibrate.schemes", ["w2a16", "w4a16_g999936"], r"a multiple of 32 up to 65536"),
        (
            "calibrate.schemes",
            ["w2a16", "w4a4"],
            r"calibrate.schemes: scheme w4a4.*: H100, H200 .* no int4 .*solve.time_as: \[w4a4",
        ),
        ("calibrate.schemes", ["w2a16", "w4a16_g32"], r"scheme w4a16_g32_asym: no GPU kernel"),
        ("profile.hardware", "a100", r"scheme w4a8_g128_sym_fp8: a100 has no fp8 tensor cores; take it out"),
        ("sweep.0.tokens", [10**15], r"sweep.0.tokens.0: .*less than or equal to 1048576; found 1000000000000000"),
        ("sweep.0", {"budget_bits": 3, "tokens": 1, "max_time_us": float("nan")}, r"max_time_us.*finite number"),
        ("sweep.0.budget_bits", [float("inf")], r"budget_bits.*finite number"),
        ("sweep.0.r", float("nan"), r"sweep.0.r.*finite number"),
        ("runtime.seed", 2**70, r"runtime.seed: .*less than or equal to 9223372036854775807"),
        ("runtime.threads", 100_000, r"runtime.threads: .*less than or equal to 1024"),
        ("solve.time_as", ["w4a4"], r"solve.time_as: --time-as 'w4a4': expected LEFT=RIGHT"),
        ("solve.time_as", ["w4a4=w5a5"], r"solve.time_as: scheme 'w5a5'"),
        ("solve.time_as", ["w4a8_fp8=w4a4"], r"scheme w4a4_g128_sym: H100, H200 \(sm_90a\) have no int4 tensor cores"),
        ("solve.fix", ["shared"], r"solve.fix: --fix 'shared': expected LEFT=RIGHT"),
        ("solve.fix", ["shered=w4a16"], r"solve.fix: selector 'shered': cannot read 'shered'; write all \| layer:0-3"),
        ("solve.fix", ["shared=w4a8"], r"solve.fix: shared=w4a8_g128_sym: .* is not in calibrate.schemes"),
        ("solve.fix", ["layer:2=w4a16"], r"solve.fix: selector 'layer:2' names no block of this model"),
        ("solve.fix", ["layer:0-=w4a16"], r"solve.fix: selector 'layer:0-': cannot read '0-'"),
        ("solve.fix", [f"layer:0-{'9' * 5000}=w4a16"], r"solve.fix: selector .*cannot read"),
        ("solve.min_bits", ["block:down=-3"], r"solve.min_bits: .*bits lie above 0 and at most at 16"),
        ("solve.min_bits", ["block:down=nan"], r"solve.min_bits: .*bits lie above 0"),
        ("solve.min_bits", ["block:down=three"], r"solve.min_bits: .*'three' is not a number of bits"),
        ("solve.min_bits", ["expert:4=3"], r"solve.min_bits: selector 'expert:4' names no block"),
    ],
)
def test_mistakes_name_the_key_and_the_fix(values: dict[str, Any], path: str, value: Any, says: str) -> None:
    with pytest.raises(UserError, match=says):
        load_config(edited(values, path, value), "my.yaml")


ODD: list[Any] = [
    None, "", [], {}, float("nan"), float("inf"), -1, 0, 10**30, "x", True, 1.5, "{", [[]], [None], {"a": 1}, [{}],
    b"x", "\0", "a\nb", "-x", "x" * 5000, {1: 2}, {None: 1}, "1e400", 3,
]  # fmt: skip


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Every path into nested dictionaries and lists."""
    keys = value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    for key in keys:
        yield (*path, key)
        yield from places(value[key], (*path, key))


def test_odd_values_anywhere_are_refused_in_words(values: dict[str, Any]) -> None:
    values["solve"] |= {"fix": ["shared=w8a8_fp8"], "min_bits": ["block:down=3"], "time_as": ["w4a4=w4a8_fp8"]}
    values["texts"]["mine"] = {"files": ["README.md"], "test_files": ["CONTRIBUTING.md"], "separator": "%"}
    values["texts"]["theirs"] = {"hub": "wikitext", "split": "train"}
    refused = 0
    for path in places(values):
        for odd in ODD:
            changed = copy.deepcopy(values)
            at = functools.reduce(lambda inner, key: inner[key], path[:-1], changed)
            at[path[-1]] = odd
            try:
                points(load_config(changed, "my.yaml"))
            except UserError:
                refused += 1
    assert refused > 2000


def test_what_exists_is_accepted(values: dict[str, Any], tiny_moe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WHERE", str(tiny_moe.parent))
    monkeypatch.setenv("HOME", str(tiny_moe.parent))
    for path in (f"$WHERE/{tiny_moe.name}", f"${{HOME}}/{tiny_moe.name}", f"~/{tiny_moe.name}"):
        assert load_config(edited(values, "model.path", path), "my.yaml").model.path == str(tiny_moe)
    for path in ("org/name", "org/name@v1.0", "org/name@refs/pr/3"):
        assert load_config(edited(values, "model.path", path), "my.yaml").model.path == path
    solve = values["solve"] | {
        "fix": ["shared=w8a8_fp8", "layer:0-1000000000/block:down=w4a16", "all=w16a16"],
        "min_bits": ["routed/layer:1,0=3", "expert:0-2/block:gate,up=2.25"],
        "time_as": ["w4a4=w4a8_fp8"],
    }
    schemes = [*values["calibrate"]["schemes"], "w4a4"]
    load_config(edited(values | {"solve": solve}, "calibrate.schemes", schemes), "my.yaml")


def test_points_that_differ_have_names_that_differ(values: dict[str, Any]) -> None:
    near = [0.75, 0.7500001, 1 / 3, 0.333333, 0.3333333]
    grids = [{"budget_bits": [3.0, 3.0000001], "tokens": 64, "r": near}]
    found = points(load_config(values | {"sweep": grids, "baselines": []}, "my.yaml"))
    assert len({point.name for point in found}) == len(found) == 10
    assert {float(point.name.split("_")[0][1:]) for point in found} == {3.0, 3.0000001}
    assert {float(point.name.split("_r")[1]) for point in found} == set(near)
    assert [exact(value) for value in (3.0, 2.25, 0.1, 120.5, 1e-05)] == ["3", "2.25", "0.1", "120.5", "1e-05"]


def test_tuned_points_share_the_allocation_of_others(values: dict[str, Any]) -> None:
    grids = [{"budget_bits": 3, "tokens": 64, "tuned": [True, False]}, {"budget_bits": 4, "tokens": 64, "tuned": True}]
    found = points(load_config(values | {"sweep": grids, "baselines": []}, "my.yaml"))
    names = ["b3_t64_block_gptq_r0.75", "b3_t64_block_gptq_r0.75_tuned", "b4_t64_block_gptq_r0.75_tuned"]
    assert [point.name for point in found] == names
    assert [point.allocation for point in found] == [names[0], names[0], "b4_t64_block_gptq_r0.75"]


def test_values_of_the_command_line_are_numbers() -> None:
    given = {"runtime": {"threads": "2", "device": "cpu"}, "calibrate": {"damping": "1e-3", "schemes": ["w4a16"]}}
    given |= {"solve": {"keep_original": "true", "max_schemes": "null"}, "sweep": [{"r": ["0.5", 1]}]}
    assert typed(given) == {
        "runtime": {"threads": 2, "device": "cpu"},
        "calibrate": {"damping": 1e-3, "schemes": ["w4a16"]},
        "solve": {"keep_original": True, "max_schemes": None},
        "sweep": [{"r": [0.5, 1]}],
    }


def test_an_unsupported_family_lists_the_supported_ones(values: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama"}', encoding="utf-8")
    with pytest.raises(UserError, match="model_type 'llama' is not supported; supported are afmoe, aria, "):
        load_config(edited(values, "model.path", str(tmp_path)), "my.yaml")


def test_several_mistakes_are_reported_together(values: dict[str, Any]) -> None:
    broken = edited(edited(values, "runtime.threads", 0), "trace.length", "long")
    with pytest.raises(UserError) as error:
        load_config(broken, "my.yaml")
    assert "runtime.threads" in str(error.value)
    assert "trace.length" in str(error.value)


def test_the_reference_page_is_current() -> None:
    page = (ROOT / "config" / "README.md").read_text(encoding="utf-8")
    assert page == reference.reference(), "run: python -m mxmoe_steps.config.reference config"


def test_the_schema_is_current_and_editors_find_it(values: dict[str, Any]) -> None:
    shipped = json.loads((ROOT / "config" / "schema.json").read_text(encoding="utf-8"))
    assert shipped == reference.schema(), "run: python -m mxmoe_steps.config.reference config"
    first = (ROOT / "config" / "config.yaml").read_text(encoding="utf-8").split("\n")[0]
    assert first == "# yaml-language-server: $schema=schema.json"
    validator = jsonschema.Draft202012Validator(shipped)
    assert not list(validator.iter_errors(values))
    for path, value in (("calibrate.sequences", "32"), ("sweep.0.budget_bits", 0), ("solve", {}), ("modell", {})):
        assert list(validator.iter_errors(edited(values, path, value))), path


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
        ("w6a16", "w6a16_g128_asym", 6.25),
        ("w4a16_mxfp4", "w4a16_g32_sym_mxfp4", 4.25),
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
        ("w4a16_g64_mxfp4", "the only one with mxfp4 is w4a16_mxfp4"),
        ("w4a16_asym_mxfp4", "the only one with mxfp4 is w4a16_mxfp4"),
        ("w3a16_mxfp4", "the only one with mxfp4 is w4a16_mxfp4"),
        ("w16a16_mxfp4", "write w16a16"),
        ("w4a16_mxfp6", "is not of the form"),
        ("published", "scheme 'published' is another one for every model: name it in calibrate.schemes"),
        ("w4a16_asym_published", "published weights are symmetric"),
        ("w8a8_fp8_published", "published weights are symmetric, with 16-bit activations"),
        ("w4a16_fp8_published", "w8a16 of square blocks if they are fp8"),
        ("w8a16_g-1_fp8_published", "w8a16 of square blocks if they are fp8"),
        ("w8a16_fp8", "fp8 is an 8-bit activation format"),
        ("w16a16_published", "16-bit weights take no group"),
        ("w4a16_published_fp8", "is not of the form"),
    ],
)
def test_malformed_schemes_are_explained(text: str, says: str) -> None:
    with pytest.raises(UserError, match=says):
        parse_scheme(text)
