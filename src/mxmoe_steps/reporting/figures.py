"""The figures of the report. Each function draws one and returns it as SVG text, the same every time."""

import io
from collections.abc import Sequence
from typing import Any, Literal

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.colors import ListedColormap, LogNorm
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from mxmoe_steps.reporting.summary import TUNED_KIND, time_columns
from mxmoe_steps.schemes import BLOCKS, SHARED, parse_scheme

mpl.rcParams.update({"svg.hashsalt": "mxmoe", "svg.fonttype": "none", "font.size": 9, "axes.spines.top": False})
mpl.rcParams.update({"axes.spines.right": False, "figure.constrained_layout.use": True, "legend.frameon": False})

Frontier = tuple[dict[str, Any], list[Any]]  # facts and parts, as allocation.files.read_frontier gives them

STYLE = {  # kind or granularity -> colour, marker
    "uniform rtn": ("#9e9e9e", "s"),
    "uniform gptq": ("#424242", "o"),
    "uniform rtn+hadamard": ("#8fa8bf", "D"),
    "uniform gptq+hadamard": ("#2c4a66", "P"),
    "layer": ("#e6a23c", "v"),
    "expert": ("#4c9f70", "^"),
    "block": ("#c0392b", "*"),
}
_MAPS, _PANELS, _CURVES = 12, 4, 12  # of allocations, of token counts, and of frontiers in a panel, as can be read
_LINES = {"block": "-", "expert": "--", "layer": "-."}
_BITS_COLOURS = {1: "#8e1b3d", 2: "#d1495b", 3: "#edae49", 4: "#66a182", 6: "#3f8f9b", 8: "#2e6f95", 16: "#13293d"}


