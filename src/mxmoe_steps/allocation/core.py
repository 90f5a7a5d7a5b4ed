"""One weighted-sum problem to proven optimality.

For any assignment x and the prices of `relaxation`, exactly

    a loss(x) + b time(x) - bound = sum of reduced costs + lam x unused bits + ceiling x unused time
                                    + sum_j max(beta_j (A_j - B_j), alpha_j (B_j - A_j))

with every term at least zero (A_j: compute side of launch j, B_j: memory side). So a choice whose reduced cost
exceeds the gap of a known assignment is out; what remains is the core. Dynamic programming over bits solves
the core without the last two terms, and where they vanish at its optimum that is the proof. Otherwise CP-SAT
solves the core with them.
"""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from ortools.sat.python import cp_model

from mxmoe_steps.allocation.problem import Problem
from mxmoe_steps.allocation.relaxation import Bound, Relaxation, item_values

MAX_STATES = 400_000  # of the dynamic program; beyond, CP-SAT takes the core
FIRST_LIMIT = 1e-7  # first guess of the gap, relative; raised until the core holds a solution
RAISE = 8.0
RESOLUTION = 2**36  # integer steps that CP-SAT divides the gap into
EXACT = 1e-11  # relative; what float64 sums over a model's blocks can tell apart
WORK = 20.0  # CP-SAT's deterministic work limit per core


@dataclass(frozen=True)
class Point:
    """An assignment [U, G] with its loss, time (microseconds), bits and the proven bound of its direction."""

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


