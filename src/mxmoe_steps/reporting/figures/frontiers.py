"""Figures of loss against time: the model's frontiers, and those at the size of a larger model."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from mxmoe_steps.reporting.extrapolated import short
from mxmoe_steps.reporting.figures.style import PANELS, loss_name, plain_log, spread, to_svg

Frontier = tuple[dict[str, Any], list[Any]]  # facts and parts, as allocation.files.read_frontier gives them

_CURVES = 12  # in a panel, as can be read
_LINES = {"block": "-", "expert": "--", "layer": "-."}


def frontiers(fronts: Sequence[Frontier], allocations: Sequence[dict[str, Any]], estimate: bool) -> str:
    """Predicted loss over predicted time: a hull per frontier, its allocations as markers, a panel per token count.

    Of many frontiers or token counts, some.
    """
    tokens = spread(sorted({facts["tokens"] for facts, _ in fronts}), PANELS)
    curves = spread(sorted({_curve(facts) for facts, _ in fronts}), _CURVES)
    figure = Figure(figsize=(max(4.8 * len(tokens), 5), 3.6))
    axes = figure.subplots(1, len(tokens), squeeze=False)[0]
    budgets = sorted({budget for budget, _ in curves})
    for axis, count in zip(axes, tokens, strict=True):
        for facts, parts in fronts:
            if facts["tokens"] != count or _curve(facts) not in curves:
                continue
            power = 0.5 if facts["loss"] == "root_sum_squares" else 1.0
            times, losses = model_hull(parts)
            colour, line = f"C{budgets.index(facts['budget_bits'])}", _LINES.get(facts["granularity"], ":")
            label = f"{facts['budget_bits']:g} bits, per {facts['granularity']}"
            axis.plot(times, losses**power, line, color=colour, lw=1, label=label)
            key = ("tokens", "budget_bits", "granularity", "quantizer")
            own = [one for one in allocations if all(one[name] == facts[name] for name in key)]
            axis.plot([one["time_us"] for one in own], [one["loss"] for one in own], "o", color=colour, ms=5)
        label = "estimated" if estimate else "predicted"
        axis.set(title=f"{count} tokens in a step", xlabel=f"{label} time of all expert layers, µs")
        axis.locator_params(axis="x", nbins=6)
        plain_log(axis)
    axes[0].set_ylabel("predicted loss")
    handles: dict[str, Any] = {}
    for axis in axes:
        handles |= dict(zip(*reversed(axis.get_legend_handles_labels()), strict=True))
    figure.legend(handles.values(), handles.keys(), loc="outside right center", fontsize=8)
    return to_svg(figure)


def _curve(facts: dict[str, Any]) -> tuple[float, str]:
    """What a frontier is called in a panel."""
    return facts["budget_bits"], facts["granularity"]


def model_hull(parts: Sequence[Any]) -> tuple[np.ndarray, np.ndarray]:
    """Times and loss sums of the whole model's hull from the hulls of its parts, fastest first.

    The parts choose independently, so the hull is their Minkowski sum: all edges in order of slope.
    """
    start, edges = np.zeros(2), []
    for part in parts:
        corners = np.array(sorted((vertex.time_us, vertex.loss_sum) for vertex in part.vertices))
        start = start + corners[0]
        edges += [edge for edge in np.diff(corners, axis=0) if edge[0] > 0]
    edges.sort(key=lambda edge: edge[1] / edge[0])
    times, losses = np.cumsum([start, *edges], axis=0).T
    return times, losses


def extrapolated(content: dict[str, Any]) -> str:
    """Loss over the time of a larger model's layer: uniform schemes, and a hull per budget with its picked vertex.

    ``content``: what `extrapolate` wrote; a panel per number of tokens in a step, or per some of many.
    """
    cases = spread(content["cases"], PANELS)
    figure = Figure(figsize=(max(5.2 * len(cases), 5), 4.0))
    axes = figure.subplots(1, len(cases), squeeze=False, sharey=True)[0]
    for axis, case in zip(axes, cases, strict=True):
        for place, one in enumerate(sorted(case["uniform"], key=lambda one: one["loss"])):
            axis.plot(one["time_us"], one["loss"], "s", color="#8a8a8a", ms=5)
            axis.annotate(
                short(one["scheme"]),
                (one["time_us"], one["loss"]),
                (5, -8 if place % 2 else 3),
                textcoords="offset points",
                fontsize=7,
            )
        axis.plot([], [], "s", color="#8a8a8a", ms=5, label="uniform schemes")
        for number, frontier in enumerate(case["frontiers"]):
            vertices, picked = frontier["vertices"], frontier["vertices"][frontier["picked"]]
            look = {"color": f"C{number + 1}", "label": f"ours, at most {frontier['budget_bits']:g} bits"}
            axis.plot([one["time_us"] for one in vertices], [one["loss"] for one in vertices], ".-", ms=3, lw=1, **look)
            axis.plot(picked["time_us"], picked["loss"], "*", color=f"C{number + 1}", ms=11)
        label = "estimated" if content["time_is_estimate"] else "predicted"
        title = f"{case['tokens']} tokens in a step; original: {case['original_us']:.0f} µs"
        axis.set(title=title, xlabel=f"{label} time of a layer, µs")
        axis.margins(x=0.15)
        plain_log(axis)
    axes[0].set_ylabel(f"{loss_name(content['metric'])}\n(the small model's, on larger layers)")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=8)
    return to_svg(figure)
