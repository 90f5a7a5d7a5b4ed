"""A project folder with the whole workflow on a tiny model: made, run, edited; and what an edit should run again."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[1]
SETTINGS: dict[str, Any] = {
    "model": {"name": "tiny", "path": "model", "dtype": "float32"},
    "texts": {"words": {"files": ["words.txt"], "separator": "-----"}},
    "trace": {"texts": ["words"], "sequences": 8, "length": 64},
    "calibrate": {
        "text": "words",
        "sequences": 8,
        "length": 64,
        "schemes": ["w2a16_g32", "w4a16_g32", "w8a8_fp8"],
        "quantizers": ["rtn", "gptq"],
    },
    "profile": {"hardware": "h20"},  # nothing was measured on it: an estimate
    "solve": {"traffic": "words"},
    "sweep": [{"budget_bits": [4.5], "tokens": [64]}],
    "baselines": ["rtn"],
    "evaluate": {"texts": ["words"], "sequences": 8, "length": 64},
    "runtime": {"device": "cpu"},
}
RESULTS = Path("results/tiny")
POINT = "b4.5_t64_block_gptq_r0.75"
AFTER_SOLVE = {"solve": 2, "quantize": 2, "evaluate": 2, "report": 1}
AFTER_CALIBRATE = {"frontier": 2, **AFTER_SOLVE}
AFTER_CAPTURE = {"calibrate": 6, **AFTER_CALIBRATE}
EVERYTHING = {"trace": 1, "capture": 1, "evaluate_original": 1, **AFTER_CAPTURE}


DAMPED = {"calibrate": 3, "frontier": 1, "solve": 1, "quantize": 1, "evaluate": 1, "report": 1}


def environment(folder: Path) -> dict[str, str]:
    """The folder's own copy of the package comes first."""
    bin_ = str(Path(sys.executable).parent)
    return os.environ | {"PYTHONPATH": str(folder / "src"), "PATH": f"{bin_}{os.pathsep}{os.environ['PATH']}"}


def snakemake(folder: Path, *arguments: str) -> str:
    command = [sys.executable, "-m", "snakemake", "--cores", "2", *arguments]
    done = subprocess.run(command, cwd=folder, env=environment(folder), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def planned(folder: Path) -> dict[str, int]:
    """Rule -> number of jobs that a run would do."""
    text = snakemake(folder, "--dry-run")
    if "Nothing to be done" in text:
        return {}
    stats = text[text.index("Job stats") :].split("\n\n")[0]
    counts = dict(re.findall(r"^(\w+) +(\d+)$", stats, re.M))
    return {rule: int(count) for rule, count in counts.items() if rule not in ("all", "total")}


def make_project(folder: Path, model: Path, text: Path) -> Path:
    """A folder with the workflow and a copy of the package, the model and the text; nothing has run."""
    for name in ("rules", "src", "profiles"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    shutil.copytree(model, folder / "model")
    shutil.copyfile(text, folder / "words.txt")
    shutil.copyfile(ROOT / "Snakefile", folder / "Snakefile")
    write_settings(folder, SETTINGS)
    return folder


def write_settings(folder: Path, settings: dict[str, Any], header: str = "") -> None:
    (folder / "config").mkdir(exist_ok=True)
    text = header + yaml.safe_dump(settings, sort_keys=False)
    (folder / "config" / "config.yaml").write_text(text, encoding="utf-8")


def changed(*path: str, value: Any) -> Callable[[dict[str, Any]], None]:
    """A change of settings at a path of keys."""

    def change(settings: dict[str, Any]) -> None:
        at: Any = settings
        for key in path[:-1]:
            at = at[int(key)] if isinstance(at, list) else at[key]
        at[path[-1]] = value

    return change


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


def damp(settings: dict[str, Any]) -> None:
    settings["calibrate"]["damping"] = 0.02


def contents(results: Path) -> dict[str, bytes]:
    """Every result by name; of the report without the section on the run itself."""
    return {
        str(file.relative_to(results)): without_run(file)
        for file in sorted(results.rglob("*"))
        if file.is_file() and not {"logs", "benchmarks"} & set(file.parts) and file.name != ".snakemake_timestamp"
    }


def without_run(file: Path) -> bytes:
    """The bytes of a result, of the page without what the jobs took, and of its record without the page's hash."""
    content = file.read_bytes()
    if file.name == "report.html":
        content, count = re.subn(rb'<section id="run">.*?</section>', b"", content, flags=re.S)
        assert count == 1
    if file.name == "report.made.json":
        record = json.loads(content)
        assert len(record["files"].pop("report.html")) == 16
        content = json.dumps(record).encode()
    return content
