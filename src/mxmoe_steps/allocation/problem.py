"""The allocation problem as arrays: units, bundles, choices.

A *bundle* is a set of blocks that take the same choice (granularity), a *unit* a set of bundles that share
launches. Minimising a x loss + b x time under the budget then reads

    sum_g a q[g, x_g]  +  b sum_j max(compute_j(x) + longest_j(x), memory_j(x))     subject to  sum_g w[g, x_g] <= M

where launch j belongs to one unit, compute_j and memory_j are sums over the unit's bundles and longest_j is the
maximum over them. A *mode* of a unit caps longest_j (and, with at most k schemes per layer, names the k): inside
a mode the bundles are independent.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import combinations, product

import numpy as np
from numpy.typing import NDArray

from mxmoe_steps.allocation.blocks import Blocks, Losses, budget_in_bits
from mxmoe_steps.allocation.constraints import Constraints, select
from mxmoe_steps.allocation.times import LAUNCHES, Times
from mxmoe_steps.errors import UserError
from mxmoe_steps.schemes import Scheme


@dataclass(frozen=True)
class Problem:
    """Arrays over U units, N bundles per unit (padded with free ones), C choices and J launches per unit."""

    loss: NDArray[np.float64]  # [U, N, C]
    bits: NDArray[np.int64]  # [U, N, C]
    allowed: NDArray[np.bool_]  # [U, N, C]
    compute: NDArray[np.float64]  # [U, N, C, J] microseconds
    longest: NDArray[np.float64]  # [U, N, C, J]
    memory: NDArray[np.float64]  # [U, N, C, J]
    scheme_sets: NDArray[np.bool_]  # [U, N, C, S]: schemes that a choice brings into the layer
    constant_us: float  # launch overheads that no choice changes
    budget: int  # bits
    params: int
    max_schemes: int | None = None
    by_domain: NDArray[np.float64] = field(default_factory=lambda: np.zeros(0))  # [D, U, N, C], for `domains`

    @cached_property
    def lead(self) -> NDArray[np.float64]:
        """compute - memory, [U, N, C, J]."""
        return self.compute - self.memory

    @cached_property
    def modes(self) -> tuple[NDArray[np.int64], NDArray[np.bool_], NDArray[np.float64]]:
        """All P modes, sorted by unit: the unit [P], the allowed choices [P, N, C] and the caps [P, J]."""
        modes = [(unit, *mode) for unit in range(len(self.loss)) for mode in _unit_modes(self, unit)]
        if len({unit for unit, *_ in modes}) < len(self.loss):
            raise UserError(f"no allocation uses at most {self.max_schemes} schemes in every layer; allow more")
        unit, mask, cap = (np.array(column) for column in zip(*modes, strict=True))
        return unit, mask, cap

    def with_loss(self, loss: NDArray[np.float64]) -> "Problem":
        """The same with other losses, on which its modes do not depend."""
        other = replace(self, loss=loss)
        vars(other)["modes"] = self.modes
        return other

    def evaluate(self, choice: NDArray[np.int64]) -> tuple[float, float, int]:
        """Squared loss (or what adds up), time in microseconds and bits of an assignment [U, N]."""
        taken = np.take_along_axis(self.loss, choice[..., None], 2).sum()
        used = int(np.take_along_axis(self.bits, choice[..., None], 2).sum())
        return float(taken), float(self.launch_times(choice).sum()) + self.constant_us, used

    def launch_times(self, choice: NDArray[np.int64]) -> NDArray[np.float64]:
        """max(compute + longest, memory) per unit and launch, [U, J]."""
        index = choice[..., None, None]
        compute, longest, memory = (
            np.take_along_axis(each, index, 2)[:, :, 0] for each in (self.compute, self.longest, self.memory)
        )
        return np.maximum(compute.sum(1) + longest.max(1), memory.sum(1))


def _unit_modes(problem: Problem, unit: int) -> Iterator[tuple[NDArray[np.bool_], NDArray[np.float64]]]:
    """Yield (mask [N, C], cap [J]) of a unit's modes, fewest and shortest first."""
    allowed, longest = problem.allowed[unit], problem.longest[unit]
    sets = problem.scheme_sets[unit]
    schemes = sets.shape[2]
    subsets = [np.ones(schemes, bool)]
    if problem.max_schemes is not None and problem.max_schemes < schemes:
        subsets = [np.isin(np.arange(schemes), named) for named in combinations(range(schemes), problem.max_schemes)]
    for subset in subsets:
        inside = allowed & ~(sets & ~subset).any(2)
        if not inside.any(1).all():
            continue
        floor = np.where(inside[..., None], longest, np.inf).min(1).max(0)  # some bundle needs this tile
        tiles = np.unique(np.maximum(longest[inside], floor), axis=0)
        # Componentwise maxima of the tiles in use: every reachable pair of longest tiles is among them.
        grid = np.stack([axis.ravel() for axis in np.meshgrid(*(np.unique(t) for t in tiles.T), indexing="ij")], 1)
        reached = np.less_equal(tiles[None], grid[:, None]).all(2)  # [caps, tiles]
        tight = np.equal(np.where(reached[..., None], tiles[None], -np.inf).max(1), grid).all(1)
        for cap in grid[tight]:
            mask = inside & (longest <= cap).all(2)
            if mask.any(1).all():
                yield mask, cap


