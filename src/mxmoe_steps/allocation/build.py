"""From tables of losses and times to the arrays of an allocation problem."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mxmoe_steps.allocation.blocks import Blocks, Losses, budget_in_bits
from mxmoe_steps.allocation.constraints import Constraints, select
from mxmoe_steps.allocation.problem import IDLE, Kernels, Problem
from mxmoe_steps.allocation.times import DOWN, LAUNCHES, Times, layer_times
from mxmoe_steps.errors import UserError
from mxmoe_steps.schemes import BLOCKS, Scheme

MOST_SETS = 256  # of a unit's kernels: all that eight schemes make
FEW = 3  # schemes of a launch that is timed by what it carries where there are more; others carry all
WHOLE = ("layer", "uniform")  # granularities at which a choice decides all of a launch


@dataclass(frozen=True)
class Blocked:
    """The B blocks of a problem and what choice c does to block b: all [B, C].

    ``scheme``: column of the losses. ``free`` [B]: whether nothing fixes the block.
    """

    blocks: Blocks
    scheme: NDArray[np.int64]
    loss: NDArray[np.float64]
    bits: NDArray[np.int64]
    allowed: NDArray[np.bool_]
    free: NDArray[np.bool_]
    by_domain: NDArray[np.float64]  # [D, B, C]

    def __getitem__(self, index: NDArray[np.int64]) -> "Blocked":
        parts = {name: part[index] for name, part in vars(self).items() if name != "by_domain"}
        return replace(self, **parts, by_domain=self.by_domain[:, index])


@dataclass(frozen=True)
class Unit:
    """One unit before padding: arrays over its N bundles as in `Problem`, and rows of times [R, N, C, J].

    ``kernels``: what each carries, its row and its constant time.
    """

    loss: NDArray[np.float64]
    bits: NDArray[np.int64]
    allowed: NDArray[np.bool_]
    by_domain: NDArray[np.float64]
    uses: NDArray[np.int64]
    sides: NDArray[np.float64]  # [3, R, N, C, J]: compute, longest, memory
    kernels: list[tuple[int, int, float]]


@dataclass(frozen=True)
class Assigned:
    """Where the solver's choices are: unit and bundle of every block in every variant [W, B, 2], its schemes [B, C]."""

    place: NDArray[np.int64]
    scheme: NDArray[np.int64]

    def schemes(self, choice: NDArray[np.int64]) -> NDArray[np.int64]:
        """The scheme (column of the losses) that an assignment [U, N] gives every block, [B]."""
        taken = np.where(self.place[..., 0] < 0, IDLE, choice[self.place[..., 0], self.place[..., 1]])
        return self.scheme[np.arange(len(self.scheme)), taken.max(0)]


def build_problem(
    losses: Losses,
    candidates: list[Scheme],
    times: Times,
    granularity: str,
    budget_bits: str,
    constraints: Constraints,
    mask: NDArray[np.bool_],
) -> tuple[Problem, Assigned]:
    """The problem over the blocks ``mask`` (bool [B]), and what its choices mean for them."""
    made = _choices(losses, candidates, constraints, mask)
    times, blocks = times.of(mask), made.blocks
    units: list[Unit] = []
    variant: list[int] = []
    layer: list[int] = []
    places = []
    for number, members in enumerate(_layers(blocks, granularity)):
        here = made[members]
        for built in _variants(here, times.of(np.isin(np.arange(len(blocks)), members)), granularity, constraints):
            place = np.full((len(blocks), 2), IDLE)
            for unit, own, bundle in built:
                place[members[own]] = np.stack([np.full(len(bundle), len(units)), bundle], 1)
                units.append(unit)
                variant.append(len(layer))
            layer.append(number)
            places.append(place)
        if number not in layer:
            raise UserError(f"no allocation uses at most {constraints.max_schemes} schemes in every layer; allow more")
    params = int(blocks.params.sum())
    budget = budget_in_bits(budget_bits, params)
    return _padded(units, np.array(variant), np.array(layer), budget, params), Assigned(np.array(places), made.scheme)


def _choices(losses: Losses, candidates: list[Scheme], constraints: Constraints, mask: NDArray[np.bool_]) -> Blocked:
    """What every choice, a candidate, does to every block of ``mask``, whose scheme may be fixed."""
    index = np.flatnonzero(mask)
    blocks = losses.blocks[index]
    column = {scheme: number for number, scheme in enumerate(losses.schemes)}
    scheme = np.repeat([[column[candidate] for candidate in candidates]], len(blocks), 0)
    free = np.ones(len(blocks), bool)
    for selector, fixed_scheme in constraints.fixed:
        selected = select(selector, losses.blocks)[index]
        scheme[selected], free[selected] = column[fixed_scheme], False
    at = np.arange(len(blocks))[:, None]
    bits = losses.bits[index][at, scheme]
    allowed = np.ones(scheme.shape, bool)
    for selector, floor in constraints.min_bits:
        selected = select(selector, losses.blocks)[index]
        allowed[selected] = bits[selected] >= floor * blocks.params[selected, None]
    stuck = np.flatnonzero(~allowed.any(1))
    if len(stuck):
        raise UserError(
            f"{blocks.name(stuck[0])}: no candidate has the minimum bits; candidates are "
            f"{', '.join(map(str, candidates))}"
        )
    by_domain = losses.by_domain[:, index[:, None], scheme]
    return Blocked(blocks, scheme, losses.loss[index][at, scheme], bits, allowed, free, by_domain)


