"""Time of the exact allocation beside plain CP-SAT and HiGHS on the same instances.

    python benchmarks/solve.py            at most 10 minutes on two cores
    python benchmarks/solve.py --full     every model and frontier, a minute for each peer: at most an hour

Instances (`instances.py`) have the shapes of real models, random losses and traffic, six schemes, a budget of 4.5
bits and the roofline estimate of an H100; frontiers also what was measured on one.
"linear" minimises loss alone; "maximum" minimises loss and time with
the weights that r = 0.75 has at the most accurate allocation. All runs use one thread. Peers solve the plain
formulation; HiGHS needs the optional package highspy.
"""

import argparse
import time

import numpy as np
from instances import MODELS, make_problem

from mxmoe_steps.allocation.constraints import Constraints
from mxmoe_steps.allocation.hull import lower_left_hull
from mxmoe_steps.allocation.minimize import Solution, minimize
from mxmoe_steps.allocation.problem import Problem
from mxmoe_steps.allocation.relaxation import Relaxation


def plain_terms(problem: Problem, a: float, b: float):  # type: ignore[no-untyped-def]
    """The textbook formulation: binaries (unit, bundle, choice) and per launch a time above both sides."""
    items = list(zip(*np.nonzero(problem.allowed), strict=True))
    return items, [a * problem.loss[item] for item in items], b


def unit_kernels(problem: Problem) -> list[tuple[int, int, list[tuple[int, float]]]]:
    """Every unit with its row of times, of which there must be one, and what its kernels carry and take."""
    found = []
    kernels = problem.modes.kernels
    for unit in range(len(problem.loss)):
        of = kernels.unit == unit
        assert len(set(kernels.row[of].tolist())) == 1, "peers solve problems without loops that take time"
        carried = dict(zip(kernels.carries[of].tolist(), kernels.us[of].tolist(), strict=True))
        found.append((unit, int(kernels.row[of][0]), list(carried.items())))
    return found


def carriers(problem: Problem, item, runs, kernels):  # type: ignore[no-untyped-def]
    """Variables of the kernels that carry what an item uses."""
    return [run for run, (carries, _) in zip(runs, kernels, strict=True) if not problem.uses[item] & ~carries]


def by_cp_sat(problem: Problem, a: float, b: float, seconds: float) -> tuple[float, float]:
    """Value and relative gap of plain CP-SAT within a time limit."""
    from ortools.sat.python import cp_model

    items, costs, _ = plain_terms(problem, a, b)
    scale = 2**40 / (sum(np.sort(costs)[-problem.loss[..., 0].size :]) + 1e-300)
    model = cp_model.CpModel()
    x = {item: model.new_bool_var("") for item in items}
    units, bundles, choices, launches = problem.lead.shape
    for unit in range(units):
        for bundle in range(bundles):
            model.add_exactly_one(x[unit, bundle, c] for c in range(choices) if (unit, bundle, c) in x)
    model.add(sum(int(problem.bits[item]) * x[item] for item in items) <= problem.budget)
    times = []
    for unit, row, kernels in unit_kernels(problem) if b else []:
        inside = [item for item in items if item[0] == unit]
        runs = [model.new_bool_var("") for _ in kernels]
        model.add_exactly_one(runs)
        times += [round(b * scale * us) * run for run, (_, us) in zip(runs, kernels, strict=True)]
        for item in inside:
            model.add_at_least_one(x[item].negated(), *carriers(problem, item, runs, kernels))
        for launch in range(launches):
            steps = {item: [round(b * scale * float(part[row][item[1:]][launch])) for part in
                            (problem.compute, problem.longest, problem.memory)] for item in inside}  # fmt: skip
            longest, total = (model.new_int_var(0, 2**50, "") for _ in range(2))
            for item in inside:
                model.add(longest >= steps[item][1] * x[item])
            model.add(total >= longest + sum(steps[item][0] * x[item] for item in inside))
            model.add(total >= sum(steps[item][2] * x[item] for item in inside))
            times.append(total)
    model.minimize(sum(round(c * scale) * x[i] for i, c in zip(items, costs, strict=True)) + sum(times))
    solver = cp_model.CpSolver()
    solver.parameters.num_workers = 1
    solver.parameters.max_time_in_seconds = seconds
    if solver.solve(model) not in (cp_model.OPTIMAL, cp_model.FEASIBLE):
        return np.inf, np.inf
    value = solver.objective_value
    return value / scale, (value - solver.best_objective_bound) / value


