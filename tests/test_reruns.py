"""What runs again and what does not, whatever Snakemake remembers and whatever the times of files say."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors import safe_open
from workflow import SETTINGS, changed, environment, make_project, planned, snakemake, write_settings

RESULTS = Path("results/tiny")
POINT = "b4.5_t64_block_gptq_r0.75"
AFTER_SOLVE = {"solve": 2, "quantize": 2, "evaluate": 2, "report": 1}
AFTER_CALIBRATE = {"frontier": 2, **AFTER_SOLVE}
AFTER_CAPTURE = {"calibrate": 6, **AFTER_CALIBRATE}
EVERYTHING = {"trace": 1, "capture": 1, "evaluate_original": 1, **AFTER_CAPTURE}


@pytest.fixture(scope="module")
def finished(tiny_moe: Path, text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project that ran to the end."""
    folder = make_project(tmp_path_factory.mktemp("reruns") / "project", tiny_moe, text_file)
    snakemake(folder)
    return folder


@pytest.fixture
def project(finished: Path, tmp_path: Path) -> Path:
    """A copy of it, with times and with what Snakemake remembers."""
    return Path(shutil.copytree(finished, tmp_path / "project"))


def edit(project: Path, *changes: Callable[[dict[str, Any]], None]) -> None:
    settings = yaml.safe_load(yaml.safe_dump(SETTINGS))
    for change in changes:
        change(settings)
    write_settings(project, settings)


def append(file: Path, text: str) -> None:
    file.write_text(file.read_text(encoding="utf-8") + text, encoding="utf-8")


def change_weights(model: Path) -> None:
    """Another weight in the same layout, in a file of the same size and time."""
    file = next(model.glob("*.safetensors"))
    times = file.stat().st_mtime_ns
    data = bytearray(file.read_bytes())
    data[-2] ^= 0x3F
    file.write_bytes(data)
    os.utime(file, ns=(times, times))


def forget_times(folder: Path) -> None:
    """As ``cp -r`` and ``git clone`` leave them: all new, in no order of the work."""
    for number, file in enumerate(sorted(folder.rglob("*"), reverse=True)):
        os.utime(file, ns=(2 * 10**18 + number, 2 * 10**18 + number))


@pytest.mark.parametrize("remembered", [True, False], ids=["remembered", "forgotten"])
def test_copies_run_nothing(project: Path, remembered: bool) -> None:
    if not remembered:
        shutil.rmtree(project / ".snakemake")
    forget_times(project)
    assert planned(project) == {}


def damp(settings: dict[str, Any]) -> None:
    settings["calibrate"]["damping"] = 0.02


DAMPED = {"calibrate": 3, "frontier": 1, "solve": 1, "quantize": 1, "evaluate": 1, "report": 1}


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
    snakemake(project, "results/tiny/profile/h200.parquet")  # Snakemake remembers something again
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


def replace_in_place(project: Path) -> None:
    change_weights(project / "model")


def replace_link(project: Path) -> None:
    """The configured folder becomes a link to an older one."""
    shutil.copytree(project / "model", project / "new")
    change_weights(project / "new")
    for file in (project / "new").iterdir():
        os.utime(file, (1, 1))
    shutil.rmtree(project / "model")
    (project / "model").symlink_to("new")


@pytest.mark.parametrize(("replace", "remembered"), [(replace_in_place, True), (replace_link, False)])
def test_another_model_in_the_same_place_runs_everything(
    project: Path, replace: Callable[[Path], None], remembered: bool
) -> None:
    if not remembered:
        shutil.rmtree(project / ".snakemake")
    replace(project)
    assert planned(project) == EVERYTHING


def test_another_text_in_the_same_place_runs_everything(project: Path) -> None:
    file = project / "words.txt"
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    os.utime(file, (1, 1))
    assert planned(project) == EVERYTHING


def test_times_and_files_that_nothing_reads_run_nothing(project: Path) -> None:
    forget_times(project / "model")
    os.utime(project / "words.txt")
    (project / "model" / "README.md").write_text("A model card.", encoding="utf-8")
    (project / "model" / "training.json").write_text("{}", encoding="utf-8")
    assert planned(project) == {}


def test_what_is_copied_into_checkpoints_makes_them_again(project: Path) -> None:
    file = project / "model" / "generation_config.json"
    file.write_text('{"do_sample": true}', encoding="utf-8")
    assert planned(project) == {"quantize": 2, "evaluate": 2, "report": 1}


def test_a_tokenizer_file_runs_what_reads_text(project: Path) -> None:
    (project / "model" / "merges.txt").write_text("a b", encoding="utf-8")
    assert planned(project) == EVERYTHING


def test_shards_in_a_folder_of_their_own_are_inputs(project: Path) -> None:
    model = project / "model"
    (model / "weights").mkdir()
    (model / "model.safetensors").rename(model / "weights" / "a.safetensors")
    with safe_open(model / "weights" / "a.safetensors", "pt") as file:
        weight_map = dict.fromkeys(file.keys(), "weights/a.safetensors")
    index = json.dumps({"metadata": {}, "weight_map": weight_map})
    (model / "model.safetensors.index.json").write_text(index, encoding="utf-8")
    digests = set()
    for _ in range(2):
        text = snakemake(project, "--dry-run", "--printshellcmds", "results/tiny/trace/traffic.parquet")
        digests.add(re.findall(r"mxmoe_steps.trace .*--made-from (\w+)", text)[0])
        change_weights(model / "weights")
    assert len(digests) == 2


