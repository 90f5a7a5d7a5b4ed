"""One weighted-sum problem to proven optimality: prices, then the core by states, then by CP-SAT if need be."""

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from mxmoe_steps.allocation.core import Core
from mxmoe_steps.allocation.cp_sat import BRIEF_WORK, WORK, solve_by_cp_sat
from mxmoe_steps.allocation.problem import Problem
from mxmoe_steps.allocation.relaxation import Dual, Relaxation
from mxmoe_steps.allocation.states import least_excess, solve_by_states, whole_stage

EXACT = 1e-11  # relative; what float64 sums over a model's blocks can tell apart
FIRST_LIMIT = 1e-7  # first guess of the distance to the bound, relative; raised until the core holds a solution
RAISE = 2.0
CP_SAT_RAISE = 8.0


@dataclass(frozen=True)
class Solution:
    """An assignment [U, N] with its loss, time (microseconds), bits and the proven bound of its direction."""

    choice: NDArray[np.int64]
    loss: float
    time_us: float
    bits: int
    a: float
    b: float
    bound: float  # on a x loss + b x time
    lam: float

    @property
    def value(self) -> float:
        """Its weighted sum."""
        return self.a * self.loss + self.b * self.time_us


def _value(problem: Problem, dual: Dual, choice: NDArray[np.int64]) -> float:
    """a x loss + b x (time - constant) of an assignment."""
    loss, time_us, _ = problem.evaluate(choice)
    return dual.a * loss + dual.b * (time_us - problem.constant_us)


def _raise_shift(core: Core, assignment: NDArray[np.int64], known: list[int], near: float) -> list[int]:
    """Units, beside the ``known``, whose launches sit between the two sides of their maximum.

    They are those where ``assignment`` costs more than its prices say; their least excess goes into ``core.shift``.
    """
    if core.problem.lead.shape[3] > 1:
        return []
    count = len(core.shift)
    flipped = np.setdiff1d(np.flatnonzero(core.flips(assignment) > near / count), known)
    if not len(flipped):
        return []
    reach = np.where(np.isin(np.arange(count), flipped), core.excess(assignment), core.shift)
    wide = Core(core.problem, core.dual, near * EXACT, reach)
    for unit in flipped.tolist():
        core.shift[unit] = min(reach[unit], least_excess(wide, unit))
    return [int(unit) for unit in flipped]


def minimize(relaxation: Relaxation, a: float, b: float, gap: float = 0.0, workers: int = 1) -> Solution:
    """The assignment of least a x loss + b x time within the budget.

    ``gap``: relative distance to the bound at which the search may stop; 0 asks for the optimum.
    """
    problem = relaxation.problem
    dual = relaxation.solve(a, b)
    scale = abs(dual.bound) + b * problem.constant_us
    near = max(gap, EXACT) * scale
    choice = relaxation.smallest
    value, bound = _value(problem, dual, choice), dual.bound
    limit = first_limit = max(FIRST_LIMIT, relaxation.distance / 4) * scale or FIRST_LIMIT
    shift = np.zeros(len(problem.loss))
    core = Core(problem, dual, first_limit, shift)
    balanced = _raise_shift(core, core.base, [], near)
    bound = max(bound, dual.bound + float(shift.sum()))
    by_states = True
    while value - bound > near:
        base = dual.bound + float(shift.sum())
        core = Core(problem, dual, min(limit, value - base), shift)
        if by_states:
            whole = {unit: whole_stage(core, unit) for unit in balanced}
            proven, assignment = solve_by_states(core, whole)
        else:
            proven, assignment = solve_by_cp_sat(core, near / 2, BRIEF_WORK if gap else WORK, workers)
        bound = max(bound, base + proven)
        if assignment is None:
            if proven < core.limit:  # out of work
                break
            limit *= RAISE if by_states else CP_SAT_RAISE
            continue
        relaxation.distance = proven / scale if scale else 0.0
        if _value(problem, dual, assignment) < value:
            value, choice = _value(problem, dual, assignment), assignment
        if not by_states:
            break
        flipped = _raise_shift(core, assignment, balanced, near)
        by_states = bool(flipped)
        balanced += flipped
        bound = max(bound, dual.bound + float(shift.sum()))
        limit = first_limit if by_states else limit
    loss, time_us, bits = problem.evaluate(choice)
    return Solution(choice, loss, time_us, bits, a, b, min(bound, value) + b * problem.constant_us, dual.lam)


def prove_by_cp_sat(relaxation: Relaxation, solution: Solution, workers: int = 1) -> Solution:
    """``solution`` with the bound that CP-SAT proves on the core up to its value; a better one is a `RuntimeError`."""
    problem = relaxation.problem
    dual = relaxation.solve(solution.a, solution.b)
    constant = solution.b * problem.constant_us
    above = solution.value - constant - dual.bound
    limit = above + EXACT * (abs(dual.bound) + constant)
    proven, assignment = solve_by_cp_sat(Core(problem, dual, limit, np.zeros(len(problem.loss))), workers=workers)
    value = solution.value if assignment is None else _value(problem, dual, assignment) + constant
    if value < solution.value * (1 - 1e-9):
        raise RuntimeError(f"CP-SAT found {value!r}, the states {solution.value!r}")
    bound = dual.bound + proven + constant
    return replace(solution, bound=min(solution.value, max(bound, dual.bound + constant)))
