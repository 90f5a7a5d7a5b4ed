"""What the report's numbers were made with and from, and what the run took."""

import csv
import platform
from collections.abc import Collection, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from mxmoe_steps.errors import UserError

_PACKAGES = (  # that decide results
    "mxmoe-steps", "torch", "transformers", "tokenizers", "safetensors", "numpy", "pyarrow", "ortools", "datasets",
    "snakemake", "pandas", "matplotlib",
)  # fmt: skip


_BY_CHECKPOINT = (
    "frontier",
    "solve",
    "quantize",
    "tune",
    "evaluate",
)  # jobs named after a checkpoint, or its beginning


def provenance(title: str, model: str, published: Mapping[str, Any], profile: Mapping[str, Any]) -> list[list[str]]:
    """Rows (what, value): the model and its revision, the GPU that times are of, versions.

    ``model``: fingerprint of the original; ``published``: what an evaluation says of it; ``profile``: facts of the GPU.
    """
    revision = f"commit {published['commit']} of {published['name']}, " if published["name"] else ""
    rows = [["model", f"{title}: {revision}fingerprint {model}"]]
    rows.append(["GPU of the times", f"{profile['device']}: {profile['source']}"])
    if not profile["estimate"]:
        made = f"{profile['date']}, driver {profile['driver']}, CUDA {profile['cuda']}, torch {profile['torch']}"
        rows.append(["measured", f"{made}, {profile['compiler']}"])
    versions = [f"{name} {version}" for name in _PACKAGES if (version := _version(name))]
    return [*rows, ["versions", ", ".join(versions)]]


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def steps_taken(benchmarks: Path, checkpoints: Collection[str]) -> list[list[str]]:
    """Rows (step, jobs, seconds, processor seconds, MB): what Snakemake measured of every job.

    Seconds are sums over jobs, some of which ran side by side; memory is the largest job's. Jobs for other checkpoints
    than these, of a sweep before, do not count. `UserError` for a file in the folder that is none of Snakemake's.
    """
    steps: dict[str, list[tuple[float, float, float]]] = {}
    for file in sorted(benchmarks.rglob("*.tsv")):
        step, *rest = file.relative_to(benchmarks).with_suffix("").parts
        if step in _BY_CHECKPOINT and not any(name.startswith(rest[0].partition("-")[0]) for name in checkpoints):
            continue
        with file.open(newline="", encoding="utf-8") as lines:
            jobs = list(csv.DictReader(lines, delimiter="\t"))
        try:
            taken = [tuple(_number(job[key]) for key in ("s", "cpu_time", "max_rss")) for job in jobs[-1:]]
        except (KeyError, ValueError):
            raise UserError(f"{file}: is no benchmark of Snakemake's; remove it") from None
        steps.setdefault(step.partition("-")[0], []).extend(taken)  # type: ignore[arg-type]
    rows = []
    for step, found in sorted(steps.items(), key=lambda item: (-sum(job[1] for job in item[1]), item[0])):
        seconds, processor, memory = zip(*found, strict=True)
        rows.append([step, str(len(found)), f"{sum(seconds):.1f}", f"{sum(processor):.1f}", f"{max(memory):.0f}"])
    return rows


def _number(text: str) -> float:
    """Of a job too short to be looked at Snakemake says NA or -."""
    return 0.0 if text in ("NA", "-") else float(text)


def machine() -> str:
    """Where the report was made."""
    return f"Python {platform.python_version()} on {platform.machine()}"
