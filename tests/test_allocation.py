"""The solver against enumeration on small random problems."""

import itertools

import numpy as np
import pytest

from mxmoe_steps.allocation.hull import lower_left_hull
from mxmoe_steps.allocation.minimize import minimize
from mxmoe_steps.allocation.pick import Part, Vertex, objective, pick_by_r, pick_under_ceiling
from mxmoe_steps.allocation.problem import Problem
from mxmoe_steps.allocation.relaxation import Relaxation

R_VALUES = (0.0, 0.2, 0.5, 0.75, 0.9, 1.0)


def random_problem(seed: int) -> Problem:
    """A problem of at most a few thousand assignments, with ties, forbidden choices and active maxima."""
    generator = np.random.default_rng(seed)
    units, launches = [(1, 1), (2, 1), (1, 2), (3, 1)][seed % 4]
    groups = int(generator.integers(1, 4 if units * launches > 1 else 7))
    if units == 3:
        groups = min(groups, 2)
    choices = int(generator.integers(2, 5 if units * groups < 6 else 4))
    shape = (units, groups, choices)
    integers = seed % 3 == 0  # ties
    draw = (lambda size: generator.integers(0, 4, size).astype(float)) if integers else generator.random
    bits = np.sort(generator.integers(1, 9, shape), axis=2) * generator.choice([1, 2, 8], (units, groups, 1))
    loss = draw(shape) * (1.0 if integers else 10.0 ** generator.uniform(-3, 1, (units, groups, 1)))
    allowed = generator.random(shape) < 0.9
    allowed[..., 0] |= ~allowed.any(2)
    sets = np.zeros((*shape, choices), bool)
    sets[..., np.arange(choices), np.arange(choices)] = True
    tiles = generator.choice([0.0, 0.5, 1.0, 1.5], (*shape, launches))
    smallest = np.where(allowed, bits, 10**6).min(2).sum()
    largest = np.where(allowed, bits, 0).max(2).sum()
    budget = int(generator.integers(smallest, largest + 1))
    compute, memory = draw((*shape, launches)), draw((*shape, launches)) * generator.choice([0.5, 1.0, 2.0])
    return Problem(loss, bits, allowed, compute, tiles, memory, sets, 1.0, budget, int(bits.sum()))


def enumerate_all(problem: Problem) -> list[tuple[float, float]]:
    """(loss, time) of every feasible assignment."""
    units, groups, _ = problem.loss.shape
    options = [np.flatnonzero(row) for row in problem.allowed.reshape(units * groups, -1)]
    found = []
    for picked in itertools.product(*options):
        loss, time_us, bits = problem.evaluate(np.array(picked).reshape(units, groups))
        if bits <= problem.budget:
            found.append((loss, time_us))
    return found


def as_part(problem: Problem, gap: float = 0.0) -> Part:
    hull = lower_left_hull(problem, gap)
    vertices = [Vertex(p.loss, p.time_us, p.bits, 0.0, "") for p in hull.points]
    for point in hull.points:
        assert problem.evaluate(point.choice) == (point.loss, point.time_us, point.bits)
        assert point.bits <= problem.budget
        assert np.take_along_axis(problem.allowed, point.choice[..., None], 2).all()
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
        point = minimize(relaxation, a, b)
        best = min(a * loss + b * time_us for loss, time_us in everything)
        assert point.value == pytest.approx(best, rel=1e-9)
        assert point.bound <= best + 1e-9
        assert point.bound == pytest.approx(best, rel=1e-9, abs=1e-9)


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
