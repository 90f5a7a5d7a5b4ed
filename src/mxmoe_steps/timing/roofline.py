"""Where the expert GEMMs of a layer stand between memory and tensor cores, by the time model."""

from typing import Any

import numpy as np

from mxmoe_steps.allocation.blocks import Blocks
from mxmoe_steps.kernels.architectures import PHASE_ROWS
from mxmoe_steps.schemes import SHARED, parse_scheme
from mxmoe_steps.timing.layer import cut_shared, step_phases
from mxmoe_steps.timing.model import KSTEP, block_work, bytes_moved
from mxmoe_steps.timing.profile import Profile, timing_schemes
from mxmoe_steps.timing.traffic import Traffic

LAUNCH_NAMES = ("gate+up", "down")


def layer_roofline(
    allocation: dict[str, Any], blocks: Blocks, traffic: Traffic, profile: Profile, layer: int
) -> dict[str, Any]:
    """Operations a byte and rate of every expert in both launches of ``layer``, and the roofs above them.

    An expert's time is its part of the larger side of its launch: of all multiprocessors' work or of all bytes. A peak
    is the rate of the fastest tile that the profile has for this type of product.
    """
    named = {expert: names for at, expert, *names in allocation["assignment"] if at == layer}
    blocks = blocks[blocks.layer == layer]
    names = [named[expert][kind] for expert, kind in zip(blocks.expert.tolist(), blocks.kind.tolist(), strict=True)]
    timed_as = {parse_scheme(scheme): parse_scheme(kernel) for scheme, kernel in allocation["timed_as"].items()}
    kernels = timing_schemes(tuple(map(parse_scheme, names)), profile, timed_as)
    carried = sorted(set(kernels))
    index, shared = traffic.layers.index(layer), blocks.expert == SHARED
    rows = np.where(shared[:, None], traffic.tokens, traffic.rows[index][:, blocks.expert].T)  # [B, steps]
    weight = np.where(shared[:, None], 1 / rows.shape[1], traffic.weight[index][:, blocks.expert].T)
    slices, out, inner = cut_shared(blocks)
    phases = step_phases(blocks, traffic, carried, profile.sms, profile.architecture)
    compute, moved, moving = np.zeros((3, len(blocks)))
    for one, (kernel, launch) in enumerate(zip(kernels, blocks.launch.tolist(), strict=True)):
        phase, at = phases[launch], slice(one, one + 1)
        others = profile.loops(phase, carried) - profile.loops(phase, [kernel])
        cells, extra_us = profile.tiles[phase, kernel], profile.loop_tile_us * others
        work, _ = block_work(rows[at], out[at], inner[at], cells, extra_us, PHASE_ROWS[phase])
        compute[one] = slices[one] * (weight[at] * work).sum() / profile.sms
        weights, tokens = bytes_moved(out[at], inner[at], kernel)
        used = float((weight[at] * (rows[at] > 0)).sum())
        parts = slices[at] * used * weights, slices[at] * (weight[at] * rows[at]).sum() * tokens
        moved[at], moving[at] = sum(parts), profile.memory_us(*parts)
    memory = moving + profile.exposed * compute
    operations = 2 * (weight * rows).sum(1) * blocks.params
    experts = []
    for launch, name in enumerate(LAUNCH_NAMES):
        within = blocks.launch == launch
        side = compute if compute[within].sum() > memory[within].sum() else memory
        for expert in np.unique(blocks.expert):
            of = within & (blocks.expert == expert)
            experts.append(
                {
                    "expert": int(expert),
                    "launch": name,
                    "scheme": names[np.flatnonzero(of)[-1]],
                    "intensity": float(operations[of].sum() / moved[of].sum()),
                    "tflops": float(operations[of].sum() / side[of].sum() / 1e6),
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
