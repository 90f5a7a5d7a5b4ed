"""What `time` measured, by checkpoint, tokens and stage, and as tables for a terminal."""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

ORIGINAL = "original"  # among the names of checkpoints
WHOLE = "layer"  # among the stages
GEMMS = ("gate_up", "swiglu", "down")  # stages that the time model predicts together

Stages = Mapping[str, Mapping[int, Mapping[str, float]]]  # checkpoint -> tokens -> stage -> microseconds
Rates = dict[str, dict[tuple[str, int], float]]  # checkpoint -> phase of a step, its tokens -> tokens a second


def summary(rows: Sequence[Mapping[str, Any]]) -> dict[str, dict[int, dict[str, float]]]:
    """Checkpoint -> tokens -> stage -> microseconds, the mean over layers and steps of medians over rounds.

    ``rows``: columns of `tables.TIMES`. The original has one stage, the faster implementation of each step.
    """
    cells: dict[tuple[str, int, str], dict[tuple[int, int], float]] = {}
    for row in rows:
        stage = WHOLE if row["checkpoint"] == ORIGINAL else row["stage"]
        place = cells.setdefault((row["checkpoint"], row["tokens"], stage), {})
        at, us = (row["layer"], row["step"]), statistics.median(row["us"])
        place[at] = min(us, place.get(at, us))
    found: dict[str, dict[int, dict[str, float]]] = {}
    for (checkpoint, tokens, stage), values in cells.items():
        mean = statistics.fmean(values.values())
        found.setdefault(checkpoint, {}).setdefault(tokens, {})[stage] = mean
    return found


def gemms_us(stages: Mapping[str, float]) -> float | None:
    """The expert GEMMs and what lies between them; None of the original, which has no stages."""
    return sum(stages.get(stage, 0.0) for stage in GEMMS) if GEMMS[0] in stages else None


def rates(rows: Sequence[Mapping[str, Any]]) -> Rates:
    """Tokens a second of whole models, from medians over rounds. ``rows``: columns of `tables.THROUGHPUT`."""
    found: Rates = {}
    for row in rows:
        rate = 1e3 * row["made"] / statistics.median(row["ms"])
        found.setdefault(row["checkpoint"], {})[row["phase"], row["tokens"]] = rate
    return found


def stage_table(times: Stages, predicted: Mapping[str, Mapping[int, float]]) -> str:
    """Microseconds of every stage, a part for each number of tokens; ``predicted``: checkpoint -> tokens ->
    microseconds of the expert GEMMs, of some or none."""
    parts = []
    for tokens in sorted({tokens for of in times.values() for tokens in of}):
        here = {name: of[tokens] for name, of in times.items() if tokens in of}
        order = sorted(here, key=lambda name: (name != ORIGINAL, here[name][WHOLE]))
        stages = list(dict.fromkeys(stage for name in order for stage in here[name] if stage != WHOLE))
        heads = [*stages, WHOLE, "GEMMs", *(["predicted", "error"] if predicted else [])]
        rows = [[f"{tokens} tokens in a step, us", *heads]]
        for name in order:
            gemms, guess = gemms_us(here[name]), predicted.get(name, {}).get(tokens)
            cells = [_us(here[name].get(stage)) for stage in (*stages, WHOLE)] + [_us(gemms)]
            if predicted:
                off = "" if gemms is None or guess is None else f"{100 * (guess / gemms - 1):+.1f} %"
                cells += [_us(guess), off]
            rows.append([f"{name}, transformers" if name == ORIGINAL else name, *cells])
        parts.append("\n".join(_aligned(rows)))
    return "\n\n".join(parts)


def rate_table(found: Rates) -> str:
    """Tokens a second of whole models."""
    kinds = sorted({kind for of in found.values() for kind in of})
    rows = [["tokens a second, whole model", *(f"{phase} {tokens}" for phase, tokens in kinds)]]
    for name in sorted(found, key=lambda name: (name != ORIGINAL, name)):
        rows.append([name, *("" if kind not in found[name] else f"{found[name][kind]:,.0f}" for kind in kinds)])
    return "\n".join(_aligned(rows))


def _us(value: float | None) -> str:
    return "" if value is None else f"{value:.1f}"


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join([name.ljust(widths[0]), *(cell.rjust(wide) for cell, wide in zip(cells, widths[1:], strict=True))])
        for name, *cells in rows
    ]
