"""Scores on tasks in the report: columns of the summary, a table and a figure."""

import math
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from mxmoe_steps.errors import UserError
from mxmoe_steps.harness.scores import is_chance, read_scores
from mxmoe_steps.reporting.figures.style import INK, ORIGINAL_COLOUR, label_of, series_of, spread, style, to_svg
from mxmoe_steps.reporting.terminal import row_name

Scores = Mapping[str, Mapping[str, Any]]  # task -> checkpoint -> what `tasks` wrote

ACCURACIES = ("acc_norm", "acc", "exact_match")  # the first of these that a task has is what is averaged and drawn
_PANELS = 12  # of a figure, as can be read
_ASKED = ("questions", "few_shot", "limit", "version")


def read_task_scores(files: Sequence[Path], table: pd.DataFrame, model: str) -> Scores:
    """``CHECKPOINT/TASK.json`` of every file; `UserError` unless all checkpoints of ``table`` were asked the same."""
    scores: dict[str, dict[str, Any]] = {}
    for path in files:
        record = read_scores(path)
        if record["model"] != model:
            raise UserError(f"{path} and the allocations are of different models; run tasks again for this one")
        of_task = scores.setdefault(record["task"], {})
        of_task[path.parent.name] = record
        other, first = next(iter(of_task.items()))
        if any(record[key] != first[key] for key in _ASKED):
            raise UserError(f"{path}: {path.parent.name} was asked otherwise than {other}; run tasks again for both")
    for task, of_task in scores.items():
        if missing := set(table["checkpoint"]) - set(of_task):
            raise UserError(f"--tasks holds no score of {min(missing)} on {task}; run tasks for it")
    return dict(sorted(scores.items()))


def main_score(record: Mapping[str, Any]) -> Mapping[str, Any]:
    """The accuracy of a task, or the first score of one that has none."""
    by_metric = {score["metric"]: score for score in reversed(record["scores"])}
    found: Mapping[str, Any] = next((by_metric[name] for name in ACCURACIES if name in by_metric), record["scores"][0])
    return found


def mean_score(records: Sequence[Mapping[str, Any]]) -> tuple[float, float | None]:
    """Mean accuracy over tasks and its standard error, each task counting alike; NaN where no task has one."""
    accuracies = [score for score in map(main_score, records) if score["metric"] in ACCURACIES]
    if not accuracies:
        return math.nan, None
    errors = [score["stderr"] for score in accuracies]
    error = None if None in errors else math.sqrt(math.fsum(one**2 for one in errors)) / len(errors)
    return math.fsum(score["value"] for score in accuracies) / len(accuracies), error


def score_columns(scores: Scores, checkpoint: str) -> dict[str, Any]:
    """Columns of the summary: the mean accuracy, tasks that guessing does as well, and every metric of every task."""
    records = {task: of_task[checkpoint] for task, of_task in scores.items()}
    mean, error = mean_score(list(records.values()))
    guessed = [task for task, record in records.items() if is_chance(main_score(record))]
    columns = {"tasks_mean": mean, "tasks_mean_stderr": error, "tasks_at_chance": ", ".join(guessed)}
    for task, record in records.items():
        for score in record["scores"]:
            name = f"task_{task}_{score['metric']}" + (f"_{score['filter']}" if score["filter"] != "none" else "")
            columns |= {name: score["value"], f"{name}_stderr": score["stderr"]}
            if score["chance"] is not None:
                columns[f"{name}_chance"] = score["chance"]
    return columns


def with_scores(table: pd.DataFrame, scores: Scores) -> pd.DataFrame:
    """The summary with `score_columns`."""
    if not scores:
        return table
    columns = pd.DataFrame([score_columns(scores, name) for name in table["checkpoint"]])
    return pd.concat([table, columns], axis="columns")


