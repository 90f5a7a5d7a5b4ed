"""The summary as a table for a terminal: what a run prints when it is done. Stdlib only."""

import csv
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

_MOST_ROWS = 24
_TIMES = 2  # columns of measured tokens a second, or else of predicted times: of the fewest and of the most tokens


def terminal_table(summary: Path, report: Path) -> str:
    """``summary.csv`` in lines of at most about 110 characters; of a large sweep the best row of each kind and budget.

    The last line says where the rest is.
    """
    with summary.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    shown = rows if len(rows) <= _MOST_ROWS else _best(rows)[:_MOST_ROWS]
    columns = _columns(rows[0])
    cells = [list(columns), *([_shown(row[name]) for name in columns.values()] for row in shown)]
    names = ["", *map(row_name, shown)]
    width = max(map(len, names))
    widths = [max(len(line[at]) for line in cells) for at in range(len(columns))]
    lines = [
        f"{name:<{width}}  " + "  ".join(f"{cell:>{wide}}" for cell, wide in zip(line, widths, strict=True))
        for name, line in zip(names, cells, strict=True)
    ]
    guessed = [row for row in shown if row.get("tasks_at_chance")]
    lines += [f"at chance level: {row_name(row)}: {row['tasks_at_chance']}" for row in guessed]
    more = f"{len(rows) - len(shown)} more in " if len(shown) < len(rows) else ""
    return "\n".join([*lines, f"{more}{summary}, figures in {report}"])


def _columns(row: Mapping[str, str]) -> dict[str, str]:
    """Head -> column of the table."""
    rates = [name for name in row if name.endswith("_tokens_per_s")]
    times = rates or [name for name in row if "_layer_us_" in name]
    some = times if len(times) <= _TIMES else [times[0], times[-1]]
    heads = {_time_head(name): name for name in some}
    scores = {"tasks, mean": "tasks_mean"} if "tasks_mean" in row else {}
    return {"bits": "bits", "MB": "size_mb", "KL": "kl", "perplexity": "perplexity"} | scores | heads


def _time_head(name: str) -> str:
    parts = name.split("_")
    return f"tok/s, {parts[0]} {parts[1]}" if name.endswith("_per_s") else f"us, {parts[3]} tok"


def row_name(row: Any) -> str:
    """What a row of the summary is, for people."""
    if row["kind"].startswith("ours"):
        return f"{row['kind']}, per {row['granularity']}, {row['goal']}, {row['tokens']} tokens"
    return f"{row['kind']}, {row['scheme']}"


def _shown(text: str) -> str:
    """Four digits."""
    if not text:
        return ""
    number = float(text)
    if number == 0 or not math.isfinite(number):
        return text
    return f"{number:.{max(0, 3 - math.floor(math.log10(abs(number))))}f}"


def _best(rows: Sequence[Mapping[str, str]]) -> list[Mapping[str, str]]:
    """Of each budget and kind the row that diverges least from the original, in the order of the table."""
    best: dict[tuple[str, str], Mapping[str, str]] = {}
    for row in rows:
        key = (row["budget_bits"], row["kind"])
        if key not in best or float(row["kl"]) < float(best[key]["kl"]):
            best[key] = row
    return list(best.values())