LOST = {  # every second one is damaged instead
    "trace/routing.safetensors": {"trace": 1, **AFTER_CALIBRATE},
    "capture/layer-000.safetensors": {"capture": 1, **AFTER_CAPTURE},
    "calibrate/gptq/w4a16_g32_asym.safetensors": {"calibrate": 1, "quantize": 1, "evaluate": 1, "report": 1},
    "frontier/b4.5_t64_block_gptq.json": {"frontier": 1, "solve": 1, "quantize": 1, "evaluate": 1, "report": 1},
    "evaluate/original.safetensors": {"evaluate_original": 1, "evaluate": 2, "report": 1},
    f"quantize/{POINT}/model.safetensors": {"quantize": 1, "evaluate": 1, "report": 1},
}


def test_results_that_are_missing_or_damaged_are_made_again(project: Path) -> None:
    memory = project / ".snakemake"
    for number, (name, jobs) in enumerate(LOST.items()):
        file = project / RESULTS / name
        good, times = file.read_bytes(), file.stat().st_mtime_ns
        if number % 2:
            file.unlink()
        else:
            file.write_bytes(good[: len(good) // 2] + b"?" + good[len(good) // 2 + 1 :])
            os.utime(file, ns=(times, times))
        if number % 3 == 2:
            memory.rename(memory.with_name("forgotten"))
        found = planned(project)
        assert found | jobs == found, name
        if number % 3 == 2:
            shutil.rmtree(memory)
            memory.with_name("forgotten").rename(memory)
        file.write_bytes(good)
        os.utime(file, ns=(times, times))
    assert planned(project) == {}


STEPS = ["profile", "trace", "capture", "calibrate", "frontier", "solve", "quantize", "evaluate", "report"]
FAULT = "import sys\nif 'mxmoe_steps.{step}' in sys.orig_argv:\n    sys.exit(1)\n"


def run_with_fault(project: Path, step: str) -> None:
    """A run in which every job of ``step`` fails at once."""
    fault = project.with_name("fault")
    fault.mkdir(exist_ok=True)
    (fault / "sitecustomize.py").write_text(FAULT.format(step=step), encoding="utf-8")
    variables = environment(project)
    variables["PYTHONPATH"] = f"{fault}{os.pathsep}{variables['PYTHONPATH']}"
    command = [sys.executable, "-m", "snakemake", "--cores", "2", "--until", step]
    run = subprocess.run(command, cwd=project, env=variables, capture_output=True, text=True, check=False)
    assert run.returncode == 1, run.stdout + run.stderr


def everything(settings: dict[str, Any]) -> None:
    """Another value for every step, and fewer jobs."""
    for section in ("trace", "calibrate", "evaluate"):
        settings[section]["sequences"] = 5
    settings["profile"]["hardware"] = "rtx4090"
    settings["solve"]["metric"] = "out_sq"
    settings["calibrate"] |= {"quantizers": ["gptq"], "schemes": ["w2a16_g32", "w8a8_fp8"]}
    settings["baselines"] = []


def test_after_any_failure_the_next_call_does_what_is_missing(
    project: Path, tiny_moe: Path, text_file: Path, tmp_path: Path
) -> None:
    """After an edit every step fails in turn, so each call does what the one before did not; the bytes are right."""
    edit(project, everything)
    for step in STEPS:
        run_with_fault(project, step)
    snakemake(project)
    scratch = make_project(tmp_path / "scratch", tiny_moe, text_file)
    edit(scratch, everything)
    snakemake(scratch)
    results = contents(project / "results")
    for name, content in contents(scratch / "results").items():
        assert results[name] == content, name


def test_two_of_the_same_step_at_a_time_write_the_bytes_of_one(project: Path) -> None:
    """As when a step outlives a killed engine."""
    before = contents(project / "results")
    text = snakemake(project, "--dry-run", "--forceall", "--printshellcmds")
    commands = {
        shlex.split(command)[2]: shlex.split(command.split(" 2> ")[0])[1:]
        for command in re.findall(r"Shell command: (python -m mxmoe_steps\..*)", text)
    }
    for step in ("capture", "calibrate", "solve", "quantize"):
        command = [sys.executable, *commands[f"mxmoe_steps.{step}"]]
        runs = [subprocess.Popen(command, cwd=project, env=environment(project)) for _ in range(2)]
        assert [run.wait() for run in runs] == [0, 0], step
    assert contents(project / "results") == before
    assert planned(project) == {}


def contents(results: Path) -> dict[str, bytes]:
    """Every result by name."""
    return {
        str(file.relative_to(results)): file.read_bytes()
        for file in sorted(results.rglob("*"))
        if file.is_file() and not {"logs", "benchmarks"} & set(file.parts) and file.name != ".snakemake_timestamp"
    }


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
    sheets["h200"]["l2_gbs"] = 1
    file.write_text(json.dumps(sheets), encoding="utf-8")
    assert planned(project) == {"profile": 1, **AFTER_CALIBRATE}


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
    snakemake(project, "results/second/profile/h200.parquet")
    edit(project)
    assert planned(project) == {}


def test_a_hub_model_is_one_commit_and_another_commit_another_model(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    repository = project / "hub" / "models--org--tiny"
    monkeypatch.setenv("HF_HUB_CACHE", str(repository.parent))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    edit(project, changed("model", "path", value="org/tiny"))
    (repository / "refs").mkdir(parents=True)
    for commit in ("a" * 40, "b" * 40):
        shutil.copytree(project / "model", repository / "snapshots" / commit)
        (repository / "refs" / "main").write_text(commit, encoding="utf-8")
        assert f"--model org/tiny@{commit} " in snakemake(project, "--dry-run", "--printshellcmds")
    assert planned(project) == EVERYTHING