def task_lines(table: pd.DataFrame, scores: Scores) -> list[str]:
    """One line per budget: the mean accuracy of our checkpoint of least KL divergence, and of the uniform ones."""
    if not scores or table["tasks_mean"].isna().any():
        return []
    original = table[table["kind"] == "original"].iloc[0]
    lines = []
    for budget, within in table.groupby("budget_bits"):
        is_ours = within["kind"].str.startswith("ours")
        if is_ours.any():
            best = within[is_ours].sort_values("kl").iloc[0]
            uniform = [f"{row['kind']} {_accuracy(row)}" for _, row in within[~is_ours].iterrows()]
            lines.append(
                f"{budget:g} bits: mean accuracy on {', '.join(scores)}: {_accuracy(best)} with one scheme per"
                f" {best['granularity']}; {', '.join([*uniform, f'original {_accuracy(original)}'])}"
            )
    if original["tasks_at_chance"]:
        lines.append(f"At chance level, the original too, so of no meaning: {original['tasks_at_chance']}.")
    return lines


def _accuracy(row: Any) -> str:
    error = row["tasks_mean_stderr"]
    return f"{row['tasks_mean']:.3f}" + ("" if pd.isna(error) else f" ± {error:.3f}")


def tasks_html(table: pd.DataFrame, scores: Scores) -> str:
    """Every metric of every task, its standard error, and what guessing would score."""
    shown = [(task, score) for task, of_task in scores.items() for score in of_task["original"]["scores"]]
    heads = ["checkpoint", "bits", *(_head(task, scores[task]["original"], score) for task, score in shown)]
    rows = ["<tr>" + "".join(f"<th>{head}</th>" for head in heads) + "</tr>"]
    guessing = ["" if score["chance"] is None else f"{score['chance']:.3f}" for _, score in shown]
    rows.append("<tr>" + "".join(f"<td>{cell}</td>" for cell in ["guessing", "", *guessing]) + "</tr>")
    for _, row in table.iterrows():
        cells = [escape(row_name(row)), f"{row['bits']:.3f}"]
        for of_task in scores.values():
            cells += map(_cell, of_task[row["checkpoint"]]["scores"])
        kind = row["kind"].split()[0]
        rows.append(f'<tr class="{kind}">' + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>")
    return f'<div class="scroll"><table>{"".join(rows)}</table></div>'


def _head(task: str, record: Mapping[str, Any], score: Mapping[str, Any]) -> str:
    metric = score["metric"] if score["filter"] == "none" else f"{score['metric']}, {score['filter']}"
    shots = "" if record["few_shot"] is None else f", {record['few_shot']}-shot"
    return f"{escape(task)}<br>{escape(metric)}<br>{record['questions']} questions{shots}"


def _cell(score: Mapping[str, Any]) -> str:
    error = "" if score["stderr"] is None else f" ± {score['stderr']:.3f}"
    return f"{score['value']:.3f}{error}" + (" (chance level)" if is_chance(score) else "")


def tasks_figure(table: pd.DataFrame, scores: Scores) -> str:
    """Accuracy over true bits with standard errors, a panel per task, or per some of many; dotted: guessing."""
    panels = spread(list(scores), _PANELS)
    across = min(4, len(panels))
    figure = Figure(figsize=(max(3.4 * across, 5.5), 3.0 * -(-len(panels) // across)))
    axes = figure.subplots(-(-len(panels) // across), across, squeeze=False).flatten()
    for axis, task in zip(axes, panels, strict=False):
        found = {name: main_score(record) for name, record in scores[task].items()}
        for name, rows in series_of(table):
            colour, marker, fill = style(name)
            rows = rows.sort_values("bits")
            own = [found[checkpoint] for checkpoint in rows["checkpoint"]]
            look = {"color": colour, "marker": marker, "fillstyle": fill, "ms": 5, "lw": 0.8, "elinewidth": 0.6}
            errors = [score["stderr"] or 0.0 for score in own]
            axis.errorbar(rows["bits"], [score["value"] for score in own], errors, label=label_of(name), **look)
        original = found["original"]
        error = original["stderr"] or 0.0
        axis.axhspan(original["value"] - error, original["value"] + error, color=ORIGINAL_COLOUR, alpha=0.15, lw=0)
        axis.axhline(original["value"], color=ORIGINAL_COLOUR, lw=0.8, label="original")
        if original["chance"] is not None:
            axis.axhline(original["chance"], color=INK, lw=0.8, ls=":", label="guessing")
        note = " (chance level)" if is_chance(original) else ""
        axis.set(title=f"{task}{note}", xlabel="bits per expert weight", ylabel=original["metric"])
    for axis in axes[len(panels) :]:
        axis.set_axis_off()
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right center", fontsize=8)
    return to_svg(figure)