def spread(items: Sequence[Any], most: int) -> list[Any]:
    """At most ``most`` of the items, in order, evenly spread from the first to the last."""
    if len(items) <= most:
        return list(items)
    return [items[number * (len(items) - 1) // (most - 1)] for number in range(most)]


def to_svg(figure: Figure) -> str:
    """SVG text without dates, so that equal data gives equal bytes."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :]


def quality(table: pd.DataFrame) -> str:
    """KL divergence and perplexity over true bits, for uniform baselines and our granularities.

    Where there are uniform weights to compare with, also our KL divergence over theirs, of all text and of the worst.
    """
    compared = table["worst_over_uniform"].notna().any() if "worst_over_uniform" in table else False
    figure = Figure(figsize=(13.0 if compared else 9.5, 3.6))
    left, right, *beside = figure.subplots(1, 3 if compared else 2)
    for name, series in _series(table):
        colour, marker, fill = _style(name)
        series = series.sort_values("bits")
        line = "--" if name.startswith("uniform") else "-"
        for axis, metric in ((left, "kl"), (right, "perplexity")):
            size = 9 if marker == "*" else 6
            label = name if name.startswith("uniform") else f"ours, per {name}"
            look = {"color": colour, "marker": marker, "ms": size, "fillstyle": fill, "lw": 1}
            axis.plot(series["bits"], series[metric], line, label=label, **look)
    original = table.loc[table["kind"] == "original", "perplexity"].iloc[0]
    right.axhline(original, color="#2e6f95", lw=0.8, ls=":", label="original")
    left.set(ylabel="KL from the original, nats per token", xlabel="bits per expert weight")
    right.set(ylabel="perplexity", xlabel="bits per expert weight")
    _plain_log(left)
    _plain_log(right)
    right.legend(fontsize=8)
    if compared:
        _beside_uniform(beside[0], table)
    return to_svg(figure)


def _beside_uniform(axis: Any, table: pd.DataFrame) -> None:
    """Our KL divergence over that of uniform weights: the mean of all texts, and the text that fares worst."""
    for name, series in _series(table[table["kind"] == "ours"]):
        colour, marker = STYLE[name]
        series = series.sort_values("bits")
        for column, fill, line in (("worst_over_uniform", "full", "-"), ("kl_over_uniform", "none", ":")):
            axis.plot(series["bits"], series[column], line, color=colour, marker=marker, fillstyle=fill, ms=6, lw=1)
    axis.axhline(1, color="#424242", lw=0.8, ls="--")
    axis.set(ylabel="KL over that of uniform weights", xlabel="bits per expert weight", ylim=(0, None))
    axis.plot([], [], "-", color="#424242", marker="o", ms=5, lw=1, label="worst text")
    axis.plot([], [], ":", color="#424242", marker="o", ms=5, lw=1, fillstyle="none", label="all texts")
    axis.legend(fontsize=8)


def _series(table: pd.DataFrame) -> list[tuple[str, pd.DataFrame]]:
    """(name, rows): uniform kinds, and ours by granularity, those that are tuned apart."""
    tuned = table["kind"].str.endswith(TUNED_KIND).map({True: TUNED_KIND, False: ""})
    names = table["kind"].where(~table["kind"].str.startswith("ours"), table["granularity"] + tuned)
    known = [name + tuned for name in STYLE for tuned in ("", TUNED_KIND)]
    return [(name, table[names == name]) for name in known if (names == name).any()]


def _style(name: str) -> tuple[str, str, Literal["full", "none"]]:
    """Colour, marker and its filling: those of tuned checkpoints are hollow."""
    colour, marker = STYLE[name.removesuffix(TUNED_KIND)]
    return colour, marker, "none" if name.endswith(TUNED_KIND) else "full"


def speed(table: pd.DataFrame, estimate: bool) -> str:
    """KL divergence over the predicted time of an MoE layer, a panel per token count, or per some of many."""
    columns = dict(spread(list(time_columns(table).items()), _PANELS))
    figure = Figure(figsize=(max(4.8 * len(columns), 5), 3.4))
    axes = figure.subplots(1, len(columns), squeeze=False)[0]
    original = table[table["kind"] == "original"].iloc[0]
    for axis, (column, tokens) in zip(axes, columns.items(), strict=True):
        for name, series in _series(table):
            colour, marker, fill = _style(name)
            size = 80 if marker == "*" else 30
            label = name if name.startswith("uniform") else f"ours, per {name}"
            look = {"edgecolors": colour, "facecolors": colour if fill == "full" else "none", "marker": marker}
            axis.scatter(series[column], series["kl"], s=size, label=label, **look)
        axis.axvline(original[column], color="#2e6f95", lw=0.8, ls=":", label="original (16 bits)")
        label = "estimated" if estimate else "predicted"
        axis.set(title=f"{tokens} tokens in a step", xlabel=f"{label} time of a layer, µs")
        _plain_log(axis)
    axes[0].set_ylabel("KL from the original, nats per token")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right center", fontsize=8)
    return to_svg(figure)


def _plain_log(axis: Any) -> None:
    """A logarithmic y axis with plain numbers."""
    axis.set_yscale("log")
    axis.yaxis.set_major_locator(mpl.ticker.LogLocator(subs=(1, 2, 5)))
    axis.yaxis.set_major_formatter(mpl.ticker.FormatStrFormatter("%g"))
    axis.yaxis.set_minor_formatter(mpl.ticker.NullFormatter())


def times(tiles: pd.DataFrame, facts: dict[str, Any]) -> str:
    """Rate of the tiles of every scheme; predicted over measured times of held-out launches, where there are any."""
    held_out = facts.get("held_out")
    figure = Figure(figsize=(9.5, 3.6))
    left, right = figure.subplots(1, 2)
    left.set_prop_cycle(color=mpl.colormaps["tab20"](range(20)))  # more schemes than the usual ten colours
    prefill = tiles[tiles["phase"] == "prefill"]
    for scheme, cells in prefill.groupby("scheme"):
        operations = 2 * 128 * 128 * cells["tile_tokens"] * facts["sms"]
        left.plot(cells["tile_tokens"], operations / cells["kstep_us"] / 1e6, "o-", ms=3, lw=1, label=scheme)
    label = "estimated" if facts["estimate"] else "measured"
    left.set(xlabel="tokens of a tile", ylabel=f"{label} TFLOP/s", xscale="log", yscale="log")
    left.set_xticks([16, 32, 64, 128, 256], ["16", "32", "64", "128", "256"])
    left.xaxis.minorticks_off()
    left.yaxis.set_major_formatter(mpl.ticker.FormatStrFormatter("%g"))
    left.legend(fontsize=6)
    if held_out is None:
        right.set_axis_off()
        right.text(0.5, 0.5, "no launches were measured on this GPU", ha="center")
        return to_svg(figure)
    measured, predicted = np.array(held_out["measured_us"]), np.array(held_out["predicted_us"])
    mixed = np.array(held_out["mixed"], bool)
    for of, name, colour in ((~mixed, "one scheme", "#2e6f95"), (mixed, "mixed schemes", "#c0392b")):
        right.scatter(measured[of], (predicted / measured)[of], s=8, color=colour, label=name, alpha=0.7, lw=0)
    for level, line in ((0.8, ":"), (1.0, "-"), (1.2, ":")):
        right.axhline(level, color="#424242", lw=0.8, ls=line)
    right.set(xscale="log", xlabel="measured time of a launch, µs", ylabel="predicted / measured")
    right.legend(fontsize=8)
    return to_svg(figure)


def traffic(table: pd.DataFrame) -> str:
    """Share of tokens per layer and expert, one panel per text; 1 is an even split."""
    texts = list(dict.fromkeys(table["text"]))
    figure = Figure(figsize=(min(2.6 * len(texts) + 0.8, 14), 2.4))
    axes = figure.subplots(1, len(texts), squeeze=False, sharey=True)[0]
    image: Any = None
    for axis, text in zip(axes, texts, strict=True):
        share = table[table["text"] == text].pivot(index="layer", columns="expert", values="share")
        values = np.clip(share.to_numpy() * share.shape[1], 1 / 16, 16)
        image = axis.imshow(values, aspect="auto", cmap="RdBu_r", norm=LogNorm(1 / 8, 8), interpolation="nearest")
        axis.set(title=text, xlabel="expert")
        axis.set_yticks(range(len(share)), share.index)
    axes[0].set_ylabel("layer")
    bar = figure.colorbar(image, ax=axes, ticks=[1 / 8, 1 / 4, 1 / 2, 1, 2, 4, 8], format="%g", shrink=0.9)
    bar.minorticks_off()  # their labels would lie over the others
    bar.set_label("tokens / even share")
    return to_svg(figure)


def sensitivity(losses: dict[str, pd.DataFrame], metric: str) -> str:
    """Loss of each block under each scheme: rows are schemes, columns gate, up and down."""
    schemes = sorted(losses, key=lambda name: parse_scheme(name))
    figure = Figure(figsize=(10, 1.25 * len(schemes) + 0.9))
    axes = figure.subplots(len(schemes), 3, squeeze=False, sharex=True, sharey=True)
    values = np.concatenate([table[metric].to_numpy() for table in losses.values()])
    positive = values[values > 0]
    norm = LogNorm(np.quantile(positive, 0.01), positive.max())
    image: Any = None
    for row, scheme in enumerate(schemes):
        for column, block in enumerate(BLOCKS):
            table = losses[scheme]
            grid = table[table["block"] == block].pivot(index="layer", columns="expert", values=metric)
            floor = np.clip(grid.to_numpy(), norm.vmin, None)
            image = axes[row, column].imshow(floor, aspect="auto", norm=norm, cmap="magma", interpolation="nearest")
            axes[row, column].set_yticks(range(len(grid)), grid.index)
            _expert_ticks(axes[row, column], [int(expert) for expert in grid.columns])
            if row == 0:
                axes[row, column].set_title(block)
        axes[row, 0].set_ylabel(scheme.replace("_", "\n", 1), fontsize=7)
    for axis in axes[-1]:
        axis.set_xlabel("expert")
    known = {"fisher": "estimated KL, nats per token", "out_sq": "squared change of the layer output"}
    figure.colorbar(image, ax=axes, shrink=0.6).set_label(known.get(metric, metric))
    return to_svg(figure)


def frontiers(fronts: Sequence[Frontier], allocations: Sequence[dict[str, Any]], estimate: bool) -> str:
    """Predicted loss over predicted time: a hull per frontier, its allocations as markers, a panel per token count.

    Of many frontiers or token counts, some.
    """
    tokens = spread(sorted({facts["tokens"] for facts, _ in fronts}), _PANELS)
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
        _plain_log(axis)
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


def allocation(allocations: Sequence[dict[str, Any]]) -> str:
    """The chosen scheme of every block; a row of panels per allocation, or per some of many; columns gate, up, down."""
    allocations = spread(allocations, _MAPS)
    schemes = sorted({name for one in allocations for row in one["assignment"] for name in row[2:]}, key=parse_scheme)
    colours, seen = [], dict.fromkeys(_BITS_COLOURS, 0)
    for name in schemes:  # one hue per width, lighter for a second scheme of the same width
        bits = parse_scheme(name).weight_bits
        base = np.array(mpl.colors.to_rgb(_BITS_COLOURS[bits]))
        colours.append(tuple(base + (1 - base) * 0.45 * seen[bits]))
        seen[bits] += 1
    figure = Figure(figsize=(10, 1.25 * len(allocations) + 1.1))
    axes = figure.subplots(len(allocations), 3, squeeze=False, sharex=True, sharey=True)
    for row, one in enumerate(allocations):
        table = pd.DataFrame(one["assignment"], columns=["layer", "expert", *BLOCKS])
        for column, block in enumerate(BLOCKS):
            codes = table.assign(code=table[block].map(schemes.index))
            grid = codes.pivot(index="layer", columns="expert", values="code")
            axes[row, column].imshow(
                grid.to_numpy(),
                aspect="auto",
                cmap=ListedColormap(colours),
                vmin=-0.5,
                vmax=len(schemes) - 0.5,
                interpolation="nearest",
            )
            axes[row, column].set_yticks(range(len(grid)), grid.index)
            _expert_ticks(axes[row, column], [int(expert) for expert in grid.columns])
            if row == 0:
                axes[row, column].set_title(block)
        axes[row, 0].set_ylabel(f"{one['budget_bits']:g} bits\n{one['tokens']} tokens", fontsize=8)
    for axis in axes[-1]:
        axis.set_xlabel("expert")
    handles = [Patch(color=colour, label=name) for colour, name in zip(colours, schemes, strict=True)]
    figure.legend(handles=handles, loc="outside lower center", ncols=min(len(schemes), 4), fontsize=8)
    return to_svg(figure)


def _expert_ticks(axis: Any, experts: list[int]) -> None:
    """A few expert numbers; the shared expert is called S."""
    step = max(1, len(experts) // 8)
    positions = [place for place, expert in enumerate(experts) if expert == SHARED or expert % step == 0]
    axis.set_xticks(positions, ["S" if experts[place] == SHARED else str(experts[place]) for place in positions])
