"""The summary table: one row per evaluated checkpoint, and what it says in a few lines."""

from dataclasses import dataclass
from typing import Any

import pandas as pd

from mxmoe_steps.quantizers.names import is_rotated

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
        """The scheme that all blocks share; ``mixed`` for ours."""
        if self.allocation is None:
            return "w16a16"
        return str(self.allocation["assignment"][0][2]) if self.allocation["granularity"] == "uniform" else "mixed"


def summary_table(checkpoints: list[Checkpoint], times: dict[str, dict[int, float]], estimate: bool) -> pd.DataFrame:
    """One row per checkpoint, sorted by budget, kind and name.

    ``times``: checkpoint name -> tokens in a step -> predicted microseconds of one MoE layer's expert
    GEMMs, the mean over layers; their columns begin with ``estimated`` where no kernel was measured.
    ``size_mb`` is the size of the weights on disk.
    """
    rows = []
    for checkpoint in checkpoints:
        allocation = checkpoint.allocation or {}
        ours = checkpoint.kind.startswith("ours")
        rows.append(
            {
                "checkpoint": checkpoint.name,
                "kind": checkpoint.kind,
                "granularity": allocation.get("granularity"),
                "scheme": checkpoint.scheme,
                "quantizer": allocation.get("quantizer"),
                "budget_bits": allocation.get("budget_bits"),
                "bits": allocation.get("bits", 16.0),
                "tokens": allocation.get("tokens") if ours else None,
                "goal": _goal(allocation) if ours else None,
                "perplexity": checkpoint.metrics["overall"]["perplexity"],
                "kl": checkpoint.metrics["overall"]["kl"],
                "size_mb": checkpoint.metrics["weights_bytes"] / 1e6,
                **{time_column(tokens, estimate): us for tokens, us in times[checkpoint.name].items()},
                **{f"perplexity_{text}": m["perplexity"] for text, m in checkpoint.metrics["texts"].items()},
            }
        )
    table = pd.DataFrame(rows).astype({"tokens": "Int64"})
    order = {kind: place for place, kind in enumerate(sorted(set(table["kind"]), key=_place))}
    table["_order"] = table["kind"].map(order)
    table = table.sort_values(["budget_bits", "_order", "checkpoint"], na_position="first", ignore_index=True)
    return table.drop(columns="_order")


def _place(kind: str) -> tuple[Any, ...]:
    """The original, then uniform ones, rounding first and rotated ones last, then ours; tuned ones last."""
    plain = kind.removesuffix(TUNED_KIND)
    place = {"original": 0, "ours": 2}.get(plain, 1)
    return place, kind != plain, is_rotated(plain), not kind.startswith("uniform rtn"), kind


def _goal(allocation: dict[str, Any]) -> str:
    """What the allocation optimises, e.g. ``r=0.75`` or ``max_time_us=120``."""
    return next(f"{key}={allocation[key]:g}" for key in ("r", "max_time_us", "max_loss") if allocation[key] is not None)


def time_column(tokens: int, estimate: bool) -> str:
    """Name of the column of predicted times at a token count."""
    return f"{'estimated' if estimate else 'predicted'}_layer_us_{tokens}_tokens"


def time_columns(table: pd.DataFrame) -> dict[str, int]:
    """Columns of predicted times and their token counts."""
    return {name: int(name.split("_")[3]) for name in table.columns if "_layer_us_" in name}


def headlines(table: pd.DataFrame) -> list[str]:
    """One line per budget: our best checkpoint against the uniform baselines within the same budget."""
    original = table.loc[table["kind"] == "original", "perplexity"].iloc[0]
    lines = []
    for budget, within in table.groupby("budget_bits"):
        is_ours = within["kind"].str.startswith("ours")
        ours = within[is_ours].sort_values("kl")
        if ours.empty:
            continue
        best = ours.iloc[0]
        uniform = [
            f"{row['kind']} {row['scheme'].split('_')[0]} {row['perplexity']:.2f} (KL {row['kl']:.4f})"
            for _, row in within[~is_ours].iterrows()
        ]
        tuned = ", tuned" if best["kind"].endswith(TUNED_KIND) else ""
        lines.append(
            f"{budget:g} bits: perplexity {best['perplexity']:.2f} (KL {best['kl']:.4f}) with one scheme per "
            f"{best['granularity']}{tuned}; {', '.join(uniform)}; original {original:.2f}"
        )
    return lines
