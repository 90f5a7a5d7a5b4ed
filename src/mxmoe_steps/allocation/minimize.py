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
    """a x loss + b x time of an assignment."""
    loss, time_us, _ = problem.evaluate(choice)
    return dual.a * loss + dual.b * time_us


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
    excess = core.excess(assignment)
    reach = np.where(np.isin(np.arange(count), flipped), excess + near * EXACT, 0.0)
    wide = Core(core.relaxation, core.dual, core.limit, core.shift, reach=reach)
    for unit in flipped.tolist():
        core.shift[unit] = min(excess[unit], least_excess(wide, unit))
    return [int(unit) for unit in flipped]


def minimize(relaxation: Relaxation, a: float, b: float, gap: float = 0.0, workers: int = 1) -> Solution:
    """The assignment of least a x loss + b x time within the budget.

    ``gap``: relative distance to the bound at which the search may stop; 0 asks for the optimum.
    """
    problem = relaxation.problem
    dual = relaxation.solve(a, b)
    scale = abs(dual.bound)
    near = max(gap, EXACT) * scale
    choice = relaxation.smallest
    value, bound = _value(problem, dual, choice), dual.bound
    limit = first_limit = max(FIRST_LIMIT, relaxation.distance / 4) * scale or FIRST_LIMIT
    shift = np.zeros(len(problem.loss))
    core = Core(relaxation, dual, first_limit, shift)
    balanced = _raise_shift(core, core.base, [], near)
    by_states = True
    while value - bound > near:
        core = Core(relaxation, core.dual, limit, shift, value)
        bound = max(bound, core.bound)
        if value - bound <= near:
            break
        if by_states:
            whole = {unit: whole_stage(core, unit) for unit in balanced if core.base_mode[unit] >= 0}
            proven, assignment = solve_by_states(core, whole)
        else:
            proven, assignment = solve_by_cp_sat(core, near / 2, BRIEF_WORK if gap else WORK, workers)
        bound = max(bound, core.bound + proven)
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
        limit = first_limit if by_states else limit
    loss, time_us, bits = problem.evaluate(choice)
    return Solution(choice, loss, time_us, bits, a, b, min(bound, value), dual.lam)


def prove_by_cp_sat(relaxation: Relaxation, solution: Solution, workers: int = 1) -> Solution:
    """``solution`` with the bound that CP-SAT proves on the core up to its value; a better one is a `RuntimeError`."""
    problem = relaxation.problem
    dual = relaxation.solve(solution.a, solution.b)
    limit = solution.value - dual.bound + EXACT * abs(dual.bound)
    core = Core(relaxation, dual, limit, np.zeros(len(problem.loss)))
    proven, assignment = solve_by_cp_sat(core, workers=workers)
    value = solution.value if assignment is None else _value(problem, dual, assignment)
    if value < solution.value * (1 - 1e-9):
        raise RuntimeError(f"CP-SAT found {value!r}, the states {solution.value!r}")
    return replace(solution, bound=min(solution.value, max(core.bound + proven, dual.bound)))
