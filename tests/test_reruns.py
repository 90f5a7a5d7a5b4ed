"""What runs again after an edit and what does not, whatever Snakemake remembers and whatever the times of files say."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from workflow import (
    AFTER_CALIBRATE,
    AFTER_CAPTURE,
    DAMPED,
    EVERYTHING,
    POINT,
    RESULTS,
    append,
    changed,
    damp,
    edit,
    forget_times,
    planned,
    snakemake,
)


@pytest.mark.parametrize("remembered", [True, False], ids=["remembered", "forgotten"])
def test_copies_run_nothing(project: Path, remembered: bool) -> None:
    if not remembered:
        shutil.rmtree(project / ".snakemake")
    forget_times(project)
    assert planned(project) == {}


def test_an_edit_is_seen_in_results_that_were_copied(project: Path) -> None:
    shutil.rmtree(project / ".snakemake")
    (project / "other").symlink_to("model")
    for change, jobs in (
        (damp, DAMPED),
        (changed("model", "path", value="other"), EVERYTHING),
    ):
        edit(project, change)
        assert planned(project) == jobs
    edit(project, damp)
    snakemake(project, "results/tiny/profile/h20.parquet")  # Snakemake remembers something again
    assert planned(project) == DAMPED


def test_a_dry_run_of_another_configuration_changes_nothing(project: Path) -> None:
    shutil.rmtree(project / ".snakemake")
    edit(project, damp)
    assert planned(project) != {}
    edit(project)
    assert planned(project) == {}


def test_marking_results_as_current_does_not_make_them_so(project: Path) -> None:
    edit(project, damp)
    snakemake(project, "--touch")
    assert planned(project)["calibrate"] == 3


def test_order_layout_and_bookkeeping_run_nothing(project: Path) -> None:
    def reorder(settings: dict[str, Any]) -> None:
        settings["calibrate"]["schemes"].reverse()
        settings["calibrate"]["quantizers"].reverse()
        settings["runtime"]["layers_per_job"] = 1

    edit(project, reorder)
    package = project / "src" / "mxmoe_steps"
    kernels = ("kernels/sm90/consumer", "kernels/codes/w4a16", "kernels/formats", "kernels/plan")
    for module in ("provenance", "made_from", "job_memory", "inference/gpu", "inference/plugin", *kernels):
        append(package / f"{module}.py", "\nCHANGED = True\n")
    file = package / "timing" / "profiles" / "hardware.json"
    sheets = json.loads(file.read_text(encoding="utf-8"))
    sheets["a100"]["sms"] = 1
    file.write_text(json.dumps(sheets), encoding="utf-8")
    assert planned(project) == {}
    sheets["h20"]["l2_gbs"] = 1
    file.write_text(json.dumps(sheets), encoding="utf-8")
    assert planned(project) == {"profile": 1, **AFTER_CALIBRATE}


def test_another_domain_is_one_more_capture_and_other_weights_are_none(project: Path) -> None:
    """Everything else that calibration makes is of all domains: GPTQ's Hessians are sums over them."""
    words = (project / "words.txt").read_text(encoding="utf-8")
    (project / "more.txt").write_text(words.replace("a", "o"), encoding="utf-8")
    more = {"files": ["more.txt"], "separator": "-----"}
    texts = {"words": {"files": ["words.txt"], "separator": "-----"}, "more": more, "both": {"mix": ["words", "more"]}}
    both = (changed("texts", value=texts), changed("calibrate", "text", value="both"))
    edit(project, *both)
    assert planned(project) == {"capture": 1, **AFTER_CAPTURE}
    one = {"frontier": 1, "solve": 1, "quantize": 1, "evaluate": 1, "report": 1}  # not the uniform baseline
    for key, value in (
        ("domain_weights", ["words=2"]), ("domains", "worst"), ("no_worse_than_uniform", ["words"])
    ):  # fmt: skip
        edit(project, changed("solve", key, value=value))
        assert planned(project) == one, key


def test_code_runs_again_what_runs_it(project: Path) -> None:
    package = project / "src" / "mxmoe_steps"
    for module, jobs in {
        "quantizers/gptq": DAMPED,
        "calibration/__init__": AFTER_CAPTURE,
        "models/quantizer": {"evaluate": 2, "report": 1},
    }.items():
        file = package / f"{module}.py"
        text = file.read_text(encoding="utf-8")
        append(file, "\nCHANGED = True\n")
        assert planned(project) == jobs, module
        file.write_text(text, encoding="utf-8")


def test_another_version_of_a_package_runs_what_uses_it(project: Path) -> None:
    folder = project / "src" / "tokenizers-99.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: tokenizers\nVersion: 99\n", encoding="utf-8")
    assert planned(project) == EVERYTHING


def test_two_models_keep_their_results_apart(project: Path) -> None:
    edit(project, changed("model", "name", value="second"), changed("calibrate", "schemes", value=["w2a16_g32"]))
    snakemake(project, "results/second/profile/h20.parquet")
    edit(project)
    assert planned(project) == {}


def test_an_extrapolation_is_made_where_it_is_asked_for(project: Path) -> None:
    edit(project, changed("extrapolate", value={"shape": "demo-moe", "budget_bits": [4.5], "tokens": [64]}))
    assert planned(project) == {"extrapolate": 1, "report": 1}
    snakemake(project)
    assert planned(project) == {}
    page = (project / "results" / "report.html").read_text(encoding="utf-8")
    assert page.count("<svg") == 10
    assert "On layers of demo-moe, 64 tokens in a step: at 4.5 bits the mixture" in page
    assert (project / RESULTS / "figures" / "extrapolated.svg").is_file()
    edit(project, changed("extrapolate", value={"shape": "mixtral-8x7b"}))
    with pytest.raises(AssertionError, match=r"extrapolate\.shape: mixtral-8x7b has no shared expert"):
        planned(project)


def test_a_tuned_point_goes_from_the_sweep_to_the_report(project: Path) -> None:
    edit(project, changed("sweep", "0", "tuned", value=[False, True]), changed("tune", value={"steps": 2}))
    assert planned(project) == {"tune": 1, "evaluate": 1, "report": 1}
    before = (project / RESULTS / "evaluate" / f"{POINT}.json").read_bytes()
    snakemake(project)
    assert planned(project) == {}
    summary = (project / "results" / "summary.csv").read_text(encoding="utf-8")
    assert f"\n{POINT}_tuned,ours tuned,block,mixed,gptq,4.5," in summary
    assert (project / RESULTS / "evaluate" / f"{POINT}.json").read_bytes() == before
    assert json.loads((project / RESULTS / "evaluate" / f"{POINT}_tuned.json").read_text())["tuned"] is True
    edit(project, changed("sweep", "0", "tuned", value=[False, True]), changed("tune", value={"steps": 3}))
    assert planned(project) == {"tune": 1, "evaluate": 1, "report": 1}
