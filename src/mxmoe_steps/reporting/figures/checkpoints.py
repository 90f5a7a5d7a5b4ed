"""Figures of evaluated checkpoints: quality over size and over time, predicted and measured loss."""

from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from mxmoe_steps.reporting.figures.style import (
    INK,
    ORIGINAL_COLOUR,
    PANELS,
    label_of,
    loss_name,
    plain_log,
    series_of,
    spread,
    style,
    to_svg,
)
from mxmoe_steps.reporting.summary import time_columns


def quality(table: pd.DataFrame) -> str:
    """KL divergence and perplexity over true bits, for uniform baselines and our granularities.

    Where there are uniform weights to compare with, also our KL divergence over theirs, of all text and of the worst.
    """
    compared = table["worst_over_uniform"].notna().any() if "worst_over_uniform" in table else False
    figure = Figure(figsize=(13.0 if compared else 9.5, 3.6))
    left, right, *beside = figure.subplots(1, 3 if compared else 2)
    for name, series in series_of(table):
        colour, marker, fill = style(name)
        series = series.sort_values("bits")
        line = "--" if name.startswith("uniform") else "-"
        for axis, metric in ((left, "kl"), (right, "perplexity")):
            size = 9 if marker == "*" else 6
            look = {"color": colour, "marker": marker, "ms": size, "fillstyle": fill, "lw": 1}
            axis.plot(series["bits"], series[metric], line, label=label_of(name), **look)
    original = table.loc[table["kind"] == "original", "perplexity"].iloc[0]
    right.axhline(original, color=ORIGINAL_COLOUR, lw=0.8, ls=":", label="original")
    left.set(ylabel="KL from the original, nats per token", xlabel="bits per expert weight")
    right.set(ylabel="perplexity", xlabel="bits per expert weight")
    plain_log(left)
    plain_log(right)
    right.legend(fontsize=8)
    if compared:
        _beside_uniform(beside[0], table)
    return to_svg(figure)


def _beside_uniform(axis: Any, table: pd.DataFrame) -> None:
    """Our KL divergence over that of uniform weights: the mean of all texts, and the text that fares worst."""
    for name, series in series_of(table[table["kind"].str.startswith("ours")]):
        colour, marker, _ = style(name)
        series = series.sort_values("bits")
        for column, fill, line in (("worst_over_uniform", "full", "-"), ("kl_over_uniform", "none", ":")):
            axis.plot(series["bits"], series[column], line, color=colour, marker=marker, fillstyle=fill, ms=6, lw=1)
    axis.axhline(1, color=INK, lw=0.8, ls="--")
    axis.set(ylabel="KL over that of uniform weights", xlabel="bits per expert weight", ylim=(0, None))
    axis.plot([], [], "-", color=INK, marker="o", ms=5, lw=1, label="worst text")
    axis.plot([], [], ":", color=INK, marker="o", ms=5, lw=1, fillstyle="none", label="all texts")
    axis.legend(fontsize=8)


def speed(table: pd.DataFrame, estimate: bool) -> str:
    """KL divergence over the time of an MoE layer's expert GEMMs, a panel per token count, or per some of many.

    Predicted times are above; where layers were measured, those are below.
    """
    columns = dict(spread(list(time_columns(table).items()), PANELS))
    measured = [f"measured_gemms_us_{tokens}_tokens" for tokens in columns.values()]
    rows = {"estimated" if estimate else "predicted": list(columns)}
    rows |= {"measured": measured} if set(measured) <= set(table.columns) else {}
    figure = Figure(figsize=(max(4.8 * len(columns), 5), 3.4 * len(rows)))
    axes = figure.subplots(len(rows), len(columns), squeeze=False)
    original = table[table["kind"] == "original"].iloc[0]
    for line, (label, names) in zip(axes, rows.items(), strict=True):
        for axis, column, tokens in zip(line, names, columns.values(), strict=True):
            for name, series in series_of(table):
                colour, marker, fill = style(name)
                look = {"edgecolors": colour, "facecolors": colour if fill == "full" else "none", "marker": marker}
                axis.scatter(series[column], series["kl"], s=80 if marker == "*" else 30, label=label_of(name), **look)
            axis.axvline(original[column], color=ORIGINAL_COLOUR, lw=0.8, ls=":", label="original (16 bits)")
            axis.set(title=f"{tokens} tokens in a step", xlabel=f"{label} time of a layer, µs")
            plain_log(axis)
        line[0].set_ylabel("KL from the original, nats per token")
    figure.legend(*axes[0][0].get_legend_handles_labels(), loc="outside right center", fontsize=8)
    return to_svg(figure)


def losses(table: pd.DataFrame, metric: str) -> str:
    """KL divergence over the predicted loss of the same allocation, on text that the prediction did not see."""
    figure = Figure(figsize=(5.6, 3.8))
    axis = figure.subplots()
    found = table.dropna(subset=["predicted_loss"])
    for name, series in series_of(found):
        colour, marker, fill = style(name)
        size = 9 if marker == "*" else 6
        x, y, label = series["predicted_loss"], series["kl"], label_of(name)
        axis.plot(x, y, ls="", ms=size, fillstyle=fill, color=colour, marker=marker, label=label)
    if metric == "fisher":
        ends = [found[["predicted_loss", "kl"]].min().min(), found[["predicted_loss", "kl"]].max().max()]
        axis.plot(ends, ends, color=INK, lw=0.8, ls=":", label="as predicted")
    axis.set(xlabel=f"predicted: {loss_name(metric)}", ylabel="measured KL, nats per token")
    plain_log(axis, "both")
    figure.legend(loc="outside right center", fontsize=8)
    return to_svg(figure)
