"""Figures of the GPU: rates of its kernels, how well launches are predicted, the roofline of a layer."""

from collections.abc import Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from mxmoe_steps.reporting.figures.style import BITS_COLOURS, INK, ORIGINAL_COLOUR, plain_log, to_svg
from mxmoe_steps.schemes import SHARED, parse_scheme


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
    for of, name, colour in ((~mixed, "one scheme", ORIGINAL_COLOUR), (mixed, "mixed schemes", "#c0392b")):
        right.scatter(measured[of], (predicted / measured)[of], s=8, color=colour, label=name, alpha=0.7, lw=0)
    for level, line in ((0.8, ":"), (1.0, "-"), (1.2, ":")):
        right.axhline(level, color=INK, lw=0.8, ls=line)
    right.set(xscale="log", xlabel="measured time of a launch, µs", ylabel="predicted / measured")
    right.legend(fontsize=8)
    return to_svg(figure)


def roofline(layers: Sequence[dict[str, Any]], estimate: bool) -> str:
    """Predicted rate of every expert over its operations a byte, below the roofs of memory and tensor cores.

    Large markers are the shared expert's, hollow ones fp8's.
    ``layers``: what `timing.roofline.layer_roofline` gives, a panel each.
    """
    figure = Figure(figsize=(max(5.2 * len(layers), 5), 3.8))
    axes = figure.subplots(1, len(layers), squeeze=False, sharex=True, sharey=True)[0]
    reach = [point["intensity"] for layer in layers for point in layer["experts"]]
    reach += [1e3 * peak / layer["bandwidth_gbs"] for layer in layers for peak in layer["peaks_tflops"].values()]
    for axis, layer in zip(axes, layers, strict=True):
        x = np.geomspace(min(reach) / 2, 2 * max(reach), 200)
        for name, peak in layer["peaks_tflops"].items():
            roof = np.minimum(x * layer["bandwidth_gbs"] / 1e3, peak)
            axis.plot(x, roof, color=INK, lw=0.8, ls="-" if name == "bf16" else "--", label=f"{name} roof")
        for point in layer["experts"]:
            scheme = parse_scheme(point["scheme"])
            label = f"{point['launch']}, {scheme}"
            look = {"color": BITS_COLOURS[scheme.weight_bits], "marker": "v" if point["launch"] == "down" else "o"}
            size = 10 if point["expert"] == SHARED else 5
            fill = "none" if scheme.fp8 else "full"
            axis.plot(point["intensity"], point["tflops"], ls="", label=label, ms=size, fillstyle=fill, **look)
        axis.set(title=f"{layer['tokens']} tokens in a step", xlabel="operations a byte")
        plain_log(axis, "both")
    axes[0].set_ylabel(f"{'estimated' if estimate else 'predicted'} TFLOP/s")
    handles: dict[str, Any] = {}
    for axis in axes:
        handles |= dict(zip(*reversed(axis.get_legend_handles_labels()), strict=True))
    figure.legend(handles.values(), handles.keys(), loc="outside right center", fontsize=8)
    return to_svg(figure)
