"""The summary table: one row per evaluated checkpoint, and what it says in a few lines."""

from collections.abc import Mapping
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
        """The scheme that all blocks share; ``mixed`` for ours; how the original was published."""
        if self.allocation is None:
            return ", ".join(self.metrics["published"]["formats"]) or "w16a16"
        return str(self.allocation["assignment"][0][2]) if self.allocation["granularity"] == "uniform" else "mixed"


def summary_table(
    checkpoints: list[Checkpoint],
    times: dict[str, dict[int, float]],
    estimate: bool,
    measured: Mapping[str, Mapping[int, Mapping[str, float]]] | None = None,
) -> pd.DataFrame:
    """One row per checkpoint, sorted by budget, kind and name.

    ``times``: checkpoint name -> tokens in a step -> predicted microseconds of one MoE layer's expert
    GEMMs, the mean over layers; their columns begin with ``estimated`` where no kernel was measured.
    ``measured``: checkpoint -> tokens -> stage -> microseconds, what `timing.times.summary` finds: the expert
    GEMMs, to be set beside the predicted ones, and the whole layer.
    ``size_mb`` is the size of the weights on disk, ``other_mb`` that of what is not experts; ``of_16_bit`` and
    ``of_published`` are shares of the original in 16 bits and as it was published.
    """
    rows = []
    for checkpoint in checkpoints:
        allocation = checkpoint.allocation or {}
        ours = checkpoint.kind.startswith("ours")
        size, original = checkpoint.metrics["weights_bytes"], checkpoint.metrics["published"]
        rows.append(
            {
                "checkpoint": checkpoint.name,
                "kind": checkpoint.kind,
                "granularity": allocation.get("granularity"),
                "scheme": checkpoint.scheme,
                "quantizer": allocation.get("quantizer"),
                "budget_bits": allocation.get("budget_bits"),
                "bits": allocation.get("bits", original["expert_bits"] if original["formats"] else 16.0),
                "tokens": allocation.get("tokens") if ours else None,
                "goal": _goal(allocation) if ours else None,
                "perplexity": checkpoint.metrics["overall"]["perplexity"],
                "kl": checkpoint.metrics["overall"]["kl"],
                "size_mb": size / 1e6,
                "other_mb": checkpoint.metrics["other_bytes"] / 1e6,
                "of_16_bit": size / original["bytes_16_bit"],
                "of_published": size / original["bytes"],
                **{time_column(tokens, estimate): us for tokens, us in times[checkpoint.name].items()},
                **_measured_columns((measured or {}).get(checkpoint.name, {})),
                **{f"perplexity_{text}": m["perplexity"] for text, m in checkpoint.metrics["texts"].items()},
                **{f"kl_{text}": m["kl"] for text, m in checkpoint.metrics["texts"].items()},
                **(_beside_uniform(checkpoint, checkpoints) if ours else {}),
            }
        )
    table = pd.DataFrame(rows).astype({"tokens": "Int64"})
    order = {kind: place for place, kind in enumerate(sorted(set(table["kind"]), key=_place))}
    table["_order"] = table["kind"].map(order)
    table = table.sort_values(["budget_bits", "_order", "checkpoint"], na_position="first", ignore_index=True)
    return table.drop(columns="_order")


def _measured_columns(by_tokens: Mapping[int, Mapping[str, float]]) -> dict[str, float]:
    columns = {}
    for tokens, stages in sorted(by_tokens.items()):
        if "gate_up" in stages:
            columns[f"measured_gemms_us_{tokens}_tokens"] = sum(
                stages.get(stage, 0.0) for stage in ("gate_up", "swiglu", "down")
            )
        columns[f"measured_moe_us_{tokens}_tokens"] = stages["layer"]
    return columns


def prediction_errors(table: pd.DataFrame) -> dict[int, list[float]]:
    """Tokens -> relative errors of the predicted times of expert GEMMs, one per checkpoint that was timed."""
    errors = {}
    for column, tokens in time_columns(table).items():
        measured = f"measured_gemms_us_{tokens}_tokens"
        if measured in table:
            timed = table.dropna(subset=[measured])
            errors[tokens] = (timed[column] / timed[measured] - 1).tolist()
    return errors


