"""Dynamic programming over the bits of a core.

Units whose launches sit between the two sides of their maximum are enumerated whole, at their true cost; for all
others the maxima are left out. Where they vanish at the optimum (`Core.flips`) this is the optimum of the core.
"""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mxmoe_steps.allocation.core import Core

MAX_STATES = 400_000
VARIANT, MODE, WHOLE = -1, -2, -3
Numbers = NDArray[np.float64] | NDArray[np.int64]


@dataclass(frozen=True)
class Stage:
    """One open decision: the variant of a layer, the mode or the whole assignment of a unit, or a bundle's choice.

    ``cost`` [tags, options] depends on the mode, whose position among the unit's open ones is the tag.
    """

    unit: int  # of a variant: its layer
    bundle: int  # VARIANT, MODE and WHOLE stand for those of a layer or unit
    cost: NDArray[np.float64]
    bits: NDArray[np.int64]  # [options], beyond those of the base
    choices: NDArray[np.int64] | None = None  # WHOLE: choices of every bundle, [options, N]; VARIANT: variants
    way: int | None = None  # where variants of the layer are open, the number of this unit's


def open_stages(core: Core, whole: dict[int, Stage]) -> list[Stage]:
    """The open decisions, layer by layer: its variant, and unit by unit its stage in ``whole``, or mode and bundles."""
    stages = []
    problem = core.problem
    variant_bits = np.add.reduceat(core.base_bits, core.relaxation.first_unit)
    for layer, base in enumerate(core.base_variant.tolist()):
        variants = np.flatnonzero((problem.layer == layer) & (core.over <= core.limit))
        several = len(variants) > 1
        if several:
            bits = variant_bits[variants] - variant_bits[base]
            stages.append(Stage(layer, VARIANT, core.over[variants][None], bits, variants))
        for way, variant in enumerate(variants.tolist()):
            for unit in np.flatnonzero(problem.variant == variant).tolist():
                own = unit_stages(core, unit, whole)
                stages += [replace(stage, way=way) for stage in own] if several else own
    return stages


def unit_stages(core: Core, unit: int, whole: dict[int, Stage]) -> list[Stage]:
    """The open decisions of one unit."""
    if unit in whole:
        return [whole[unit]]
    modes = np.flatnonzero(core.unit == unit)
    several = [Stage(unit, MODE, core.mode_cost[modes][None], np.zeros(len(modes), np.int64))]
    return [*(several if len(modes) > 1 else []), *bundle_stages(core, modes)]


def bundle_stages(core: Core, modes: NDArray[np.int64]) -> list[Stage]:
    """The bundles of one unit that have a choice in the given modes of it, the dearest second choice first: cheap
    decisions multiply states, and come when the limit leaves little."""
    unit = int(core.unit[modes[0]])
    alive = core.alive[modes]
    some = alive.any(0)
    cost = np.where(alive, core.item_cost[modes], np.inf)
    bits = core.problem.bits[unit]
    bits = np.where(some, bits - np.take_along_axis(bits, core.cheapest[unit][:, None], 1), 0)
    open_bundles = np.flatnonzero(some.sum(1) > 1)
    second = np.partition(cost[:, open_bundles].min(0), 1)[:, 1] if len(open_bundles) else open_bundles
    order = open_bundles[np.argsort(-second, kind="stable")]
    return [Stage(unit, bundle, cost[:, bundle], bits[bundle]) for bundle in order.tolist()]


def whole_stage(core: Core, unit: int) -> Stage:
    """All assignments of a one-launch unit that may matter within the limit, at their true maxima."""
    limit = core.reach[unit]
    found = [_assignments(core, mode, limit, True) for mode in np.flatnonzero(core.unit == unit).tolist()]
    cost, bits, choices = (np.concatenate(column) for column in zip(*found, strict=True))
    order = _undominated(np.zeros(len(cost), np.int64), bits, cost - core.dual.lam * bits)
    order = order[cost[order] <= limit]
    return Stage(unit, WHOLE, cost[order][None] - core.shift[unit], bits[order], choices[order])


