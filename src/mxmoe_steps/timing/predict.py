"""Expected times of a model's blocks on a GPU, and of an allocation: what `frontier` minimises and `report` compares.

Times are expectations over the sampled steps of `traffic`, by the formula of `model`.
"""

from collections.abc import Collection
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mxmoe_steps.allocation.blocks import Blocks
from mxmoe_steps.allocation.times import Times, layer_times
from mxmoe_steps.errors import UserError
from mxmoe_steps.kernels.architectures import PHASE_ROWS
from mxmoe_steps.schemes import BLOCKS, SHARED, Scheme, parse_scheme
from mxmoe_steps.timing.layer import cut_shared, step_phases
from mxmoe_steps.timing.model import activation_bytes, block_work, bytes_moved
from mxmoe_steps.timing.profile import Profile, timing_schemes
from mxmoe_steps.timing.traffic import Traffic

Tables = dict[tuple[Scheme, ...], Times]


def block_times(
    blocks: Blocks,
    kernels: list[Scheme],
    traffic: Traffic,
    profile: Profile,
    carried: Collection[Scheme] | None = None,
) -> Times:
    """Times of every block under the kernels of S schemes for the sampled traffic.

    ``carried``: schemes of the kernel that runs the launches; by default each scheme is timed alone in its own.
    ``compute`` is the block's part of W, ``longest`` tail x its longest tile, ``memory`` bytes / bandwidth + exposed x
    its part of W. `UserError` where blocks and traffic are of different models.
    """
    rows, weight = _rows_and_weights(blocks, traffic)
    used = weight * (rows > 0)
    slices, out, inner = cut_shared(blocks)
    activation_us = _activation_us(blocks, traffic, profile)
    times = Times.zeros(len(blocks), len(kernels))
    for column, scheme in enumerate(kernels):
        within = carried or [scheme]
        for launch, phase in enumerate(step_phases(blocks, traffic, within, profile.sms, profile.architecture)):
            of = blocks.launch == launch
            own, loops = profile.loops(phase, [scheme]), profile.loops(phase, within)
            extra_us = profile.loop_tile_us * (loops - own)
            cells = profile.tiles[phase, scheme]
            work, longest = block_work(rows[of], out[of], inner[of], cells, extra_us, PHASE_ROWS[phase])
            times.launch_us[launch, column] = profile.launch_us + profile.loop_launch_us * loops
            times.launch_us[launch, column] += activation_us * (launch == 0)
            times.compute[of, column] = slices[of] * (weight[of] * work).sum(1) / profile.sms
            times.longest[of, column] = profile.tail * longest.max(1)
        weight_bytes, token_bytes = bytes_moved(out, inner, scheme)
        moved = slices * (used.sum(1) * weight_bytes + (weight * rows).sum(1) * token_bytes)
        times.memory[:, column] = moved / (profile.bandwidth_gbs * 1e3) + profile.exposed * times.compute[:, column]
    return times


def _activation_us(blocks: Blocks, traffic: Traffic, profile: Profile) -> float:
    """What a layer's launch between the GEMMs takes where gate+up cannot do its work: a launch and its bytes, the same
    under every scheme."""
    if traffic.gating.plain:
        return 0.0
    down = blocks[(blocks.layer == blocks.layer[0]) & (blocks.kind == BLOCKS.index("down"))]
    slices, _, inner = cut_shared(down)
    rows, weight = _rows_and_weights(down, traffic)
    features = float((slices * inner * (weight * rows).sum(1)).sum())
    return profile.launch_us + features * activation_bytes(traffic.gating.columns) / (profile.bandwidth_gbs * 1e3)


def times_by_tile(
    blocks: Blocks,
    kernels: list[Scheme],
    traffic: Traffic,
    profile: Profile,
    carried: Collection[Scheme] | None,
    one_tile: bool,
) -> dict[int | None, Times]:
    """`block_times` under key None; for kernels of ``one_tile``, under each token tile that all their schemes have."""
    if not one_tile:
        return {None: block_times(blocks, kernels, traffic, profile, carried)}
    within = carried or kernels
    tiles = profile.common_tiles(step_phases(blocks, traffic, within, profile.sms, profile.architecture), within)
    return {tile: block_times(blocks, kernels, traffic, profile.only_tile(tile), carried) for tile in tiles}


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
    places = zip(blocks.layer.tolist(), blocks.expert.tolist(), blocks.kind.tolist(), strict=True)
    choice = np.array([number_of[named[layer, expert][kind]] for layer, expert, kind in places])
    timed_as = {parse_scheme(scheme): parse_scheme(kernel) for scheme, kernel in allocation["timed_as"].items()}
    kernels = timing_schemes(tuple(schemes.values()), profile, timed_as)
    layers = []
    for layer in np.unique(blocks.layer).tolist():
        here = blocks.layer == layer
        used, column = np.unique(choice[here], return_inverse=True)
        carried = tuple(kernels[number] for number in used)
        if carried not in tables:
            tables[carried] = block_times(blocks, list(carried), traffic, profile, carried)
        layers.append(layer_times(blocks[here], tables[carried].of(here), column)[layer])
    return float(np.mean(sorted(layers)))


def _rows_and_weights(blocks: Blocks, traffic: Traffic) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Rows of every block in every sampled step and the step's weight, [B, steps]; `UserError` if models differ."""
    layer_of = {layer: index for index, layer in enumerate(traffic.layers)}
    missing = sorted(set(blocks.layer.tolist()) - set(layer_of))
    if missing:
        raise UserError(f"the trace has no layer {missing[0]}, the losses do: trace and losses are of different models")
    experts = traffic.rows.shape[2]
    if blocks.expert.max() >= experts:
        raise UserError(
            f"the losses name expert {blocks.expert.max()}, the trace has {experts} experts: trace and losses are of "
            "different models"
        )
    for name in np.unique(blocks.layer).tolist():
        here = set(blocks.expert[blocks.layer == name].tolist())
        absent = sorted(set(range(experts)) - here)
        if absent:
            raise UserError(f"the losses lack expert {absent[0]} of layer {name}, which the trace has: calibrate it")
    layer = np.array([layer_of[name] for name in blocks.layer.tolist()])
    shared = blocks.expert == SHARED
    rows = np.where(shared[:, None], traffic.tokens, traffic.rows[layer, :, blocks.expert])  # [B, steps]
    weight = np.where(shared[:, None], 1 / rows.shape[1], traffic.weight[layer, :, blocks.expert])
    return rows, weight