def uniform_beside(checkpoint: Checkpoint, checkpoints: list[Checkpoint]) -> Checkpoint | None:
    """The uniform checkpoint of the same budget and quantizer, tuned if this one is, or what comes near; or None."""
    assert checkpoint.allocation is not None
    quantizer, budget = checkpoint.allocation["quantizer"], checkpoint.allocation["budget_bits"]
    uniform = [
        other
        for other in checkpoints
        if other.kind.startswith("uniform") and other.allocation and other.allocation["budget_bits"] == budget
    ]
    return min(
        uniform,
        key=lambda other: (
            other.kind.endswith(TUNED_KIND) != checkpoint.kind.endswith(TUNED_KIND),
            other.kind.removesuffix(TUNED_KIND) != f"uniform {quantizer}",
            other.metrics["overall"]["kl"],
        ),
        default=None,
    )


def over_uniform(checkpoint: Checkpoint, uniform: Checkpoint | None) -> dict[str, float]:
    """Text -> KL divergence over that of the uniform checkpoint, the worst first; empty without one."""
    others = {} if uniform is None else uniform.metrics["texts"]
    texts = checkpoint.metrics["texts"]
    return _worst_first({text: texts[text]["kl"] / other["kl"] for text, other in others.items() if other["kl"] > 0})


def predicted_over_uniform(allocation: dict[str, Any]) -> dict[str, float]:
    """Domain of the calibration text -> predicted loss over that of the best single scheme, the worst first."""
    losses, uniform = allocation["domains"]["losses"], allocation["domains"]["uniform"]
    return _worst_first({name: loss / uniform[name] for name, loss in losses.items() if uniform[name] > 0})


def _beside_uniform(checkpoint: Checkpoint, checkpoints: list[Checkpoint]) -> dict[str, Any]:
    """Columns that compare one of ours with uniform weights."""
    assert checkpoint.allocation is not None
    uniform = uniform_beside(checkpoint, checkpoints)
    ratios = over_uniform(checkpoint, uniform)
    kl = 0.0 if uniform is None else uniform.metrics["overall"]["kl"]
    return {
        "kl_over_uniform": checkpoint.metrics["overall"]["kl"] / kl if kl > 0 else None,
        "worst_over_uniform": max(ratios.values(), default=None),
        "texts_over_uniform": _listed(ratios),
        "predicted_over_uniform": _listed(predicted_over_uniform(checkpoint.allocation)),
    }


def _worst_first(ratios: dict[str, float]) -> dict[str, float]:
    return dict(sorted(ratios.items(), key=lambda item: (-item[1], item[0])))


def _listed(ratios: dict[str, float]) -> str:
    """``code 1.04, english 0.98``."""
    return ", ".join(f"{name} {ratio:.2f}" for name, ratio in ratios.items())


def domain_lines(checkpoints: list[Checkpoint]) -> list[str]:
    """One line per budget: how our best checkpoint fares on every text beside the uniform one, the worst first."""
    ours = [checkpoint for checkpoint in checkpoints if checkpoint.kind.startswith("ours")]
    best: dict[float, Checkpoint] = {}
    for checkpoint in sorted(ours, key=lambda one: float(one.metrics["overall"]["kl"]), reverse=True):
        assert checkpoint.allocation is not None
        best[checkpoint.allocation["budget_bits"]] = checkpoint
    lines = []
    for budget, checkpoint in sorted(best.items()):
        if not (ratios := over_uniform(checkpoint, uniform_beside(checkpoint, checkpoints))):
            continue
        worse = [text for text, ratio in ratios.items() if ratio > 1]
        verdict = f"It is worse on {' and '.join(worse)}." if worse else "It is worse on none."
        lines.append(f"{budget:g} bits: KL over that of uniform weights: {_listed(ratios)}. {verdict}")
    return lines


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