class Core:
    """Reduced costs of every choice in every mode under one set of prices."""

    def __init__(self, problem: Problem, dual: Bound) -> None:
        self.problem, self.dual = problem, dual
        masks, caps = problem.modes
        values = item_values(problem, dual)
        inside = np.where(masks, values, np.inf)  # [N, U, G, C]
        floor = inside.min(3)  # [N, U, G]
        total = np.where(np.isfinite(floor).all(2), floor.sum(2) + (dual.alpha * caps).sum(2), np.inf)
        self.base_mode = total.argmin(0)  # [U]
        units = np.arange(total.shape[1])
        self.base = inside.argmin(3)[self.base_mode, units]  # [U, G]: the cheapest assignment
        self.mode_cost = total - total[self.base_mode, units]  # [N, U]
        with np.errstate(invalid="ignore"):
            extra = inside - floor[..., None]
        self.item_cost = np.where(np.isfinite(extra), extra, np.inf)  # [N, U, G, C] inside its mode
        self.base_bits = int(np.take_along_axis(problem.bits, self.base[..., None], 2).sum())

    def survivors(self, limit: float) -> NDArray[np.bool_]:
        """Choices [N, U, G, C] that an assignment within ``limit`` of the bound may use."""
        return self.mode_cost[:, :, None, None] + self.item_cost <= limit

    def solve_by_states(self, limit: float) -> tuple[float, NDArray[np.int64]] | None:
        """Best (reduced cost + lam x unused bits, choice) within ``limit``; None when there is none.

        Raises `OverflowError` when the states outgrow MAX_STATES.
        """
        problem, lam = self.problem, self.dual.lam
        alive = self.survivors(limit)
        room = problem.budget - self.base_bits
        stages = list(self._stages(alive))
        falls = [stage[3].min() if stage[1] >= 0 else 0 for stage in stages]
        rises = [stage[3].max() if stage[1] >= 0 else 0 for stage in stages]
        cost, bits, tag = np.zeros(1), np.zeros(1, np.int64), np.zeros(1, np.int64)
        history = []
        for number, (_, group, costs, deltas) in enumerate(stages):
            new_cost = cost[:, None] + costs[tag]
            new_bits = bits[:, None] + deltas
            fall, rise = sum(falls[number + 1 :]), sum(rises[number + 1 :])
            unused = np.maximum(0, room - new_bits - rise)
            keep = (new_cost + lam * unused <= limit) & (new_bits + fall <= room)
            parent, option = np.nonzero(keep)
            cost, bits = new_cost[parent, option], new_bits[parent, option]
            tag = option if group < 0 else tag[parent]
            if number + 1 < len(stages) and stages[number + 1][0] != stages[number][0]:
                tag = np.zeros_like(tag)
            raw = cost - lam * bits
            order = np.lexsort((raw, bits, tag))
            shifted = (raw - tag * (2 * limit + 2 * lam * abs(bits).max(initial=0) + 1))[order]
            first = np.minimum.accumulate(shifted)
            best = np.r_[True, shifted[1:] < first[:-1]] if len(order) else np.zeros(0, bool)
            order = order[best]
            cost, bits, tag = cost[order], bits[order], tag[order]
            history.append((parent[order], option[order]))
            if not len(cost):
                return None
            if len(cost) > MAX_STATES:
                raise OverflowError("too many states")
        final = cost + lam * (room - bits)
        state = int(final.argmin())
        if bits[state] > room or final[state] > limit:
            return None
        value, choice = float(final[state]), self.base.copy()
        for (unit, group, _, _), (parent, option) in zip(reversed(stages), reversed(history), strict=True):
            if group >= 0:
                choice[unit, group] = option[state]
            state = parent[state]
        return value, choice

    def _stages(self, alive: NDArray[np.bool_]):  # type: ignore[no-untyped-def]
        """Decisions left open: (unit, group or -1 for its mode, cost [tags, options], bits [options])."""
        bits = self.problem.bits
        for unit in range(alive.shape[1]):
            modes = np.flatnonzero(alive[:, unit].any(2).all(1))
            if len(modes) > 1:
                yield unit, -1, self.mode_cost[modes, unit][None], np.zeros(len(modes), np.int64)
            for group in np.flatnonzero(alive[modes, unit].any(0).sum(1) > 1):
                costs = np.where(alive[modes, unit, group], self.item_cost[modes, unit, group], np.inf)
                delta = bits[unit, group] - bits[unit, group, self.base[unit, group]]
                open_ = alive[modes, unit, group].any(0)
                yield unit, int(group), costs, np.where(open_, delta, 0)

    def solve_by_cp_sat(
        self, limit: float, hint: NDArray[np.int64] | None, workers: int
    ) -> tuple[float, NDArray[np.int64] | None]:
        """The whole identity over the core: (proven bound on it, best choice or None within ``limit``)."""
        problem, dual = self.problem, self.dual
        alive = self.survivors(limit)
        model = cp_model.CpModel()
        scale = RESOLUTION / limit
        lagrangian, cap_cost = item_values(problem, dual), dual.alpha * problem.modes[1]  # [U, G, C], [N, U, J]
        lead = problem.compute - problem.memory  # A - B without the longest tile, [U, G, C, J]
        variables, objective, used, flips = {}, [], [], []
        for unit in range(alive.shape[1]):
            modes = np.flatnonzero(alive[:, unit].any(2).all(1)).tolist()
            flags = {mode: model.new_bool_var("") for mode in modes}
            model.add_exactly_one(flags.values())
            base_mode = self.base_mode[unit]
            objective += [
                (flag, (cap_cost[mode, unit] - cap_cost[base_mode, unit]).sum()) for mode, flag in flags.items()
            ]
            leads = [(flag, problem.modes[1][mode, unit]) for mode, flag in flags.items()]
            fixed_lead = np.zeros(lead.shape[3])
            for group in range(alive.shape[2]):
                options = np.flatnonzero(alive[modes, unit, group].any(0)).tolist()
                base = self.base[unit, group]
                if options == [base]:
                    fixed_lead += lead[unit, group, base]
                    continue
                chosen = variables[unit, group] = {option: model.new_bool_var("") for option in options}
                model.add_exactly_one(chosen.values())
                for option, variable in chosen.items():
                    objective.append((variable, lagrangian[unit, group, option] - lagrangian[unit, group, base]))
                    used.append((variable, int(problem.bits[unit, group, option] - problem.bits[unit, group, base])))
                    leads.append((variable, lead[unit, group, option]))
                    for mode, flag in flags.items():
                        if not alive[mode, unit, group, option]:
                            model.add_implication(variable, flag.negated())
                    if hint is not None:
                        model.add_hint(variable, int(hint[unit, group] == option))
            for launch in range(lead.shape[3]):
                flip = model.new_int_var(0, RESOLUTION, "")  # weight x (max(A, B) - its linear share)
                flips.append(flip)
                for rate in (dual.beta[unit, launch], -dual.alpha[unit, launch]):
                    terms = [(variable, round(scale * rate * value[launch])) for variable, value in leads]
                    model.add(flip >= round(scale * rate * fixed_lead[launch]) + _total(terms))
        room = problem.budget - self.base_bits
        divisor = math.gcd(*(delta for _, delta in used)) or 1
        unused = model.new_int_var(0, max(0, room - sum(min(0, d) for _, d in used)) // divisor, "")
        model.add(unused == room // divisor - _total([(v, d // divisor) for v, d in used]))
        cost = _total([(v, round(scale * c)) for v, c in objective]) + sum(flips)
        cost += round(scale * dual.lam * divisor) * unused + round(scale * dual.lam * (room % divisor))
        model.add(cost <= RESOLUTION)
        model.minimize(cost)
        solver = cp_model.CpSolver()
        solver.parameters.num_workers = workers
        solver.parameters.interleave_search = workers > 1  # deterministic whatever the scheduling
        solver.parameters.random_seed = 0
        solver.parameters.cp_model_presolve = False  # ortools 9.15 loses optima of these cores in presolve
        solver.parameters.max_deterministic_time = WORK
        status = solver.solve(model)
        if status == cp_model.INFEASIBLE:
            return limit, None
        rounding = 0.5 * (len(objective) + 2 * len(used) + 1)
        proven = max(0.0, solver.best_objective_bound - rounding) / scale
        if status not in (cp_model.OPTIMAL, cp_model.FEASIBLE):
            return proven, None
        choice = self.base.copy()
        for (unit, group), chosen in variables.items():
            choice[unit, group] = next(option for option, variable in chosen.items() if solver.value(variable))
        return proven, choice


def _total(terms: list) -> cp_model.LinearExprT:
    """Weighted sum of (variable, integer coefficient) pairs."""
    return cp_model.LinearExpr.weighted_sum([v for v, _ in terms], [c for _, c in terms])


def true_value(problem: Problem, dual: Bound, choice: NDArray[np.int64]) -> float:
    """a x loss + b x (time - constant) of an assignment."""
    loss, time_us, _ = problem.evaluate(choice)
    return dual.a * loss + dual.b * (time_us - problem.constant_us)


def minimize(relaxation: Relaxation, a: float, b: float, gap: float = 0.0, workers: int = 1) -> Point:
    """The assignment of least a x loss + b x time within the budget.

    ``gap``: relative distance to the bound at which the search may stop; 0 asks for the optimum.
    """
    problem = relaxation.problem
    dual = relaxation.solve(a, b)
    core = Core(problem, dual)
    scale = abs(dual.bound) + b * problem.constant_us
    limit = FIRST_LIMIT * scale
    found = None
    while found is None:
        found = core.solve_by_states(limit)
        limit *= RAISE
    slack, choice = found
    value = true_value(problem, dual, choice)
    bound = dual.bound + slack
    if value - bound > max(gap, EXACT) * scale:
        limit = value - dual.bound
        slack, better = core.solve_by_cp_sat(limit, choice, workers)
        bound = max(bound, dual.bound + min(slack, limit))
        if better is not None and true_value(problem, dual, better) < value:
            choice = better
    loss, time_us, bits = problem.evaluate(choice)
    return Point(choice, loss, time_us, bits, a, b, bound + b * problem.constant_us, dual.lam)
