"""Lower bounds: the Lagrangian dual of the budget and of every launch's maximum.

With a price ``lam`` per bit and, for each launch, its time's weight split into ``alpha`` on the compute side and
``beta`` on the memory side (max(A, B) >= (alpha A + beta B) / (alpha + beta)), the problem falls apart into
groups inside modes. The best prices come from Dantzig-Wolfe column generation: a column is a whole assignment of
one unit, the restricted master a small linear program, and columns stay valid for every later (a, b).
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from ortools.linear_solver import pywraplp

from mxmoe_steps.allocation.problem import Problem

CONVERGED = 1e-9  # relative gap between master and bound at which column generation stops


@dataclass(frozen=True)
class Bound:
    """A proven bound on a x loss + b x (time - constant) over the feasible assignments, and its prices."""

    a: float
    b: float
    bound: float
    lam: float  # price of a bit
    alpha: NDArray[np.float64]  # [U, J] price of compute time
    beta: NDArray[np.float64]  # [U, J] price of memory time
    ceiling: float  # price of the time ceiling, part of alpha + beta


def item_values(problem: Problem, dual: Bound) -> NDArray[np.float64]:
    """Lagrangian cost of every choice, [U, G, C]."""
    values = dual.a * problem.loss + dual.lam * problem.bits
    values += (problem.compute * dual.alpha[:, None, None] + problem.memory * dual.beta[:, None, None]).sum(3)
    return values


def price(
    problem: Problem, values: NDArray[np.float64], alpha: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """The cheapest assignment of every unit: its cost [U] and choice [U, G]."""
    units, groups = values.shape[:2]
    best, choice = np.full(units, np.inf), np.zeros((units, groups), np.int64)
    for mask, cap in zip(*problem.modes, strict=True):
        inside = np.where(mask, values, np.inf)
        chosen = inside.argmin(2)
        total = np.take_along_axis(inside, chosen[..., None], 2)[..., 0].sum(1) + (alpha * cap).sum(1)
        better = total < best
        best[better], choice[better] = total[better], chosen[better]
    return best, choice


class Relaxation:
    """The restricted master problem; `solve` minimises a x loss + b x time over mixtures of its columns."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        units, _, _, launches = problem.compute.shape
        self.shape = (units, launches)
        cheapest, choice = price(problem, problem.bits.astype(float), np.zeros(self.shape))
        self.smallest_bits = int(cheapest.sum())
        self.time_scale = problem.launch_times(choice).sum() or 1.0
        lp = self.lp = pywraplp.Solver.CreateSolver("GLOP")
        lp.SetSolverSpecificParametersAsString(
            "primal_feasibility_tolerance: 1e-10 dual_feasibility_tolerance: 1e-10 solution_feasibility_tolerance: 1e-8"
        )
        infinity = lp.infinity()
        self.convex = [lp.Constraint(1, 1) for _ in range(units)]
        self.budget = lp.Constraint(-infinity, problem.budget / problem.params)
        ceiling = infinity
        if problem.max_time_us is not None:
            ceiling = (problem.max_time_us - problem.constant_us) / self.time_scale
        self.ceiling = lp.Constraint(-infinity, ceiling)
        self.time = [[lp.NumVar(0, infinity, "") for _ in range(launches)] for _ in range(units)]
        self.compute = [[lp.Constraint(0, infinity) for _ in range(launches)] for _ in range(units)]
        self.memory = [[lp.Constraint(0, infinity) for _ in range(launches)] for _ in range(units)]
        for unit in range(units):
            for launch in range(launches):
                self.compute[unit][launch].SetCoefficient(self.time[unit][launch], 1)
                self.memory[unit][launch].SetCoefficient(self.time[unit][launch], 1)
                self.ceiling.SetCoefficient(self.time[unit][launch], 1)
        self.columns: list[tuple[pywraplp.Variable, float]] = []
        self.known: set[tuple[int, bytes]] = set()
        self.add_columns(choice, np.arange(units))

    def add_columns(self, choice: NDArray[np.int64], units: NDArray[np.int64]) -> int:
        """Add the assignments ``choice`` [U, G] of the named units; returns how many were new."""
        p = self.problem
        index = choice[..., None]
        loss, bits = (np.take_along_axis(part, index, 2).sum((1, 2)) for part in (p.loss, p.bits))
        compute, longest, memory = (
            np.take_along_axis(part, index[..., None], 2)[:, :, 0] for part in (p.compute, p.longest, p.memory)
        )
        compute = (compute.sum(1) + longest.max(1)) / self.time_scale
        memory = memory.sum(1) / self.time_scale
        added = 0
        for unit in units.tolist():
            key = (unit, choice[unit].astype(np.int8).tobytes())
            if key in self.known:
                continue
            self.known.add(key)
            added += 1
            variable = self.lp.NumVar(0, self.lp.infinity(), "")
            self.columns.append((variable, float(loss[unit])))
            self.convex[unit].SetCoefficient(variable, 1)
            self.budget.SetCoefficient(variable, int(bits[unit]) / p.params)
            for launch in range(self.shape[1]):
                self.compute[unit][launch].SetCoefficient(variable, -float(compute[unit, launch]))
                self.memory[unit][launch].SetCoefficient(variable, -float(memory[unit, launch]))
        return added

    def solve(self, a: float, b: float) -> Bound:
        """The best bound on a x loss + b x time."""
        p, lp = self.problem, self.lp
        objective = lp.Objective()
        objective.Clear()
        for row in self.time:
            for variable in row:
                objective.SetCoefficient(variable, b * self.time_scale)
        new = 0
        best = Bound(a, b, -np.inf, 0.0, np.zeros(self.shape), np.zeros(self.shape), 0.0)
        while True:
            for variable, loss in self.columns[new:]:
                objective.SetCoefficient(variable, a * loss)
            new = len(self.columns)
            if lp.Solve() != pywraplp.Solver.OPTIMAL:
                raise RuntimeError("the master problem has no optimum")
            dual = self._prices(a, b)
            cost, choice = price(p, item_values(p, dual), dual.alpha)
            value = float(cost.sum()) - dual.lam * p.budget
            if p.max_time_us is not None:
                value -= dual.ceiling * (p.max_time_us - p.constant_us)
            if value > best.bound:
                best = Bound(a, b, value, dual.lam, dual.alpha, dual.beta, dual.ceiling)
            master = objective.Value()
            if master - best.bound <= CONVERGED * abs(master):
                return best
            promised = np.array([row.dual_value() for row in self.convex])
            if not self.add_columns(choice, np.flatnonzero(cost < promised - 1e-14 * abs(master))):
                return best

    def _prices(self, a: float, b: float) -> Bound:
        """Prices of the master's rows, made exactly dual feasible."""
        lam = max(0.0, -self.budget.dual_value()) / self.problem.params
        ceiling = max(0.0, -self.ceiling.dual_value()) / self.time_scale
        compute, memory = (
            np.array([[max(0.0, row.dual_value()) for row in rows] for rows in side])
            for side in (self.compute, self.memory)
        )
        total = compute + memory
        share = np.divide(compute, total, out=np.full(self.shape, 0.5), where=total > 0)
        weight = b + ceiling
        return Bound(a, b, 0.0, lam, share * weight, (1 - share) * weight, ceiling)
