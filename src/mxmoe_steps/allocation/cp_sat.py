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
Picked = dict[tuple[int, int], list[tuple[cp_model.IntVar, int]]]  # (unit, bundle) -> variables and their choices


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

    Every mode of a unit has variables of its own. Costs are integers, ``RESOLUTION`` steps to the limit, and the bound
    is stated after their rounding. ``rows`` couple what the core takes apart.
    """
    problem, dual, limit = core.problem, core.dual, core.limit
    model = cp_model.CpModel()
    one = model.new_constant(1)
    taken = _variants(core, model, one)
    picked: Picked = {}
    cost: Terms = []
    flips: list[Terms] = []  # b (1 - mu) (A - B) and b mu (B - A) of every launch, in turn
    for unit, variant in enumerate(problem.variant.tolist()):
        here = taken[variant]
        if here is None:
            continue
        first = unit in core.relaxation.first_unit
        cost.append((here, float(first * core.over[variant] - core.shift[unit])))
        modes = np.flatnonzero(core.unit == unit).tolist()
        flags = [here] if len(modes) == 1 else [model.new_bool_var("") for _ in modes]
        if len(modes) > 1:
            model.add_exactly_one(*flags, here.negated())
        leads: list[tuple[cp_model.IntVar, NDArray[np.float64], NDArray[np.float64]]] = []  # A - B, with its mu
        for flag, mode in zip(flags, modes, strict=True):
            number = core.modes[mode]
            split, lead = dual.split[number], problem.lead[problem.modes.kernels.row[number]]
            cost.append((flag, core.mode_cost[mode]))
            leads.append((flag, problem.modes.cap[number], split))
            for bundle in range(core.cheapest.shape[1]):
                options = np.flatnonzero(core.alive[mode, bundle]).tolist()
                own = [flag] if len(options) == 1 else [model.new_bool_var("") for _ in options]
                if len(options) > 1:
                    model.add_exactly_one(*own, flag.negated())
                for variable, option in zip(own, options, strict=True):
                    cost.append((variable, core.item_cost[mode, bundle, option]))
                    leads.append((variable, lead[bundle, option], split))
                    picked.setdefault((unit, bundle), []).append((variable, option))
        for launch in range(len(split)):
            flips.append([(v, dual.b * (1 - mu[launch]) * lead[launch]) for v, lead, mu in leads])
            flips.append([(v, -dual.b * mu[launch] * lead[launch]) for v, lead, mu in leads])
    used = [(variable, int(problem.bits[*place, option])) for place, own in picked.items() for variable, option in own]
    divisor = math.gcd(*(bits for _, bits in used)) or 1
    unused = model.new_int_var(0, problem.budget // divisor, "")
    total_bits = cp_model.LinearExpr.weighted_sum([v for v, _ in used], [bits // divisor for _, bits in used])
    model.add(unused + total_bits == problem.budget // divisor)
    cost += [(unused, dual.lam * divisor), (one, dual.lam * (problem.budget % divisor))]
    sums = [_row_terms(row, picked) for row in rows]
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
    proven = (solver.best_objective_bound - rounding) / scale
    if status == cp_model.UNKNOWN:
        return max(0.0, proven), None
    choice = core.cheapest.copy()
    for place, pairs in picked.items():
        choice[place] = next((option for variable, option in pairs if solver.value(variable)), choice[place])
    variants = [number for number, variable in enumerate(taken) if variable is not None and solver.value(variable)]
    return max(0.0, proven), core.relaxation.taking(choice, np.array(variants))


def _variants(core: Core, model: cp_model.CpModel, one: cp_model.IntVar) -> list[cp_model.IntVar | None]:
    """Whether each variant is taken: one of every layer, the constant where there is no other, None where none may."""
    taken: list[cp_model.IntVar | None] = [None] * len(core.over)
    for layer in range(len(core.base_variant)):
        open_ = np.flatnonzero((core.problem.layer == layer) & (core.over <= core.limit)).tolist()
        flags = [one] if len(open_) == 1 else [model.new_bool_var("") for _ in open_]
        model.add_exactly_one(flags)
        for variant, flag in zip(open_, flags, strict=True):
            taken[variant] = flag
    return taken


def _row_terms(row: Row, picked: Picked) -> Terms:
    """The sum of a row."""
    return [(v, float(row.values[*place, option])) for place, own in picked.items() for v, option in own]
