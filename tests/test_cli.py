"""Every step's command line: complete, instant, and runnable from any folder."""

import json
import mmap
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mxmoe_steps.errors import run_cli

STEPS = [
    "check", "trace", "capture", "calibrate", "profile", "frontier", "solve", "extrapolate", "quantize", "tune",
    "evaluate", "tasks", "report",
]  # fmt: skip
HEAVY = [
    "lm_eval",
    "torch",
    "transformers",
    "datasets",
    "numpy",
    "pandas",
    "pyarrow",
    "ortools",
    "matplotlib",
    "safetensors",
]
PROBE = """
import contextlib, io, json, runpy, sys
sys.argv = [{module!r}, "--help"]
text = io.StringIO()
with contextlib.redirect_stdout(text), contextlib.suppress(SystemExit):
    runpy.run_module({module!r}, run_name="__main__")
print(json.dumps([text.getvalue(), sorted(set({heavy!r}) & set(sys.modules))]))
"""


@pytest.mark.parametrize(
    ("what", "says"),
    [
        ("torch.empty(1 << 58)", r"error: not enough memory \(.*can't allocate memory.*\); run fewer jobs at a time"),
        (
            "raise torch.OutOfMemoryError('CUDA out of memory. 2 GiB')",
            r"\(CUDA out of memory.*runtime\.device: cpu",
        ),
        ("mmap.mmap(-1, 1 << 60)", r"error: not enough memory \(.*\); run fewer jobs"),
        ("raise MemoryError", r"error: not enough memory \(MemoryError\); run fewer jobs"),
        ("raise OSError(28, 'No space left on device', 'x.bin')", r"error: x\.bin: No space left on device\n$"),
    ],
)
def test_what_the_machine_refuses_is_one_line(what: str, says: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        run_cli(lambda: exec(what, {"torch": torch, "mmap": mmap}))
    assert ended.value.code == 2
    written = capsys.readouterr().err
    assert re.search(says, written)
    assert written.count("\n") == 1


def test_other_errors_keep_their_traceback() -> None:
    with pytest.raises(RuntimeError, match="shape"):
        run_cli(lambda: torch.ones(6).view(7))


@pytest.mark.parametrize("step", STEPS)
def test_help_is_complete_and_loads_nothing_heavy(step: str, tmp_path: Path) -> None:
    code = PROBE.format(module=f"mxmoe_steps.{step}", heavy=HEAVY)
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    text, heavy = json.loads(done.stdout)
    assert heavy == []
    assert f"{step}: " in text
    assert "--out" in text or "--html" in text or step == "check"


def test_solve_never_loads_torch(tmp_path: Path) -> None:
    code = "import sys, mxmoe_steps.solve, mxmoe_steps.allocation.parts; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)


def test_a_user_error_is_one_line_without_traceback(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mxmoe_steps.calibrate", "--model", "nowhere", "--capture", ".", "--out", "out"]
    done = subprocess.run(
        [*command, "--quantizer", "rtn", "--scheme", "w4a16"], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert done.stderr.strip() == (
        "error: model folder nowhere does not exist; set model.path to a local folder or a hub id"
    )
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (["--r", "nan"], "--r: 'nan' is not a number from 0 to 1"),
        (["--r", "1.01"], "--r: '1.01' is not a number from 0 to 1"),
        (["--max-time-us", "nan"], "--max-time-us: 'nan' is not a finite number above 0"),
        (["--max-time-us", "-1"], "--max-time-us: '-1' is not a finite number above 0"),
        (["--max-loss", "inf"], "--max-loss: 'inf' is not a finite number above 0"),
        (["--r", "1", "--out", "."], "--out: . is a folder; give the name of a file"),
        (["--r", "1", "--out", "file/x"], "file is a file, so file/x cannot be made"),
    ],
)
def test_arguments_are_checked_before_anything_is_read(arguments: list[str], why: str, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    command = [sys.executable, "-m", "mxmoe_steps.solve", "--frontier", "nowhere", "--out", "out.json", *arguments]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.strip().endswith(why)


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (["--out", "file"], "--out: file is a file; give the name of a folder"),
        (["--out", "out", "--threads", "0"], "--threads: '0' is not a whole number from 1 to 1024"),
        (["--out", "out", "--seed", "-1"], "--seed: '-1' is not a whole number from 0 to 9223372036854775807"),
        (["--out", "out", "--damping", "nan"], "--damping: 'nan' is not a number above 0 and up to 1"),
    ],
)
def test_arguments_of_calibrate(arguments: list[str], why: str, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    command = [sys.executable, "-m", "mxmoe_steps.calibrate", "--model", ".", "--capture", ".", "--quantizer", "rtn"]
    done = subprocess.run(
        [*command, "--scheme", "w4a16", *arguments], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert done.stderr.strip().endswith(why)
