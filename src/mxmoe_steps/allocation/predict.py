"""Predicted time of a given allocation at any token count, for comparing checkpoints."""

from typing import Any

import numpy as np

from mxmoe_steps.allocation.blocks import Blocks
from mxmoe_steps.allocation.time_model import Profile, block_times, layer_times, timing_schemes
from mxmoe_steps.allocation.traffic import Traffic
from mxmoe_steps.schemes import parse_scheme


def mean_layer_us(allocation: dict[str, Any], blocks: Blocks, traffic: Traffic, profile: Profile) -> float:
    """Microseconds of one layer's expert GEMMs, the mean over layers; a layer's kernels carry the schemes it uses.

    ``allocation``: what `solve` wrote: its ``assignment`` has rows [layer, expert, gate, up, down] for every expert
    in ``blocks``, its ``timed_as`` names schemes that another one's kernel is counted for.
    """
    named = {(layer, expert): names for layer, expert, *names in allocation["assignment"]}
    schemes = sorted({parse_scheme(name) for names in named.values() for name in names})
    choice = [
        schemes.index(parse_scheme(named[layer, expert][kind]))
        for layer, expert, kind in zip(blocks.layer.tolist(), blocks.expert.tolist(), blocks.kind.tolist(), strict=True)
    ]
    timed_as = {parse_scheme(scheme): parse_scheme(kernel) for scheme, kernel in allocation["timed_as"].items()}
    kernels = timing_schemes(tuple(schemes), profile, timed_as)
    chosen = np.array(choice)
    layers: list[float] = []
    for used in {tuple(np.unique(chosen[blocks.layer == layer])) for layer in np.unique(blocks.layer)}:
        times = block_times(blocks, kernels, traffic, profile, [kernels[number] for number in used])
        every = layer_times(blocks, times, chosen)
        layers += [us for layer, us in every.items() if tuple(np.unique(chosen[blocks.layer == layer])) == used]
    return float(np.mean(sorted(layers)))