def least_excess(core: Core, unit: int) -> float:
    """The least that a one-launch unit costs above its bound; infinite if that is beyond the limit."""
    limit = core.reach[unit]
    found = [_assignments(core, mode, limit, False)[0] for mode in np.flatnonzero(core.unit == unit).tolist()]
    return float(np.concatenate(found).min(initial=np.inf))


def _assignments(
    core: Core, mode: int, limit: float, by_bits: bool
) -> tuple[NDArray[np.float64], NDArray[np.int64], NDArray[np.int64]]:
    """Cost and bits above the base and choices [n, N] of the assignments of a unit in one mode.

    States are (bits, over, under), the last two the sides of max(A, B) with the reduced costs added; of two states
    (``by_bits``: with equal bits) one that is worse on both sides is dropped.
    """
    dual, problem = core.dual, core.problem
    stages = bundle_stages(core, np.array([mode]))
    unit, number = core.unit[mode], core.modes[mode]
    split = float(dual.split[number, 0])
    leads = dual.b * problem.lead[problem.modes.kernels.row[number], :, :, 0]  # A - B, [N, C]
    bundles = np.arange(len(leads))
    cheapest = core.item_cost[mode].argmin(1)
    shut = np.isin(bundles, [stage.bundle for stage in stages], invert=True)
    extra = problem.bits[unit, bundles, cheapest] - problem.bits[unit, bundles, core.cheapest[unit]]
    lead = np.full(1, dual.b * problem.modes.cap[number, 0] + leads[shut, cheapest[shut]].sum())
    bits: NDArray[np.int64] = np.full(1, extra[shut].sum())
    cost = np.full(1, core.mode_cost[mode])
    falls = _rest([leads[stage.bundle][core.alive[mode, stage.bundle]].min() for stage in stages])
    rises = _rest([leads[stage.bundle][core.alive[mode, stage.bundle]].max() for stage in stages])
    history, kept = [], 1
    for stage, fall, rise in zip(stages, falls, rises, strict=True):
        new_cost = cost[:, None] + stage.cost
        new_lead = lead[:, None] + leads[stage.bundle]
        flip = np.maximum((1 - split) * (new_lead + fall), -split * (new_lead + rise))  # the least still reachable
        parent, option = np.nonzero(new_cost + np.maximum(0, flip) <= limit)
        cost, lead = new_cost[parent, option], new_lead[parent, option]
        bits = bits[parent] + stage.bits[option]
        if len(cost) > 2 * kept:
            alike = bits if by_bits else np.zeros_like(bits)
            order = _undominated(alike, cost + (1 - split) * lead, cost - split * lead)
            cost, lead, bits = cost[order], lead[order], bits[order]
            parent, option = parent[order], option[order]
            kept = len(cost)
        history.append((parent, option))
    choices = np.repeat(cheapest[None], len(cost), 0)
    state = np.arange(len(cost))
    for stage, (parent, option) in zip(reversed(stages), reversed(history), strict=True):
        choices[:, stage.bundle] = option[state]
        state = parent[state]
    return cost + np.maximum((1 - split) * lead, -split * lead), bits, choices


