"""Expected times of a model's blocks on a GPU, and of an allocation: what `frontier` minimises and `report` compares.

Times are expectations over the sampled steps of `traffic`, by the formula of `model`.
"""

from collections.abc import Collection
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mxmoe_steps.allocation.blocks import Blocks
from mxmoe_steps.allocation.times import DOWN, Sides, Times, layer_times
from mxmoe_steps.errors import UserError
from mxmoe_steps.kernels.architectures import PHASE_ROWS
from mxmoe_steps.schemes import ORIGINAL, SHARED, Scheme, parse_scheme
from mxmoe_steps.timing.layer import cut_shared, step_phases
from mxmoe_steps.timing.model import OUTPUT_BYTES, block_work, bytes_moved
from mxmoe_steps.timing.profile import Profile, timing_schemes
from mxmoe_steps.timing.shapes import by_warp
from mxmoe_steps.timing.traffic import Traffic

Tables = dict[tuple[Scheme, ...], Times]


def block_times(
    blocks: Blocks,
    kernels: list[Scheme],
    traffic: Traffic,
    profile: Profile,
    one_phase: Collection[Scheme] | None = None,
) -> Times:
    """Times of every block under the kernels of S schemes for the sampled traffic.

    ``compute`` is the block's part of W, ``longest`` tail x its longest tile, ``memory`` its part of M + exposed x its
    part of W. ``one_phase``: schemes whose kernel's phases all launches have; by default they follow from what a
    launch carries. `UserError` where blocks and traffic are of different models.
    """
    rows, weight = _rows_and_weights(blocks, traffic)
    slices, out, inner = cut_shared(blocks)
    warps = [by_warp([scheme]) for scheme in kernels]
    others = [scheme for scheme, warp in zip(kernels, warps, strict=True) if not warp]
    found: dict[tuple[str, ...], Sides] = {}
    sides = []
    for carried in ([], others):  # what decides is whether any is multiplied by warpgroups
        within = one_phase or carried
        phases = step_phases(blocks, traffic, within, profile.sms, profile.architecture)
        if phases not in found:
            found[phases] = _sides(blocks, kernels, (rows, weight, slices, out, inner), profile, phases)
        sides.append(found[phases])
    tokens, down = (weight * rows).sum(1) * slices, blocks.launch == DOWN
    per_element = np.where(down, tokens * inner, 0.0) / (profile.bandwidth_gbs * 1e3)  # microseconds a byte
    written = np.array([scheme.act_bits / 8 for scheme in kernels])
    quantized = np.array([scheme.act_bits < ORIGINAL.act_bits for scheme in kernels])
    activated = per_element[:, None] * (traffic.gating.columns * OUTPUT_BYTES + written)
    products = per_element[:, None] * np.where(quantized, OUTPUT_BYTES + written, 0.0)
    if not traffic.gating.plain:  # its launch is needed however gate and up are tied
        products, quantized = activated, np.ones_like(quantized)
    numbers = {scheme: number for number, scheme in enumerate(sorted(set(kernels)))}
    return Times(
        sides=(sides[0], sides[1]),
        by_warp=np.array(warps),
        kernel=np.array([numbers[scheme] for scheme in kernels]),
        launch_us=profile.launch_us,
        loop_us=profile.loop_launch_us,
        between_us=profile.launch_us,
        swiglu_us=activated,
        quantize_us=products,
        quantized=quantized,
    )


def _sides(
    blocks: Blocks,
    kernels: list[Scheme],
    cut: tuple[NDArray[np.int64], NDArray[np.float64], NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]],
    profile: Profile,
    phases: tuple[str, ...],
) -> Sides:
    """In kernels of these phases, one for each launch. ``cut``: rows, their weight, slices and sizes of blocks."""
    rows, weight, slices, out, inner = cut
    sides = Sides.zeros(len(blocks), len(kernels))
    for column, scheme in enumerate(kernels):
        for launch, phase in enumerate(phases):
            of, cells = blocks.launch == launch, profile.tiles[phase, scheme]
            if not len(cells):  # of a scheme that is no candidate, where all share a tile
                continue
            sides.loops[launch, column] = len(cells)
            found = [
                block_work(rows[of], out[of], inner[of], cells, extra_us, PHASE_ROWS[phase])
                for extra_us in (0.0, profile.loop_tile_us)
            ]
            work, more = ((weight[of] * each).sum(1) for each, _ in found)
            longest, longer = (each.max(1) for _, each in found)
            sides.compute[of, column] = slices[of] * work / profile.sms
            sides.more_compute[of, column] = slices[of] * (more - work) / profile.sms
            sides.longest[of, column] = profile.tail * longest
            sides.more_longest[of, column] = profile.tail * (longer - longest)
        weight_bytes, token_bytes = bytes_moved(out, inner, scheme)
        used, tokens = slices * (weight * (rows > 0)).sum(1), slices * (weight * rows).sum(1)
        moving = profile.memory_us(used * weight_bytes, tokens * token_bytes)
        sides.memory[:, column] = moving + profile.exposed * sides.compute[:, column]
        sides.more_memory[:, column] = profile.exposed * sides.more_compute[:, column]
    return sides


def times_by_tile(
    blocks: Blocks,
    kernels: list[Scheme],
    traffic: Traffic,
    profile: Profile,
    candidates: Collection[Scheme],
    one_tile: bool,
) -> dict[int | None, Times]:
    """`block_times` under key None; for kernels of ``one_tile``, under each token tile that the kernels of all
    ``candidates`` have."""
    if not one_tile:
        return {None: block_times(blocks, kernels, traffic, profile)}
    phases = step_phases(blocks, traffic, candidates, profile.sms, profile.architecture)
    tiles = profile.common_tiles(phases, candidates)
    return {tile: block_times(blocks, kernels, traffic, profile.only_tile(tile), candidates) for tile in tiles}


def mean_layer_us(
    allocation: dict[str, Any], blocks: Blocks, traffic: Traffic, profile: Profile, tables: Tables | None = None
) -> float:
    """Microseconds of one layer's expert GEMMs and of what lies between them, the mean over layers.

    ``allocation``: what `solve` wrote: its ``assignment`` has rows [layer, expert, gate, up, down] for every expert
    in ``blocks``, its ``timed_as`` names schemes that another one's kernel is counted for. ``tables``: times by
    kernels, found so far; calls for the same blocks, traffic and profile share them.
    """
    tables = {} if tables is None else tables
    named = {(layer, expert): names for layer, expert, *names in allocation["assignment"]}
    schemes = {name: parse_scheme(name) for name in sorted({name for names in named.values() for name in names})}
    number_of = {name: number for number, name in enumerate(schemes)}
    places = zip(blocks.layer.tolist(), blocks.expert.tolist(), blocks.kind.tolist(), strict=True)
    choice = np.array([number_of[named[layer, expert][kind]] for layer, expert, kind in places])
    timed_as = {parse_scheme(scheme): parse_scheme(kernel) for scheme, kernel in allocation["timed_as"].items()}
    kernels = tuple(timing_schemes(tuple(schemes.values()), profile, timed_as))
    if kernels not in tables:
        tables[kernels] = block_times(blocks, list(kernels), traffic, profile)
    return float(np.mean(sorted(layer_times(blocks, tables[kernels], choice).values())))


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
