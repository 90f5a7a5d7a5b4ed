"""Predicted time of a given allocation at any token count, for comparing checkpoints."""

from typing import Any

import numpy as np

from mxmoe_steps.allocation.blocks import Blocks
from mxmoe_steps.allocation.time_model import Profile, Times, block_times, layer_times, timing_schemes
from mxmoe_steps.allocation.traffic import Traffic
from mxmoe_steps.schemes import Scheme, parse_scheme

Tables = dict[tuple[Scheme, ...], Times]


def mean_layer_us(
    allocation: dict[str, Any], blocks: Blocks, traffic: Traffic, profile: Profile, tables: Tables | None = None
) -> float:
    """Microseconds of one layer's expert GEMMs, the mean over layers; a layer's kernels carry the schemes it uses.

    ``allocation``: what `solve` wrote: its ``assignment`` has rows [layer, expert, gate, up, down] for every expert
    in ``blocks``, its ``timed_as`` names schemes that another one's kernel is counted for. ``tables``: times by what
    kernels carry, found so far; calls for the same blocks, traffic and profile share them.
    """
    tables = {} if tables is None else tables
    named = {(layer, expert): names for layer, expert, *names in allocation["assignment"]}
    schemes = {name: parse_scheme(name) for name in sorted({name for names in named.values() for name in names})}
    number_of = {name: number for number, name in enumerate(schemes)}
    chosen = np.array(
        [
            number_of[named[layer, expert][kind]]
            for layer, expert, kind in zip(
                blocks.layer.tolist(), blocks.expert.tolist(), blocks.kind.tolist(), strict=True
            )
        ]
    )
    timed_as = {parse_scheme(scheme): parse_scheme(kernel) for scheme, kernel in allocation["timed_as"].items()}
    kernels = timing_schemes(tuple(schemes.values()), profile, timed_as)
    layers = []
    for layer in np.unique(blocks.layer).tolist():
        here = blocks.layer == layer
        used, choice = np.unique(chosen[here], return_inverse=True)
        carried = tuple(kernels[number] for number in used)
        if carried not in tables:
            tables[carried] = block_times(blocks, list(carried), traffic, profile, carried)
        layers.append(layer_times(blocks[here], tables[carried].of(here), choice)[layer])
    return float(np.mean(sorted(layers)))
