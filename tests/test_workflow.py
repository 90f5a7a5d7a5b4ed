"""The whole workflow on a tiny model: it runs, an edit re-runs exactly what it touches, hands get the same bytes."""

import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import yaml
from workflow import SETTINGS, changed, environment, planned, snakemake, without_run, write_settings


@pytest.fixture(scope="module")
def done(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the workflow, run to the end."""
    folder = tmp_path_factory.mktemp("workflow") / "project"
    shutil.copytree(finished, folder)
    shutil.copytree(folder / "src", folder.with_name("pristine"))
    return folder


@pytest.fixture
def project(done: Path) -> Any:
    """The finished folder; its settings and sources are restored afterwards."""
    yield done
    write_settings(done, SETTINGS)
    shutil.rmtree(done / "src")
    shutil.copytree(done.with_name("pristine"), done / "src")


def test_outputs_are_complete(done: Path) -> None:
    table = pd.read_csv(done / "results" / "summary.csv")
    assert list(table["kind"]) == ["original", "uniform rtn", "ours"]
    assert (table["bits"].iloc[1:] <= 4.5).all()
    assert table["kl"].iloc[0] == 0
    assert (table["kl"].iloc[1:] > 0).all()
    assert table["size_mb"].is_monotonic_decreasing or table["size_mb"].iloc[0] == table["size_mb"].max()
    page = (done / "results" / "report.html").read_text(encoding="utf-8")
    assert page.count("<svg") == 9
    assert '<td class="text">calibrate</td>' in page  # what its jobs took
    assert "roofline estimate" in page
    assert "10 % more time would give" in page
    log = (done / "results" / "tiny" / "logs" / "report.log").read_text(encoding="utf-8")
    assert "results/report.html" in log
    assert "results/summary.csv" in log


def test_a_second_run_does_nothing(done: Path) -> None:
    assert planned(done) == {}


AFTER_SOLVE = {"solve": 2, "quantize": 2, "evaluate": 2, "report": 1}


@pytest.mark.parametrize(
    ("change", "jobs"),
    [
        # one point and the new budget's baseline: one solve, one quantize and one evaluate each
        (changed("sweep", "0", "budget_bits", value=[4.5, 5.0]), {"frontier": 2, **AFTER_SOLVE}),
        (changed("sweep", "0", "r", value=[0.75, 0.5]), {"solve": 1, "quantize": 1, "evaluate": 1, "report": 1}),
        (changed("evaluate", "sequences", value=7), {"evaluate_original": 1, "evaluate": 2, "report": 1}),
        (changed("profile", "hardware", value="rtx4090"), {"profile": 1, "frontier": 2, **AFTER_SOLVE}),
        (changed("solve", "metric", value="out_sq"), {"frontier": 2, **AFTER_SOLVE}),
        (
            changed("calibrate", "damping", value=0.02),  # only GPTQ damps
            {"calibrate": 3, "frontier": 1, "solve": 1, "quantize": 1, "evaluate": 1, "report": 1},
        ),
        (
            changed("calibrate", "schemes", value=["w2a16_g32", "w4a16_g32", "w8a8_fp8", "w3a16_g32"]),
            {"calibrate": 2, "profile": 1, "frontier": 2, **AFTER_SOLVE},
        ),
    ],
    ids=["budget", "r", "evaluate", "hardware", "metric", "damping", "scheme"],
)
def test_an_edit_runs_exactly_what_it_touches(
    project: Path, change: Callable[[dict[str, Any]], None], jobs: dict[str, int]
) -> None:
    settings = yaml.safe_load(yaml.safe_dump(SETTINGS))
    change(settings)
    write_settings(project, settings)
    assert planned(project) == jobs


def test_a_local_profile_compiles_measures_and_times(project: Path) -> None:
    settings = yaml.safe_load(yaml.safe_dump(SETTINGS))
    settings["calibrate"]["schemes"] = ["w2a16", "w4a16", "w8a8_fp8"]
    for hardware, steps in (("local", {"compile": 1, "measure": 1, "profile": 1, "time": 1}), ("h100", {"profile": 1})):
        settings["profile"]["hardware"] = hardware
        write_settings(project, settings)
        jobs = planned(project)
        assert {rule: jobs[rule] for rule in ("compile", "measure", "profile", "time") if rule in jobs} == steps


@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_jobs_share_a_gpu_by_memory_and_measure_alone(done: Path, device: str) -> None:
    settings = yaml.safe_load(yaml.safe_dump(SETTINGS))
    settings["calibrate"]["schemes"] = ["w2a16", "w4a16", "w8a8_fp8"]
    settings["profile"]["hardware"], settings["runtime"]["device"] = "local", device
    command = [
        "--cores",
        "2",
        "--dry-run",
        "--forceall",
        "--config",
        *(f"{key}={value}" for key, value in settings.items()),
    ]
    run = (
        "from mxmoe_steps.workflow import gpu; gpu.has_gpu = lambda: True; gpu.gpu_memory = lambda: 24564\n"
        f"from snakemake.cli import main; main({command!r})"
    )
    said = subprocess.run(
        [sys.executable, "-c", run], cwd=done, env=environment(done), capture_output=True, text=True, check=True
    ).stdout
    jobs = re.findall(r"^rule (\w+):.*?^    resources: (.*?)$", said, re.M | re.S)
    shares = {
        rule: int(asked.get("gpu_mb", 0)) for rule, text in jobs if (asked := dict(re.findall(r"(\w+)=(\d+)", text)))
    }
    assert (shares["measure"], shares["time"]) == (24564, 24564)
    assert (shares["solve"], shares["compile"]) == (0, 0)
    modest = [shares[rule] for rule in ("trace", "capture", "calibrate", "evaluate")]
    assert all(1024 < share < 8192 for share in modest) if device == "cuda" else modest == [0] * 4


def test_comments_key_order_and_docstrings_run_nothing(project: Path) -> None:
    write_settings(project, dict(reversed(list(SETTINGS.items()))), header="# a comment\n")
    module = project / "src" / "mxmoe_steps" / "calibrate.py"
    module.write_text(module.read_text(encoding="utf-8") + "\n# nothing\n", encoding="utf-8")
    assert planned(project) == {}


def test_editing_the_allocation_runs_no_calibration(project: Path) -> None:
    module = project / "src" / "mxmoe_steps" / "allocation" / "hull.py"
    module.write_text(module.read_text(encoding="utf-8") + "\nCHANGED = True\n", encoding="utf-8")
    assert planned(project) == {"frontier": 2, **AFTER_SOLVE}
    assert "mxmoe_steps.allocation.hull@" in snakemake(project, "--dry-run")


def test_editing_the_model_files_runs_everything(project: Path) -> None:
    file = project / "model" / "config.json"
    text = file.read_text(encoding="utf-8")
    try:
        file.write_text(text.replace('"hidden_act": "silu"', '"hidden_act": "gelu"'), encoding="utf-8")
        assert planned(project)["trace"] == 1
        assert planned(project)["calibrate"] == 6
    finally:
        file.write_text(text, encoding="utf-8")


def test_moving_the_folder_runs_nothing(project: Path) -> None:
    moved = project.with_name("moved")
    project.rename(moved)
    try:
        assert planned(moved) == {}
    finally:
        moved.rename(project)


def test_layers_in_jobs_of_their_own_write_the_same_bytes(done: Path, tmp_path: Path) -> None:
    folder = tmp_path / "parts"
    shutil.copytree(done, folder, ignore=shutil.ignore_patterns(".snakemake", "results"))
    write_settings(folder, SETTINGS | {"runtime": {"device": "cpu", "layers_per_job": 1}})
    losses, packed = (f"calibrate/gptq/w2a16_g32_asym.{kind}" for kind in ("parquet", "safetensors"))
    log = snakemake(folder, "results/tiny/trace/traffic.parquet", f"results/tiny/{losses}")
    assert log.count("rule trace_part:") == 1
    assert log.count("rule capture_part:") == 2
    assert log.count("rule calibrate_part:") == 2
    results, parts = done / "results" / "tiny", folder / "results" / "tiny"
    assert {path.name for path in parts.iterdir()} <= {"benchmarks", "calibrate", "capture", "logs", "parts", "trace"}
    assert not list(parts.glob("parts/*"))
    assert not list(parts.glob("calibrate/*/.*"))
    for name in (
        "trace/traffic.parquet", "trace/routing.safetensors", "capture/words/layer-000.safetensors", losses, packed
    ):  # fmt: skip
        assert (parts / name).read_bytes() == (results / name).read_bytes()


def test_a_configuration_error_stops_before_any_job(project: Path) -> None:
    write_settings(project, SETTINGS | {"sweeep": []})
    command = [sys.executable, "-m", "snakemake", "--cores", "1"]
    run = subprocess.run(command, cwd=project, env=environment(project), capture_output=True, text=True, check=False)
    assert run.returncode != 0
    assert "unknown key 'sweeep'; did you mean 'sweep'?" in run.stdout + run.stderr


def test_model_and_texts_are_checked_before_any_job(done: Path, tmp_path: Path) -> None:
    folder = tmp_path / "checked"
    shutil.copytree(done, folder, ignore=shutil.ignore_patterns(".snakemake", "results", "tokenizer*"))
    command = [sys.executable, "-m", "snakemake", "--cores", "1"]
    run = subprocess.run(command, cwd=folder, env=environment(folder), capture_output=True, text=True, check=False)
    assert run.returncode != 0
    assert "error: model: the tokenizer has no vocabulary; copy its files" in run.stderr
    assert "No job was started" in run.stderr
    assert "rule trace:" not in run.stderr
    assert not list(folder.glob("results/**/*"))


def test_numbers_may_come_from_the_command_line(done: Path) -> None:
    text = snakemake(
        done, "--dry-run", "--printshellcmds", "--config", "runtime={threads: 2}", "solve={metric: out_sq}"
    )
    assert "mxmoe_steps.trace --batch 8 --device cpu" in text
    assert "--threads 2" in text


def test_steps_by_hand_write_the_same_bytes(done: Path, tmp_path: Path) -> None:
    """The commands that the workflow runs, run in its order without it."""
    text = snakemake(done, "--dry-run", "--forceall", "--printshellcmds")
    commands = re.findall(r"Shell command: (python -m mxmoe_steps\..*)", text)
    assert len(commands) == 19
    order = ["trace", "capture", "calibrate", "profile", "frontier", "solve", "quantize", "evaluate", "report"]

    def rank(command: str) -> tuple[int, bool]:
        step = shlex.split(command)[2].removeprefix("mxmoe_steps.")
        return order.index(step), "--save-reference" not in command  # the original is evaluated first

    work = tmp_path / "hand"
    work.mkdir()
    for name in ("model", "words.txt"):
        (work / name).symlink_to(done / name)
    for command in sorted(commands, key=rank):
        words = shlex.split(command.split(" 2> ")[0])
        result = subprocess.run(
            [sys.executable, *words[1:]], cwd=work, env=environment(done), capture_output=True, text=True, check=False
        )
        assert result.returncode == 0, result.stderr
    theirs, ours = done / "results", work / "results"
    files = [
        file.relative_to(theirs)
        for file in theirs.rglob("*")
        if file.is_file()
        and not {"logs", "benchmarks"} & set(file.parts)
        and file.suffix not in (".log", ".tsv")
        and file.name != ".snakemake_timestamp"
    ]
    assert len(files) > 25
    for file in files:
        assert without_run(theirs / file) == without_run(ours / file), file