def by_highs(problem: Problem, a: float, b: float, seconds: float) -> tuple[float, float]:
    """Value and relative gap of HiGHS on the same formulation."""
    import highspy

    items, costs, _ = plain_terms(problem, a, b)
    number = {item: index for index, item in enumerate(items)}
    units, bundles, _, launches = problem.lead.shape
    of_units = unit_kernels(problem) if b else []
    extra = 2 * units * launches if b else 0  # time and longest tile of every launch
    highs = highspy.Highs()
    for option, value in (("output_flag", False), ("threads", 1), ("mip_rel_gap", 1e-9), ("time_limit", seconds)):
        highs.setOptionValue(option, value)
    count = len(items)
    lower, upper = np.zeros(count + extra), np.r_[np.ones(count), np.full(extra, highspy.kHighsInf)]
    highs.addVars(count + extra, lower, upper)
    columns = np.arange(count, dtype=np.int32)
    highs.changeColsIntegrality(count, columns, np.full(count, highspy.HighsVarType.kInteger))
    objective = np.r_[costs, np.tile([b, 0.0], extra // 2)]
    highs.changeColsCost(count + extra, np.arange(count + extra, dtype=np.int32), objective)
    runs = count + extra  # kernels come last
    us = np.array([each for *_, kernels in of_units for _, each in kernels])
    if len(us):
        highs.addVars(len(us), np.zeros(len(us)), np.ones(len(us)))
        last = np.arange(runs, runs + len(us), dtype=np.int32)
        highs.changeColsIntegrality(len(us), last, np.full(len(us), highspy.HighsVarType.kInteger))
        highs.changeColsCost(len(us), last, b * us)

    def row(low: float, high: float, index: list[int], values: list[float]) -> None:
        highs.addRow(low, high, len(index), np.array(index, np.int32), np.array(values, float))

    members: dict[tuple[int, int], list[int]] = {}
    for item in items:
        members.setdefault(item[:2], []).append(number[item])
    for index in members.values():
        row(1, 1, index, [1.0] * len(index))
    unit = int(np.gcd.reduce([int(problem.bits[item]) for item in items]))  # so that no tolerance hides a bit
    row(-highspy.kHighsInf, problem.budget // unit, list(range(count)), [problem.bits[item] / unit for item in items])
    for unit, times, kernels in of_units:
        inside = [item for item in items if item[0] == unit]
        index = [number[item] for item in inside]
        own = list(range(runs, runs := runs + len(kernels)))
        row(1, 1, own, [1.0] * len(own))
        for item in inside:
            able = carriers(problem, item, own, kernels)
            row(0, highspy.kHighsInf, [number[item], *able], [-1, *[1] * len(able)])
        for launch in range(launches):
            total = count + 2 * (unit * launches + launch)
            row(0, highspy.kHighsInf, [total, total + 1, *index],
                [1, -1, *(-problem.compute[times][item[1:]][launch] for item in inside)])  # fmt: skip
            row(
                0,
                highspy.kHighsInf,
                [total, *index],
                [1, *(-problem.memory[times][item[1:]][launch] for item in inside)],
            )
            for bundle in range(bundles):
                some = members[unit, bundle]
                row(
                    0,
                    highspy.kHighsInf,
                    [total + 1, *some],
                    [1, *(-problem.longest[times][items[i][1:]][launch] for i in some)],
                )
    highs.run()
    info = highs.getInfo()
    if info.primal_solution_status != 2:  # no feasible point
        return np.inf, np.inf
    return info.objective_function_value, info.mip_gap


def peers(problem: Problem, solution: Solution, seconds: float) -> str:
    """Cells for CP-SAT and HiGHS: time, or the gap at the limit; "!" if one claims better than ours."""
    cells = []
    for solver in (by_cp_sat, by_highs):
        started = time.perf_counter()
        try:
            value, gap = solver(problem, solution.a, solution.b, seconds)
        except ImportError:
            cells.append("not installed")
            continue
        spent = time.perf_counter() - started
        worse = value / solution.value - 1
        cell = f"{spent:.2f} s" if gap <= 1e-6 else f"limit {seconds:.0f} s, gap {gap:.1e}, {worse:.1e} worse"
        cells.append(cell + (" !" if worse < -1e-6 else ""))
    return " | ".join(cells)


def solution_rows(model: str, tokens: int, layers: int | None, seconds: float) -> None:
    """One layer or a whole model: a solution with linear time cost zero and one with the maxima."""
    problem = make_problem(model, tokens, layers, constraints=Constraints(tie_gate_up=True))
    label = f"{model}, {'one layer' if layers else 'whole model'}, {tokens} tokens"
    binaries = int(problem.allowed.sum())
    relaxation = Relaxation(problem)
    first = None
    for name in ("linear", "maximum"):
        weights = (1.0, 0.0) if first is None else (0.75 / first.loss, 0.5 / first.time_us)  # L is a root: r/2, 1-r
        started = time.perf_counter()
        solution = minimize(relaxation, *weights)
        spent = time.perf_counter() - started
        first = first or solution
        gap = 1 - solution.bound / solution.value
        cells = f"{binaries} | {spent:.3f} s | {max(0, gap):.0e} | {peers(problem, solution, seconds)}"
        print(f"| {label}, {name} | {cells} |", flush=True)


def hull_row(model: str, tokens: int, layers: int | None, gap: float, measured: bool) -> None:
    """A whole frontier; of ``measured`` times, loops of other schemes take time."""
    problem = make_problem(model, tokens, layers, measured=measured)
    started = time.perf_counter()
    hull = lower_left_hull(problem, gap)
    spent = time.perf_counter() - started
    label = f"{model}, {'one layer' if layers else 'whole model'}, {tokens} tokens"
    profile = "measured" if measured else "estimate"
    print(f"| {label} | {profile} | {len(hull.solutions)} | {gap:.0e} | {spent:.1f} s |", flush=True)


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--full", action="store_true", help="every frontier, longer limits for the peers")
    args = parser.parse_args()
    print("| solution | binaries | ours | gap | CP-SAT | HiGHS |\n|---|---|---|---|---|---|")
    for model in MODELS:
        for tokens in (64, 8192):
            solution_rows(model, tokens, 1, 60 if args.full else 5)
    for model in MODELS if args.full else ("qwen1.5-moe", "qwen3-30b-a3b"):
        for tokens in (64, 512) if args.full else (512,):
            solution_rows(model, tokens, None, 60 if args.full else 20)
    print("\n| frontier | times | vertices | gap | time |\n|---|---|---|---|---|")
    for measured in (False, True):
        for model in MODELS:
            for tokens in (64, 512, 8192):
                hull_row(model, tokens, 1, 0.0, measured)
        for model in MODELS if args.full else ("qwen1.5-moe", "qwen3-30b-a3b"):
            for tokens in (64, 512, 8192) if args.full else (512,):
                hull_row(model, tokens, None, 1e-4, measured)


if __name__ == "__main__":
    main()