def solve_by_states(core: Core, whole: dict[int, Stage]) -> tuple[float, NDArray[np.int64] | None]:
    """Least reduced costs + lam x unused bits and its assignment; (limit, None) if none is within the limit.

    States are (variant, mode, bits, cost); one that needs no fewer bits and no less loss and time than another in its
    variant and mode is dropped. Should they outgrow MAX_STATES, the cheapest go on and the proven value is 0.
    """
    lam, limit, room = core.dual.lam, core.limit, core.room
    stages = open_stages(core, whole)
    cost, bits = np.zeros(1), np.zeros(1, np.int64)
    way, tag = np.zeros(1, np.int64), np.zeros(1, np.int64)
    falls = _rest([stage.bits.min(initial=0) for stage in stages])
    rises = _rest([stage.bits.max(initial=0) for stage in stages])
    exact = True
    history = []
    for number, (stage, fall, rise) in enumerate(zip(stages, falls, rises, strict=True)):
        following = stages[number + 1] if number + 1 < len(stages) else None
        new_cost, new_bits, here = _extend(stage, cost, bits, way, tag)
        unused = np.maximum(0, room - new_bits - rise)  # at least
        parent, option = np.nonzero((new_cost + lam * unused <= limit) & (new_bits + fall <= room))
        cost, bits = new_cost[parent, option], new_bits[parent, option]
        tag = np.where(here[parent], option, 0) if stage.bundle == MODE else tag[parent]
        way = option if stage.bundle == VARIANT else way[parent]
        if following is None or following.bundle == VARIANT or following.unit != stage.unit:
            tag = np.zeros_like(tag)
        if following is None or following.way is None:  # the layer ends, and so do its variants
            way = np.zeros_like(way)
        order = _undominated(way * len(core.modes) + tag, bits, cost - lam * bits)
        if len(order) > MAX_STATES:
            order, exact = order[np.sort(np.argsort(cost[order], kind="stable")[:MAX_STATES])], False
        cost, bits, way, tag = cost[order], bits[order], way[order], tag[order]
        history.append((parent[order], option[order]))
    final = np.where(bits <= room, cost + lam * (room - bits), np.inf)
    if final.min(initial=np.inf) > limit:
        return limit if exact else 0.0, None
    state = int(final.argmin())
    least, choice, variants = float(final[state]), core.cheapest.copy(), core.base_variant.copy()
    for stage, (parent, option) in zip(reversed(stages), reversed(history), strict=True):
        taken = option[state]
        if stage.bundle == VARIANT and stage.choices is not None:
            variants[stage.unit] = stage.choices[taken]
        elif taken < len(stage.bits) and stage.choices is not None:
            choice[stage.unit] = stage.choices[taken]
        elif taken < len(stage.bits) and stage.bundle != MODE:
            choice[stage.unit, stage.bundle] = taken
        state = parent[state]
    return least if exact else 0.0, core.relaxation.taking(choice, variants)


def _extend(
    stage: Stage, cost: NDArray[np.float64], bits: NDArray[np.int64], way: NDArray[np.int64], tag: NDArray[np.int64]
) -> tuple[NDArray[np.float64], NDArray[np.int64], NDArray[np.bool_]]:
    """Cost and bits of every state with every option, [n, options], and which states decide here.

    Where variants are open, those in another variant than the stage's pass by, a last option.
    """
    if stage.way is None:
        return cost[:, None] + stage.cost[tag], bits[:, None] + stage.bits, np.ones(len(cost), bool)
    here = way == stage.way
    added = np.full((len(cost), stage.cost.shape[1] + 1), np.inf)
    added[here, :-1] = stage.cost[tag[here]]
    added[~here, -1] = 0
    return cost[:, None] + added, bits[:, None] + np.append(stage.bits, 0), here


def _rest(numbers: list[Any]) -> list[Any]:
    """For each number, the sum of those after it."""
    return (np.cumsum(numbers[::-1])[::-1] - numbers).tolist() if numbers else []


def _undominated(tag: NDArray[np.int64], one: Numbers, two: Numbers) -> NDArray[np.int64]:
    """Indices of states that no other of the same tag beats in both numbers, sorted by tag and the first."""
    if not tag.any():  # mostly: a running minimum will do
        order = np.lexsort((two, one))
        ranked: Numbers = two[order]
    else:
        order = np.lexsort((two, one, tag))
        rank = np.empty(len(two), np.int64)
        rank[two.argsort(kind="stable")] = np.arange(len(two))  # ranks shift exactly, the numbers would not
        tag = tag[order]
        later = np.zeros(len(tag), np.int64)
        np.cumsum(tag[1:] != tag[:-1], out=later[1:])
        ranked = rank[order] - later * len(two)  # falls from tag to tag
    keep = np.ones(len(order), bool)
    keep[1:] = ranked[1:] < np.minimum.accumulate(ranked)[:-1]
    return order[keep]
