"""What `time` measured, by checkpoint, tokens and stage."""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

ORIGINAL = "original"  # among the names of checkpoints
WHOLE = "layer"  # among the stages


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