def _layers(blocks: Blocks, granularity: str) -> list[NDArray[np.int64]]:
    """Blocks that are allocated together whatever the prices: those of a layer, or all."""
    if granularity == "uniform":
        return [np.arange(len(blocks))]
    return [np.flatnonzero(blocks.layer == layer) for layer in np.unique(blocks.layer)]


def _variants(
    here: Blocked, times: Times, granularity: str, constraints: Constraints
) -> Iterator[list[tuple[Unit, NDArray[np.int64], NDArray[np.int64]]]]:
    """The units of every variant of a layer, each with the blocks that are its own and their bundles."""
    blocks, most = here.blocks, constraints.max_schemes
    everything = np.arange(len(blocks))
    if granularity in WHOLE:
        few = np.ones(here.scheme.shape[1], bool)
        if most is not None:
            counts = [[len(np.unique(column)) for column in here.scheme[blocks.layer == layer].T]
                      for layer in np.unique(blocks.layer)]  # fmt: skip
            few = np.max(counts, 0) <= most
        bundle = np.zeros(len(blocks), np.int64)
        unit = _unit(here, here.allowed & few, bundle, times, None)
        if unit is not None:
            yield [(unit, everything, bundle)]
        return
    gate, up = (np.flatnonzero(blocks.kind == BLOCKS.index(name)) for name in ("gate", "up"))
    one_scheme = np.ones(here.scheme.shape, bool)
    if len(gate):  # experts of some families have none
        one_scheme[gate] = one_scheme[up] = here.scheme[gate] == here.scheme[up]
    tied = constraints.tie_gate_up or granularity == "expert"
    gated_ways = [True] if (tied and (one_scheme | ~here.allowed).all()) or not len(gate) else [True, False]
    schemes = np.unique(here.scheme[here.allowed])
    named = [schemes] if most is None or most >= len(schemes) else combinations(schemes.tolist(), most)
    for some in map(np.array, named):
        allowed = here.allowed & np.isin(here.scheme, some)
        for gated in gated_ways:
            units = []
            bundle_kind = blocks.launch if gated or tied else blocks.kind
            for launch in [None] if granularity == "expert" else range(LAUNCHES):
                own = everything if launch is None else np.flatnonzero(blocks.launch == launch)
                kind = np.zeros(len(own), np.int64) if launch is None else bundle_kind[own]
                bundle = np.unique(np.stack([blocks.expert[own], kind], 1), axis=0, return_inverse=True)[1].ravel()
                inside = (allowed & one_scheme if gated else allowed)[own]
                unit = _unit(here[own], inside, bundle, times.of(np.isin(everything, own)), gated)
                units.append((unit, own, bundle))
            if all(unit is not None for unit, *_ in units):
                yield [(unit, own, bundle) for unit, own, bundle in units if unit is not None]


def _unit(
    here: Blocked, allowed: NDArray[np.bool_], bundle: NDArray[np.int64], times: Times, gated: bool | None
) -> Unit | None:
    """The unit of some blocks in their bundles; None if a bundle has no choice. ``gated`` is None where a choice
    decides all of a launch: then times are plain numbers."""
    bundles, choices = int(bundle.max()) + 1, here.scheme.shape[1]
    shape = (bundles, choices)
    ok = np.ones(shape, bool)
    np.logical_and.at(ok, bundle, allowed)
    free = np.zeros(bundles, bool)
    free[bundle[here.free]] = True
    ok[~free, 1:] = False  # fixed bundles have one choice
    if not ok.any(1).all():
        return None
    loss, bits, by_domain = np.zeros(shape), np.zeros(shape, np.int64), np.zeros((len(here.by_domain), *shape))
    np.add.at(loss, bundle, here.loss)
    np.add.at(bits, bundle, here.bits)
    np.add.at(by_domain.swapaxes(0, 1), bundle, here.by_domain.swapaxes(0, 1))
    if gated is None:
        us = [sum(layer_times(here.blocks, times, here.scheme[:, choice]).values()) for choice in range(choices)]
        sides = np.zeros((3, 1, *shape, 1))
        sides[0, 0, 0, :, 0] = us
        return Unit(loss, bits, ok, by_domain, np.zeros(shape, np.int64), sides, [(0, 0, 0.0)])
    return Unit(loss, bits, ok, by_domain, *_kernels(here, ok, bundle, times, gated))


