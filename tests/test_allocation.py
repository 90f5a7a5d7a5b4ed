"""The solver against enumeration on small random problems."""

import itertools
import pkgutil
from collections.abc import Iterator

import numpy as np
import pytest
from numpy.typing import NDArray

from mxmoe_steps import allocation
from mxmoe_steps.allocation.hull import lower_left_hull
from mxmoe_steps.allocation.minimize import minimize, prove_by_cp_sat
from mxmoe_steps.allocation.pick import Part, Vertex, objective, pick_by_r, pick_under_ceiling
from mxmoe_steps.allocation.problem import IDLE, Kernels, Problem
from mxmoe_steps.allocation.relaxation import Relaxation, starts
from mxmoe_steps.provenance import closure

R_VALUES = (0.0, 0.2, 0.5, 0.75, 0.9, 1.0)


def random_problem(seed: int) -> Problem:
    """A problem of at most a few thousand assignments, with ties, forbidden choices and active maxima.

    Kernels that carry more take longer. Layers have one or two variants, units one or two launches.
    """
    generator = np.random.default_rng(seed)
    shape_of = [((1,), 1), ((1, 1), 1), ((1,), 2), ((1, 1, 1), 1), ((2,), 1), ((1, 2), 1), ((2, 2), 1), ((2, 1), 2)]
    variants, launches = shape_of[seed % 8]
    per_variant = int(generator.integers(1, 3)) if launches == 1 and len(variants) < 3 else 1
    layer = np.repeat(np.arange(len(variants)), variants)
    variant = np.repeat(np.arange(len(layer)), per_variant)
    units = len(variant)
    taken = len(variants) * per_variant
    bundles = int(generator.integers(1, 1 + max(2, 6 // (taken * launches))))
    choices = int(generator.integers(2, 5 if taken * bundles < 5 else 4))
    shape = (units, bundles, choices)
    integers = seed % 3 == 0  # ties
    draw = (lambda size: generator.integers(0, 4, size).astype(float)) if integers else generator.random
    bits = np.sort(generator.integers(1, 9, shape), axis=2) * generator.choice([1, 2, 8], (units, bundles, 1))
    loss = draw(shape) * (1.0 if integers else 10.0 ** generator.uniform(-3, 1, (units, bundles, 1)))
    allowed = generator.random(shape) < 0.9
    allowed[..., 0] |= ~allowed.any(2)
    uses = np.broadcast_to(1 << generator.integers(0, 3, choices), shape).copy()
    loops, kernels, rows = generator.choice([0.0, 0.1, 1.0], 3), [], []
    for unit in range(units):
        own = {0}
        for use in np.unique(uses[unit][allowed[unit]]).tolist():
            own |= {use | other for other in own}
        compute, memory = draw((*shape[1:], launches)), draw((*shape[1:], launches)) * generator.choice([0.5, 1.0, 2.0])
        longest = generator.choice([0.0, 0.5, 1.0, 1.5], (*shape[1:], launches))
        for carries in sorted(own - {0}):
            more = carries.bit_count() - 1
            kernels.append((unit, carries, len(rows), 1.0 + loops[0] * more + variant[unit] % 2))
            rows.append((compute + loops[1] * more, longest + loops[1] * more, memory + loops[2] * more / 4))
    sides = (np.stack(part) for part in zip(*rows, strict=True))
    fewest = np.add.reduceat(np.where(allowed, bits, 10**6).min(2).sum(1), starts(variant))
    most = np.add.reduceat(np.where(allowed, bits, 0).max(2).sum(1), starts(variant))
    first = starts(layer)
    budget = int(
        generator.integers(np.minimum.reduceat(fewest, first).sum(), np.maximum.reduceat(most, first).sum() + 1)
    )
    return Problem(
        loss, bits, allowed, uses, *sides, Kernels(*map(np.array, zip(*kernels, strict=True))),
        variant, layer, budget, int(bits.sum()),
    )  # fmt: skip


def assignments(problem: Problem) -> Iterator[NDArray[np.int64]]:
    """All of them, within the budget or not."""
    ways = [np.flatnonzero(problem.layer == layer) for layer in np.unique(problem.layer)]
    for variants in itertools.product(*ways):
        units = np.flatnonzero(np.isin(problem.variant, variants))
        options = [np.flatnonzero(row) for row in problem.allowed[units].reshape(-1, problem.allowed.shape[2])]
        for picked in itertools.product(*options):
            choice = np.full(problem.loss.shape[:2], IDLE)
            choice[units] = np.array(picked).reshape(len(units), -1)
            yield choice


def evaluated(problem: Problem, choice: NDArray[np.int64]) -> tuple[float, float, int]:
    """Loss, time and bits of an assignment, from the definition."""
    loss, time_us, bits = 0.0, 0.0, 0
    for unit in np.flatnonzero(choice[:, 0] != IDLE).tolist():
        own = list(enumerate(choice[unit].tolist()))
        loss += sum(problem.loss[unit, n, c] for n, c in own)
        bits += sum(int(problem.bits[unit, n, c]) for n, c in own)
        used = 0
        for n, c in own:
            used |= int(problem.uses[unit, n, c])
        of = (problem.kernels.unit == unit) & (problem.kernels.carries == used)
        row, us = int(problem.kernels.row[of][0]), float(problem.kernels.us[of][0])
        time_us += us
        for j in range(problem.compute.shape[3]):
            compute, longest, memory = ([part[row, n, c, j] for n, c in own]
                                        for part in (problem.compute, problem.longest, problem.memory))  # fmt: skip
            time_us += max(sum(compute) + max(longest), sum(memory))
    return loss, time_us, bits


def enumerate_all(problem: Problem) -> list[tuple[float, float]]:
    """(loss, time) of every feasible assignment."""
    found = (evaluated(problem, choice) for choice in assignments(problem))
    return [(loss, time_us) for loss, time_us, bits in found if bits <= problem.budget]


def as_part(problem: Problem, gap: float = 0.0) -> Part:
    hull = lower_left_hull(problem, gap)
    vertices = [Vertex(p.loss, p.time_us, p.bits, 0.0, "") for p in hull.solutions]
    for solution in hull.solutions:
        found = evaluated(problem, solution.choice)
        assert found == pytest.approx((solution.loss, solution.time_us, solution.bits), rel=1e-12, abs=1e-12)
        assert solution.bits <= problem.budget
        taken = solution.choice[:, 0] != IDLE
        assert np.take_along_axis(problem.allowed[taken], solution.choice[taken][..., None], 2).all()
        assert np.unique(problem.layer[np.unique(problem.variant[taken])]).tolist() == np.unique(problem.layer).tolist()
    return Part(vertices, hull.cuts)


@pytest.mark.parametrize("seed", range(300))
def test_hull_is_optimal_for_every_r(seed):
    problem = random_problem(seed)
    everything = enumerate_all(problem)
    part = as_part(problem)
    for loss, time_us in everything:
        for a, b, bound in part.cuts:
            assert a * loss + b * time_us >= bound - 1e-9
    for r in R_VALUES:
        for power in (0.5, 1.0):
            vertex, value, bound = pick_by_r(part, r, power)
            best = min(objective(*point, r, power) for point in everything)
            assert value == pytest.approx(best, rel=1e-9, abs=1e-12)
            assert bound <= value
            assert bound == pytest.approx(best, rel=1e-7, abs=1e-7)
            if r in (0.0, 1.0) or vertex.loss_sum == 0:  # ties break by the other quantity
                tied = [p for p in everything if objective(*p, r, power) <= best * (1 + 1e-12)]
                least = min(p[int(r > 0)] for p in tied)
                assert (vertex.loss_sum, vertex.time_us)[int(r > 0)] == pytest.approx(least, rel=1e-7)


@pytest.mark.parametrize("seed", range(60))
def test_one_weighted_sum(seed):
    problem = random_problem(seed)
    everything = enumerate_all(problem)
    relaxation = Relaxation(problem)
    for a, b in ((1.0, 1.0), (3.0, 0.1), (0.0, 1.0), (1.0, 0.0)):
        solution = minimize(relaxation, a, b)
        best = min(a * loss + b * time_us for loss, time_us in everything)
        assert solution.value == pytest.approx(best, rel=1e-9)
        assert solution.bound <= best + 1e-9
        assert solution.bound == pytest.approx(best, rel=1e-9, abs=1e-9)


@pytest.mark.parametrize("seed", range(40))
def test_ceiling_bound_holds(seed):
    problem = random_problem(seed)
    everything = enumerate_all(problem)
    part = as_part(problem)
    times = [v.time_us for v in part.vertices]
    ceiling = (min(times) + max(times)) / 2
    _, value, bound = pick_under_ceiling([part], ceiling, None)
    best = min(loss for loss, time_us in everything if time_us <= ceiling)
    assert bound <= best + 1e-9 <= value + 1e-8


def layer_sized_problem(seed: int, launches_overlap: float) -> Problem:
    """Two launches of 40 and more bundles; ``launches_overlap`` sets how close compute and memory are."""
    generator = np.random.default_rng(seed)
    shape = (2, 40, 5)
    bits = np.array([2, 3, 4, 6, 8]) * generator.choice([16, 64], (2, 40, 1))
    loss = (
        generator.lognormal(0, 1, (2, 40, 1)) * 4.0 ** -np.array([2, 3, 4, 6, 8]) * generator.lognormal(0, 0.2, shape)
    )
    memory = bits[..., None] * 1e-3
    compute = generator.uniform(0.5, 1.5, (*shape, 1)) * 0.1 * launches_overlap
    tiles = generator.choice([0.1, 0.2, 0.3], (*shape, 1))
    uses = np.broadcast_to(1 << np.arange(5), shape).copy()
    kernels, sides = [], []
    for unit in range(2):
        for carries in range(1, 32):
            more = 1e-3 * (carries.bit_count() - 1)
            kernels.append((unit, carries, len(sides), 2.5 + 10 * more))
            sides.append((compute[unit] * (1 + more), tiles[unit], memory[unit]))
    return Problem(
        loss, bits, np.ones(shape, bool), uses, *map(np.stack, zip(*sides, strict=True)),
        Kernels(*map(np.array, zip(*kernels, strict=True))), np.arange(2), np.arange(2),
        int(bits[..., 2].sum()), int(bits[..., 0].sum()),
    )  # fmt: skip


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("overlap", [0.1, 1.0, 2.0])
def test_cp_sat_confirms_the_states(seed, overlap):
    relaxation = Relaxation(layer_sized_problem(seed, overlap))
    accurate = minimize(relaxation, 1.0, 0.0)
    for r in (0.9, 0.5):
        solution = minimize(relaxation, r / accurate.loss, (1 - r) / accurate.time_us)
        proven = prove_by_cp_sat(relaxation, solution)  # raises if CP-SAT finds a better one
        assert proven.bound == pytest.approx(solution.value, rel=1e-9)
        assert solution.bound == pytest.approx(solution.value, rel=1e-9)


@pytest.mark.parametrize("seed", range(100))
def test_cp_sat_confirms_small_problems(seed):
    relaxation = Relaxation(random_problem(seed))
    for a, b in ((1.0, 1.0), (1.0, 0.1)):
        proven = prove_by_cp_sat(relaxation, minimize(relaxation, a, b))
        assert proven.bound == pytest.approx(proven.value, rel=1e-8, abs=1e-8)


@pytest.mark.parametrize("seed", range(40))
def test_gap_bounds_what_a_coarse_frontier_misses(seed):
    problem = random_problem(seed)
    everything = enumerate_all(problem)
    part = as_part(problem, gap=0.05)
    for r in R_VALUES:
        _, value, bound = pick_by_r(part, r, 0.5)
        best = min(objective(*point, r, 0.5) for point in everything)
        assert bound * (1 - 1e-9) <= best <= value * (1 + 1e-9)


def test_costs_need_no_wall_clock():
    """The same problem gives the same bytes, however often."""
    problem = layer_sized_problem(0, 1.0)
    hulls = [lower_left_hull(problem, 0.0) for _ in range(2)]
    assert [p.choice.tobytes() for p in hulls[0].solutions] == [p.choice.tobytes() for p in hulls[1].solutions]
    assert hulls[0].cuts == hulls[1].cuts


def test_the_allocation_knows_no_kernels_and_no_time_model():
    for module in pkgutil.iter_modules(allocation.__path__, "mxmoe_steps.allocation."):
        needed = {name.split(".")[1] for name in closure(module.name) if "." in name}
        assert not needed & {"kernels", "timing", "inference"}, module.name
