"""Figures with a cell per block or expert: sensitivity, allocations, traffic."""

from collections.abc import Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.colors import ListedColormap, LogNorm
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from mxmoe_steps.reporting.figures.style import BITS_COLOURS, loss_name, spread, to_svg
from mxmoe_steps.schemes import BLOCKS, SHARED, parse_scheme

_MAPS = 12  # of allocations, as can be read


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
    figure.colorbar(image, ax=axes, shrink=0.6).set_label(loss_name(metric))
    return to_svg(figure)


def allocation(allocations: Sequence[dict[str, Any]]) -> str:
    """The chosen scheme of every block; a row of panels per allocation, or per some of many; columns gate, up, down."""
    allocations = spread(allocations, _MAPS)
    schemes = sorted({name for one in allocations for row in one["assignment"] for name in row[2:]}, key=parse_scheme)
    colours, seen = [], dict.fromkeys(BITS_COLOURS, 0)
    for name in schemes:  # one hue per width, lighter for a second scheme of the same width
        bits = parse_scheme(name).weight_bits
        base = np.array(mpl.colors.to_rgb(BITS_COLOURS[bits]))
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
