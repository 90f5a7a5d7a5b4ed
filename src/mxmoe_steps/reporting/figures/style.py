"""What the figures share: colours, markers, axes, and how a figure becomes SVG."""

import io
from collections.abc import Sequence
from typing import Any, Literal

import matplotlib as mpl
import pandas as pd
from matplotlib.figure import Figure

from mxmoe_steps.reporting.checkpoints import TUNED_KIND

INK = "#010203"  # becomes the colour of the page's text, which is dark or light
_SETTINGS: dict[Any, Any] = {
    "svg.hashsalt": "mxmoe",
    "svg.fonttype": "none",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "figure.constrained_layout.use": True,
    "legend.frameon": False,
    **dict.fromkeys(("figure.facecolor", "axes.facecolor", "savefig.facecolor"), "none"),
    **dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), INK),
}
mpl.rcParams.update(_SETTINGS)

STYLE = {  # kind or granularity -> colour, marker
    "uniform rtn": ("#9e9e9e", "s"),
    "uniform gptq": (INK, "o"),
    "uniform rtn+hadamard": ("#8fa8bf", "D"),
    "uniform gptq+hadamard": ("#4a7fb0", "P"),
    "layer": ("#e6a23c", "v"),
    "expert": ("#4c9f70", "^"),
    "block": ("#d1493a", "*"),
}
ORIGINAL_COLOUR = "#3b86b3"
BITS_COLOURS = {1: "#8e1b3d", 2: "#d1495b", 3: "#edae49", 4: "#66a182", 6: "#3f8f9b", 8: "#2e6f95", 16: "#13293d"}
PANELS = 4  # of token counts, as can be read


def spread(items: Sequence[Any], most: int) -> list[Any]:
    """At most ``most`` of the items, in order, evenly spread from the first to the last."""
    if len(items) <= most:
        return list(items)
    return [items[number * (len(items) - 1) // (most - 1)] for number in range(most)]


def to_svg(figure: Figure) -> str:
    """SVG text without dates, so that equal data gives equal bytes; lines and texts take the page's colour."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :].replace(INK, "currentColor")


def style(name: str) -> tuple[str, str, Literal["full", "none"]]:
    """Colour, marker and its filling: those of tuned checkpoints are hollow."""
    colour, marker = STYLE[name.removesuffix(TUNED_KIND)]
    return colour, marker, "none" if name.endswith(TUNED_KIND) else "full"


def label_of(name: str) -> str:
    """What `series_of` calls ``name``, in words."""
    return name if name.startswith("uniform") else f"ours, per {name}"


def series_of(table: pd.DataFrame) -> list[tuple[str, pd.DataFrame]]:
    """(name, rows) of a summary: uniform kinds, and ours by granularity, those that are tuned apart."""
    tuned = table["kind"].str.endswith(TUNED_KIND).map({True: TUNED_KIND, False: ""})
    names = table["kind"].where(~table["kind"].str.startswith("ours"), table["granularity"] + tuned)
    known = [name + tuned for name in STYLE for tuned in ("", TUNED_KIND)]
    return [(name, table[names == name]) for name in known if (names == name).any()]


def plain_log(axis: Any, which: Literal["x", "y", "both"] = "y") -> None:
    """Logarithmic axes with plain numbers."""
    axes = {"x": axis.xaxis, "y": axis.yaxis}
    axis.set(**{f"{name}scale": "log" for name in axes if which in (name, "both")})
    for name, one in axes.items():
        if which in (name, "both"):
            one.set_major_locator(mpl.ticker.LogLocator(subs=(1, 2, 5)))
            one.set_major_formatter(mpl.ticker.FormatStrFormatter("%g"))
            one.set_minor_formatter(mpl.ticker.NullFormatter())


def loss_name(metric: str) -> str:
    """What a loss of blocks is called on an axis."""
    known = {"fisher": "estimated KL, nats per token", "out_sq": "squared change of the layer output"}
    return known.get(metric, metric)
