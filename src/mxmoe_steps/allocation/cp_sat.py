"""A core as a CP-SAT model: it proves what dynamic programming cannot, and checks what it can."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from ortools.sat.python import cp_model

from mxmoe_steps.allocation.core import Core

RESOLUTION = 2**36  # integer steps that the limit is divided into
LARGEST = 2**50  # of an integer coefficient
WORK = 20.0  # deterministic work limit per core, roughly seconds
BRIEF_WORK = 0.2  # the same where a gap is allowed: a tighter bound is worth little there
Terms = list[tuple[cp_model.IntVar, float]]  # variables with their rates, in units of cost


@dataclass(frozen=True)
class Row:
    """Another sum over blocks, of ``values`` [U, N, C], that stays below ``most``, or below the free level if None.

    What it stays below it by costs ``rate`` a unit. Rates of rows below the level, if there are any, sum to 1: they and
    the identity of the core, in which these rows were weighed by their rates, then make the level's own cost.
    """

    values: NDArray[np.float64]
    most: float | None
    rate: float


def solve_by_cp_sat(
    core: Core, near: float = 0.0, work: float = WORK, workers: int = 1, rows: Sequence[Row] = ()
) -> tuple[float, NDArray[np.int64] | None]:
    """A proven bound on the whole identity of `core` and the best assignment; (limit, None) if none is within it.

    It may stop once the bound is within ``near`` of the assignment, and does after ``work``.

    The prices of each unit's base mode serve all its modes: the identity holds for any prices. Costs are integers,
    ``RESOLUTION`` steps to the limit, and the bound is stated after their rounding. ``rows`` couple what the core
    takes apart.
    """
    problem, dual, limit = core.problem, core.dual, core.limit + float(core.shift.sum())
    model = cp_model.CpModel()
    one = model.new_constant(1)
    choices: dict[tuple[int, int], dict[int, cp_model.IntVar]] = {}
    cost: Terms = []
    used: list[tuple[cp_model.IntVar, int]] = []
    flips: list[Terms] = []  # b (1 - mu) (A - B) and b mu (B - A) of every launch, in turn
    for unit in range(len(core.base)):
        modes = np.flatnonzero(core.unit == unit)
        base_mode = core.modes[core.base_mode[unit]]
        split, base_cap = dual.split[base_mode], problem.modes[2][base_mode]
        caps = problem.modes[2][core.modes[modes]]
        share = problem.memory[unit] + split * problem.lead[unit]
        values = dual.a * problem.loss[unit] + dual.lam * problem.bits[unit] + dual.b * share.sum(2)
        flags = [model.new_bool_var("") for _ in modes]
        model.add_exactly_one(flags)
        cost += zip(flags, dual.b * ((caps - base_cap) * split).sum(1), strict=True)
        leads = [(one, np.zeros(len(split))), *zip(flags, caps, strict=True)]
        for bundle in range(core.base.shape[1]):
            base = int(core.base[unit, bundle])
            options = np.flatnonzero(core.alive[modes, bundle].any(0)).tolist()
            if options == [base]:
                leads.append((one, problem.lead[unit, bundle, base]))
                continue
            taken = choices[unit, bundle] = {option: model.new_bool_var("") for option in options}
            model.add_exactly_one(taken.values())
            for option, variable in taken.items():
                cost.append((variable, values[bundle, option] - values[bundle, base]))
                used.append((variable, int(problem.bits[unit, bundle, option] - problem.bits[unit, bundle, base])))
                leads.append((variable, problem.lead[unit, bundle, option]))
                for flag, mode in zip(flags, modes.tolist(), strict=True):
                    if not core.alive[mode, bundle, option]:
                        model.add_implication(variable, flag.negated())
        for launch, mu in enumerate(split):
            for rate in (dual.b * (1 - mu), -dual.b * mu):
                flips.append([(variable, rate * lead[launch]) for variable, lead in leads])
    divisor = math.gcd(*(bits for _, bits in used)) or 1
    most = core.room - sum(min(0, bits) for _, bits in used)
    unused = model.new_int_var(0, max(0, most) // divisor, "")
    extra = cp_model.LinearExpr.weighted_sum([v for v, _ in used], [bits // divisor for _, bits in used])
    model.add(unused + extra == core.room // divisor)
    cost += [(unused, dual.lam * divisor), (one, dual.lam * (core.room % divisor))]
    sums = [_row_terms(row, core, choices, one) for row in rows]
    largest = max(abs(rate) for terms in (cost, *flips, *sums) for _, rate in terms)
    scale = min(RESOLUTION / limit, LARGEST / largest)
    # At most half a step each, and half again for the limit's own; a row counts as a bound and as a cost.
    rounding = len(cost) + sum(map(len, flips)) + 2 * sum(map(len, sums))

    def total(terms: Terms) -> cp_model.LinearExprT:
        rates = [round(float(rate) * scale) for _, rate in terms]
        return cp_model.LinearExpr.weighted_sum([variable for variable, _ in terms], rates)

    objective = [total(cost)]
    for over, under in zip(flips[::2], flips[1::2], strict=True):
        flip = model.new_int_var(0, 2 * LARGEST, "")
        model.add(flip >= total(over))
        model.add(flip >= total(under))
        objective.append(flip)
    level = model.new_int_var(-(2**60), 2**60, "")
    for row, terms in zip(rows, sums, strict=True):
        below: cp_model.LinearExprT = level if row.most is None else math.ceil(row.most * scale) + len(terms)
        model.add(total(terms) <= below)
        objective.append(total([(variable, -row.rate * rate) for variable, rate in terms]))
        if row.most is not None:
            objective.append(round(row.rate * row.most * scale))
    if any(row.most is None for row in rows):
        objective.append(level)
    model.add(sum(objective) <= math.ceil(limit * scale) + rounding)
    model.minimize(sum(objective))

    solver = cp_model.CpSolver()
    solver.parameters.num_workers = workers
    solver.parameters.interleave_search = workers > 1  # the same result however threads are scheduled
    solver.parameters.max_deterministic_time = work
    solver.parameters.absolute_gap_limit = near * scale
    solver.parameters.cp_model_presolve = False  # ortools 9.15 loses optima of these cores in presolve
    status = solver.solve(model)
    if status == cp_model.INFEASIBLE:
        return core.limit, None
    if status == cp_model.MODEL_INVALID:
        raise RuntimeError(model.validate())
    proven = (solver.best_objective_bound - rounding) / scale - float(core.shift.sum())
    if status == cp_model.UNKNOWN:
        return max(0.0, proven), None
    choice = core.base.copy()
    for (unit, bundle), taken in choices.items():
        choice[unit, bundle] = next(option for option, variable in taken.items() if solver.value(variable))
    return max(0.0, proven), choice


def _row_terms(
    row: Row, core: Core, choices: dict[tuple[int, int], dict[int, cp_model.IntVar]], one: cp_model.IntVar
) -> Terms:
    """The sum of a row: that of the base assignment, and what every open choice changes."""
    base = np.take_along_axis(row.values, core.base[..., None], 2)[..., 0]
    terms: Terms = [(one, float(base.sum()))]
    for place, taken in choices.items():
        terms += [(variable, float(row.values[place][option] - base[place])) for option, variable in taken.items()]
    return terms
