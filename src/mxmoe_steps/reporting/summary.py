"""The summary table: one row per evaluated checkpoint, and what it says in a few lines."""

import re
from collections.abc import Mapping
from typing import Any

import pandas as pd

from mxmoe_steps.quantizers.names import is_rotated
from mxmoe_steps.reporting.checkpoints import TUNED_KIND, Checkpoint
from mxmoe_steps.reporting.domains import beside_uniform, predicted_loss
from mxmoe_steps.timing.times import WHOLE, Rates, Stages, gemms_us


def summary_table(
    checkpoints: list[Checkpoint],
    times: dict[str, dict[int, float]],
    estimate: bool,
    measured: Stages | None = None,
    rates: Rates | None = None,
) -> pd.DataFrame:
    """One row per checkpoint, sorted by budget, kind and name.

    ``times``: checkpoint name -> tokens in a step -> predicted microseconds of one MoE layer's expert
    GEMMs, the mean over layers; their columns begin with ``estimated`` where no kernel was measured.
    ``measured``: checkpoint -> tokens -> stage -> microseconds, what `timing.times.summary` finds: the expert
    GEMMs, to be set beside the predicted ones, and the whole layer. ``rates``: tokens a second of whole models.
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
                "predicted_loss": predicted_loss(checkpoint),
                "perplexity": checkpoint.metrics["overall"]["perplexity"],
                "kl": checkpoint.metrics["overall"]["kl"],
                "size_mb": size / 1e6,
                "other_mb": checkpoint.metrics["other_bytes"] / 1e6,
                "of_16_bit": size / original["bytes_16_bit"],
                "of_published": size / original["bytes"],
                **{time_column(tokens, estimate): us for tokens, us in times[checkpoint.name].items()},
                **_measured_columns((measured or {}).get(checkpoint.name, {})),
                **{
                    f"{phase}_{tokens}_tokens_per_s": rate
                    for (phase, tokens), rate in sorted((rates or {}).get(checkpoint.name, {}).items())
                },
                **{f"perplexity_{text}": m["perplexity"] for text, m in checkpoint.metrics["texts"].items()},
                **{f"kl_{text}": m["kl"] for text, m in checkpoint.metrics["texts"].items()},
                **(beside_uniform(checkpoint, checkpoints) if ours else {}),
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
        if (gemms := gemms_us(stages)) is not None:
            columns[f"measured_gemms_us_{tokens}_tokens"] = gemms
        columns[f"measured_moe_us_{tokens}_tokens"] = stages[WHOLE]
    return columns


def rate_columns(table: pd.DataFrame) -> dict[str, tuple[str, int]]:
    """Columns of tokens a second of whole models, with the phase of a step and its tokens."""
    named = (re.fullmatch(r"(decode|prefill)_(\d+)_tokens_per_s", name) for name in table.columns)
    return {found[0]: (found[1], int(found[2])) for found in named if found}


def prediction_errors(table: pd.DataFrame) -> dict[int, list[float]]:
    """Tokens -> relative errors of the predicted times of expert GEMMs, one per checkpoint that was timed."""
    errors = {}
    for column, tokens in time_columns(table).items():
        measured = f"measured_gemms_us_{tokens}_tokens"
        if measured in table:
            timed = table.dropna(subset=[measured])
            errors[tokens] = (timed[column] / timed[measured] - 1).tolist()
    return errors


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