def _kernels(
    here: Blocked, ok: NDArray[np.bool_], bundle: NDArray[np.int64], times: Times, gated: bool
) -> tuple[NDArray[np.int64], NDArray[np.float64], list[tuple[int, int, float]]]:
    """What choices use, rows of times and kernels of a unit, see `Unit`."""
    launches = np.unique(here.blocks.launch).tolist()
    count = int(times.kernel.max()) + 1
    slot = np.searchsorted(launches, here.blocks.launch)
    uses = np.zeros(ok.shape, np.int64)
    np.bitwise_or.at(uses, bundle, 1 << (times.kernel[here.scheme] + count * slot[:, None]))
    carried = {0}
    for one in np.unique(uses[ok]).tolist():
        carried |= {one | others for others in carried}
    if len(carried) > MOST_SETS:
        everything = max(carried)
        few = [[each >> (count * number) & ((1 << count) - 1) for number in range(len(launches))] for each in carried]
        carried = {each for each, slots in zip(carried, few, strict=True)
                   if each == everything or max(slot.bit_count() for slot in slots) <= FEW}  # fmt: skip
    rows: dict[tuple[tuple[int, int], ...], int] = {}
    sides, kernels = [], []
    for carries in sorted(carried):
        if not (ok & (uses & ~carries == 0)).any(1).all():
            continue
        us, row = 0.0, []
        for number, launch in enumerate(launches):
            schemes = (carries >> (count * number + times.kernel)) & 1 == 1
            loops = times.loops(launch, schemes)
            us += times.launch_us + times.loop_us * loops
            row.append((times.phase(schemes), loops if times.slower else 0))
            if launch == DOWN and (not gated or times.quantized[schemes].any()):
                us += times.between_us
        if tuple(row) not in rows:
            rows[tuple(row)] = len(rows)
            sides.append(_sides(here, ok.shape, bundle, slot, times, gated, row))
        kernels.append((carries, rows[tuple(row)], us))
    return uses, np.stack(sides, 1), kernels


def _sides(
    here: Blocked, shape: tuple[int, ...], bundle: NDArray[np.int64], slot: NDArray[np.int64], times: Times,
    gated: bool, row: list[tuple[int, int]],
) -> NDArray[np.float64]:  # fmt: skip
    """Compute, longest and memory of the bundles, [3, N, C, J], in kernels of the phases and loops ``row``."""
    sides = np.zeros((3, *shape, len(row)))
    for number, (phase, loops) in enumerate(row):
        own = np.flatnonzero(slot == number)
        at, of = (own[:, None], here.scheme[own]), times.sides[phase]
        launch = int(here.blocks.launch[own[0]])
        other = loops - of.loops[launch][at[1]]
        between = (times.quantize_us if gated else times.swiglu_us)[at]  # of down blocks; whichever side is larger
        place, (compute, longest, memory) = bundle[own], sides[..., number]
        np.add.at(compute, place, of.compute[at] + other * of.more_compute[at] + between)
        np.maximum.at(longest, place, of.longest[at] + other * of.more_longest[at])
        np.add.at(memory, place, of.memory[at] + other * of.more_memory[at] + between)
    return sides


def _padded(
    units: list[Unit], variant: NDArray[np.int64], layer: NDArray[np.int64], budget: int, params: int
) -> Problem:
    """Units of equal shape, with free bundles added."""
    bundles = max(len(unit.loss) for unit in units)

    def padded(part: NDArray[Any], axis: int) -> NDArray[Any]:
        return np.pad(part, [(0, bundles - part.shape[axis] if dim == axis else 0) for dim in range(part.ndim)])

    def stacked(name: str) -> NDArray[Any]:
        return np.stack([padded(getattr(unit, name), 0) for unit in units])

    allowed = stacked("allowed")
    for number, unit in enumerate(units):
        allowed[number, len(unit.loss) :, 0] = True
    first = np.cumsum([0, *(unit.sides.shape[1] for unit in units)])
    kernels = [(number, carries, first[number] + row, us)
               for number, unit in enumerate(units) for carries, row, us in unit.kernels]  # fmt: skip
    compute, longest, memory = np.concatenate([padded(unit.sides, 2) for unit in units], 1)
    return Problem(
        loss=stacked("loss"),
        bits=stacked("bits"),
        allowed=allowed,
        uses=stacked("uses"),
        compute=compute,
        longest=longest,
        memory=memory,
        kernels=Kernels(*(np.array(column) for column in zip(*kernels, strict=True))),
        variant=variant,
        layer=layer,
        budget=budget,
        params=params,
        by_domain=np.stack([padded(unit.by_domain, 1) for unit in units], 1),
    )
