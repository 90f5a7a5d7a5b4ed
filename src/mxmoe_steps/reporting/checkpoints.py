"""Evaluated checkpoints: what `evaluate` said of each, beside the allocation that it has."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mxmoe_steps.errors import UserError

TUNED_KIND = " tuned"  # at the end of a kind of checkpoint


@dataclass(frozen=True)
class Checkpoint:
    """An evaluated checkpoint: its metrics and, unless it is the original, its allocation."""

    name: str
    metrics: dict[str, Any]
    allocation: dict[str, Any] | None

    @property
    def kind(self) -> str:
        """``original``, ``uniform`` with the quantizer, or ``ours``; the last two may be ``tuned``."""
        if self.allocation is None:
            return "original"
        uniform = self.allocation["granularity"] == "uniform"
        kind = f"uniform {self.allocation['quantizer']}" if uniform else "ours"
        return kind + TUNED_KIND if self.metrics.get("tuned") else kind

    @property
    def scheme(self) -> str:
        """The scheme that all blocks share; ``mixed`` for ours; how the original was published."""
        if self.allocation is None:
            return ", ".join(self.metrics["published"]["formats"]) or "w16a16"
        return str(self.allocation["assignment"][0][2]) if self.allocation["granularity"] == "uniform" else "mixed"


def read_checkpoints(evaluations: Sequence[Path], allocations: dict[str, dict[str, Any]]) -> list[Checkpoint]:
    """Evaluated checkpoints; all but the original have one of ``allocations`` (by name), a tuned one that of another.

    `UserError` for an evaluation without its allocation, of another one, or of other texts; or without the original.
    """
    from mxmoe_steps.evaluations import TUNED, read_evaluation

    checkpoints = []
    for path in evaluations:
        metrics, name = read_evaluation(path), path.stem
        allocation = allocations.get(name.removesuffix(TUNED) if metrics.get("tuned") else name)
        if metrics["allocation"] is None:
            checkpoints.append(Checkpoint(name, metrics, None))
            continue
        if allocation is None:
            raise UserError(f"{path}: no allocation of that name among --allocations")
        if not metrics["allocation"].items() <= allocation.items():
            raise UserError(f"{path}: was evaluated under another allocation; run quantize and evaluate again")
        checkpoints.append(Checkpoint(name, metrics, allocation))
    for path, checkpoint in zip(evaluations, checkpoints, strict=True):
        if checkpoint.metrics["texts"].keys() != checkpoints[0].metrics["texts"].keys():
            raise UserError(f"{path}: was evaluated on other texts than {evaluations[0]}; run evaluate again")
    if not any(checkpoint.allocation is None for checkpoint in checkpoints):
        raise UserError("--evaluations holds no evaluation of the original model")
    return checkpoints