def build_problem(
    losses: Losses,
    candidates: list[Scheme],
    times: Times,
    granularity: str,
    budget_bits: str,
    constraints: Constraints,
    mask: NDArray[np.bool_],
) -> tuple[Problem, NDArray[np.int64], NDArray[np.int64]]:
    """The problem over the blocks ``mask`` (bool [B]).

    Also returns, for each of these blocks b, its place [b, 2] (unit, bundle) and the scheme [b, C] (column of
    ``losses``) that each choice gives it.
    """
    index = np.flatnonzero(mask)
    blocks = losses.blocks[index]
    column = {scheme: number for number, scheme in enumerate(losses.schemes)}
    scheme = np.repeat([[column[candidate] for candidate in candidates]], len(blocks), 0)
    fixed = np.zeros(len(blocks), bool)
    for selector, fixed_scheme in constraints.fixed:
        selected = select(selector, losses.blocks)[index]
        scheme[selected], fixed[selected] = column[fixed_scheme], True
    at = np.arange(len(blocks))[:, None]
    loss, bits = losses.loss[index][at, scheme], losses.bits[index][at, scheme]
    compute, longest, memory = (each[index][at, scheme] for each in (times.compute, times.longest, times.memory))
    allowed = np.ones(scheme.shape, bool)
    for selector, floor in constraints.min_bits:
        selected = select(selector, losses.blocks)[index]
        allowed[selected] = bits[selected] >= floor * blocks.params[selected, None]
    _check_some_allowed(allowed, blocks, candidates)

    place, slot = _places(blocks, granularity, constraints)
    units, bundles = place.max(0) + 1
    shape = (units, bundles, len(candidates))
    launches = 1 if granularity in ("layer", "uniform") else int(slot.max()) + 1
    unit, bundle = place.T
    ok = np.ones(shape, bool)
    np.logical_and.at(ok, (unit, bundle), allowed)
    free = np.zeros(shape[:2], bool)
    free[unit[~fixed], bundle[~fixed]] = True
    ok[~free, 1:] = False  # fixed and padding bundles have one choice
    total_loss, total_bits = np.zeros(shape), np.zeros(shape, np.int64)
    np.add.at(total_loss, (unit, bundle), loss)
    np.add.at(total_bits, (unit, bundle), bits)
    by_domain = np.zeros((len(losses.by_domain), *shape))
    for total, part in zip(by_domain, losses.by_domain, strict=True):
        np.add.at(total, (unit, bundle), part[index][at, scheme])
    sets = np.zeros((*shape, len(losses.schemes)), bool)
    sets[unit[:, None], bundle[:, None], np.arange(len(candidates)), scheme] = True
    sides = [np.zeros((*shape, launches)) for _ in range(3)]  # compute, longest, memory
    layers = np.unique(blocks.layer)
    if granularity in ("layer", "uniform"):  # a choice decides whole launches, so their times are plain numbers
        for layer, launch in product(layers, range(LAUNCHES)):
            of = (blocks.layer == layer) & (blocks.launch == launch)
            time = np.maximum(compute[of].sum(0) + longest[of].max(0), memory[of].sum(0))
            sides[0][*place[of][0], :, 0] += time + times.launch_us[launch, scheme[of]].max(0)
        constant_us = 0.0
    else:
        cells = (unit[:, None], bundle[:, None], np.arange(len(candidates)), slot[:, None])
        np.add.at(sides[0], cells, compute)
        np.maximum.at(sides[1], cells, longest)
        np.add.at(sides[2], cells, memory)
        constant_us = float(times.launch_us[:, scheme].max((1, 2)).sum()) * len(layers)
    params = int(blocks.params.sum())
    problem = Problem(
        loss=total_loss,
        bits=total_bits,
        allowed=ok,
        compute=sides[0],
        longest=sides[1],
        memory=sides[2],
        scheme_sets=sets,
        constant_us=constant_us,
        budget=budget_in_bits(budget_bits, params),
        params=params,
        max_schemes=constraints.max_schemes,
        by_domain=by_domain,
    )
    return problem, place, scheme


def _check_some_allowed(allowed: NDArray[np.bool_], blocks: Blocks, candidates: list[Scheme]) -> None:
    """Raise when minimum bits leave a block without a scheme."""
    stuck = np.flatnonzero(~allowed.any(1))
    if len(stuck):
        raise UserError(
            f"{blocks.name(stuck[0])}: no candidate has the minimum bits; candidates are "
            f"{', '.join(map(str, candidates))}"
        )


def _places(blocks: Blocks, granularity: str, constraints: Constraints) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Unit and bundle of every block [B, 2], and which launch of its unit it belongs to [B]."""
    zero = np.zeros(len(blocks), np.int64)
    whole_layer = constraints.max_schemes is not None  # the schemes of both launches count together
    kind = np.where(constraints.tie_gate_up, blocks.launch, blocks.kind)
    if granularity == "block":
        unit_keys = (blocks.layer, zero if whole_layer else blocks.launch)
        bundle_keys = (blocks.expert, kind)
        slot = blocks.launch if whole_layer else zero
    elif granularity == "expert":
        unit_keys, bundle_keys, slot = (blocks.layer, zero), (blocks.expert, zero), blocks.launch
    elif granularity == "layer":
        unit_keys, bundle_keys, slot = (blocks.layer, zero), (zero, zero), zero
    else:
        unit_keys, bundle_keys, slot = (zero, zero), (zero, zero), zero
    unit = np.unique(np.stack(unit_keys, 1), axis=0, return_inverse=True)[1].ravel()
    place = np.zeros((len(blocks), 2), np.int64)
    place[:, 0] = unit
    for number in range(unit.max() + 1):
        of = unit == number
        place[of, 1] = np.unique(np.stack(bundle_keys, 1)[of], axis=0, return_inverse=True)[1].ravel()
    return place, slot
