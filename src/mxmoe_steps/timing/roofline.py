"""Where the expert GEMMs of a layer stand between memory and tensor cores, by the time model."""

from typing import Any

import numpy as np

from mxmoe_steps.allocation.blocks import Blocks
from mxmoe_steps.kernels.architectures import PHASE_ROWS
from mxmoe_steps.schemes import SHARED, parse_scheme
from mxmoe_steps.timing.model import KSTEP
from mxmoe_steps.timing.predict import block_times
from mxmoe_steps.timing.profile import Profile, timing_schemes
from mxmoe_steps.timing.traffic import Traffic

LAUNCH_NAMES = ("gate+up", "down")


def layer_roofline(
    allocation: dict[str, Any], blocks: Blocks, traffic: Traffic, profile: Profile, layer: int
) -> dict[str, Any]:
    """Operations a byte and rate of every expert in both launches of ``layer``, and the roofs above them.

    An expert's time is its part of the larger side of its launch: of all multiprocessors' work or of all bytes. A peak
    is the rate of the fastest tile that the profile has for this type of product; ``traffic`` as of `block_times`.
    """
    named = {expert: names for at, expert, *names in allocation["assignment"] if at == layer}
    blocks = blocks[blocks.layer == layer]
    names = [named[expert][kind] for expert, kind in zip(blocks.expert.tolist(), blocks.kind.tolist(), strict=True)]
    schemes = sorted({parse_scheme(name) for name in names})
    timed_as = {parse_scheme(scheme): parse_scheme(kernel) for scheme, kernel in allocation["timed_as"].items()}
    kernels = timing_schemes(tuple(schemes), profile, timed_as)
    times = block_times(blocks, kernels, traffic, profile, tuple(dict.fromkeys(kernels)))
    at = np.arange(len(blocks)), np.array([schemes.index(parse_scheme(name)) for name in names])
    compute, memory = times.compute[at], times.memory[at]
    moved = (memory - profile.exposed * compute) * profile.bandwidth_gbs * 1e3
    index = traffic.layers.index(layer)
    mean_rows = (traffic.rows[index] * traffic.weight[index]).sum(0)
    rows = np.where(blocks.expert == SHARED, traffic.tokens, mean_rows[blocks.expert])
    operations = 2 * rows * blocks.params
    experts = []
    for launch, name in enumerate(LAUNCH_NAMES):
        within = blocks.launch == launch
        sides = compute if compute[within].sum() > memory[within].sum() else memory
        for expert in np.unique(blocks.expert):
            of = within & (blocks.expert == expert)
            experts.append(
                {
                    "expert": int(expert),
                    "launch": name,
                    "scheme": names[np.flatnonzero(of)[-1]],
                    "intensity": float(operations[of].sum() / moved[of].sum()),
                    "tflops": float(operations[of].sum() / sides[of].sum() / 1e6),
                }
            )
    return {
        "layer": layer,
        "tokens": traffic.tokens,
        "bandwidth_gbs": profile.bandwidth_gbs,
        "peaks_tflops": {kind: _peak(profile, kind) for kind in sorted({kernel.compute_type for kernel in kernels})},
        "experts": experts,
    }


def _peak(profile: Profile, compute_type: str) -> float:
    """TFLOP/s of the fastest tile that multiplies numbers of this type, on all multiprocessors."""
    return max(
        float((2 * PHASE_ROWS[phase] * KSTEP * cells[:, 0] * profile.sms / cells[:, 2]).max() / 1e6)
        for (phase, scheme), cells in profile.tiles.items()
        if scheme.compute_type == compute_type
    )
