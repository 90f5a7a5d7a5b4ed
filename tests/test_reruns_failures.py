"""After failed jobs, and with two jobs at a time, results are those of one good run."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

from workflow import contents, edit, environment, make_project, planned, snakemake

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


def test_after_any_failure_the_next_call_does_what_is_missing(project: Path, tmp_path: Path) -> None:
    """After an edit every step fails in turn, so each call does what the one before did not; the bytes are right."""
    edit(project, everything)
    for step in STEPS:
        run_with_fault(project, step)
    assert "figures in results/report.html" in snakemake(project)  # the table at the end
    scratch = make_project(tmp_path / "scratch", project / "model", project / "words.txt")
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
