"""The worst domain and ceilings on domains: objectives that are no sum over blocks, by prices on the domains.

For any weights v of the domains that sum to 1 and any prices p >= 0, with f_d q_d the scaled losses of `domains`,

    a max_d f_d q_d(x) + b T(x)  >=  min over y of  sum_d (a v_d f_d + p_d) q_d(y) + b T(y)  -  sum_d p_d ceiling_d

for every x that keeps the ceilings, as the maximum is no smaller than any mean and no ceiling is exceeded (with a sum
instead of a maximum, v = 1). The right side is what `minimize` solves: a certificate that anyone can check. It is
concave in (v, p); its peak is found by cutting planes (Kelley, 1960), every assignment found being a plane for all
directions (a, b). What remains of the gap, which the integrality of the assignment leaves, CP-SAT narrows on the core.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from ortools.linear_solver import pywraplp

from mxmoe_steps.allocation.core import Core
from mxmoe_steps.allocation.cp_sat import Row, solve_by_cp_sat
from mxmoe_steps.allocation.domains import Domains
from mxmoe_steps.allocation.minimize import Solution, minimize
from mxmoe_steps.allocation.problem import IDLE, Problem
from mxmoe_steps.allocation.relaxation import Relaxation
from mxmoe_steps.errors import UserError

SLACK = 1e-9  # relative, by which rounding may take a loss above its ceiling
TOLERANCE = 1e-6  # relative distance from the planes at which the climb stops where no gap is allowed
CLIMB = 60  # planes for one direction
STEEP, STEEPEST = 10.0, 1e5  # largest price of a ceiling, in objectives per ceiling; raised where it holds prices down
NEAR, MOVES = 8, 600  # assignments that are mixed with one another, and most choices of others that are tried
MOST_OPEN = 20_000  # choices of a core that CP-SAT is asked to solve; building its model takes longer than solving it
WORK = 1.0  # deterministic work limit of CP-SAT per direction, roughly seconds


@dataclass(frozen=True)
class Prices:
    """Weights v of domains and prices p of ceilings, both [D]."""

    share: NDArray[np.float64]
    price: NDArray[np.float64]


@dataclass
class Found:
    """Assignments [K, U, N], their losses by domain [K, D], times and bits [K]."""

    choices: list[NDArray[np.int64]]
    losses: NDArray[np.float64]
    times_us: NDArray[np.float64]
    bits: list[int]


class CoupledSearch:
    """Minimises a x loss + b x time for directions (a, b) of one problem; what it finds serves later directions."""

    def __init__(self, problem: Problem, domains: Domains) -> None:
        self.problem, self.domains = problem, domains
        self.relaxation = Relaxation(problem)
        self.capped = np.flatnonzero(np.isfinite(domains.ceiling))
        count = len(domains.factor)
        self.found = Found([], np.zeros((0, count)), np.zeros(0), [])
        self.last = Prices(np.full(count, 1 / count) if domains.worst else np.ones(count), np.zeros(count))

    def minimize(self, a: float, b: float, gap: float = 0.0, workers: int = 1) -> Solution:
        """The best assignment found and a proven bound, within ``gap`` of each other if `WORK` suffices.

        `UserError` where no assignment was found that keeps the ceilings.
        """
        bound, best, lam = -np.inf, self.last, 0.0
        steepest, prices = STEEP, self.last
        for _ in range(CLIMB):
            inner = self._inner(prices, a, b, gap / 4, workers)
            under = inner.bound - self._paid(prices)
            self._keep(inner)
            if under > bound:
                bound, best, lam = under, prices, inner.lam
            value = self._best(a, b)[0]
            if value - bound <= gap * abs(value):
                break
            peak, prices, held = self._peak(a, b, steepest)
            if peak - bound <= max(gap / 4, TOLERANCE) * abs(peak):
                if not held or steepest >= STEEPEST:
                    break
                steepest *= 10
        self.last = best
        value, number = self._best(a, b)
        if number is None or value - bound > max(gap, SLACK) * abs(value):
            self._exchange(best, a, b)
            value, number = self._best(a, b)
        if number is None or value - bound > max(gap, SLACK) * abs(value):
            bound = max(bound, self._narrow(best, a, b, bound, value, workers))
            value, number = self._best(a, b)
        if number is None:
            raise UserError(
                "no allocation was found that is no worse than uniform in the domains of no_worse_than_uniform; what is"
                " fixed may rule it out"
            )
        loss = float(self.domains.loss(self.found.losses[number]))
        choice, time_us, bits = self.found.choices[number], float(self.found.times_us[number]), self.found.bits[number]
        return Solution(choice, loss, time_us, bits, a, b, min(bound, a * loss + b * time_us), lam)

    def _weights(self, prices: Prices, a: float) -> NDArray[np.float64]:
        return np.asarray(a * prices.share * self.domains.factor + prices.price)

    def _paid(self, prices: Prices) -> float:
        """Sum of p_d ceiling_d."""
        return float((prices.price[self.capped] * self.domains.ceiling[self.capped]).sum())

    def _inner(self, prices: Prices, a: float, b: float, gap: float, workers: int) -> Solution:
        self.relaxation.weigh(np.tensordot(self._weights(prices, a), self.problem.by_domain, 1))
        return minimize(self.relaxation, 1.0, b, gap, workers)

    def _keep(self, solution: Solution) -> None:
        """Add an assignment to what was found, unless it is there."""
        if any((known == solution.choice).all() for known in self.found.choices):
            return
        taken = self.problem.taken(self.problem.by_domain, solution.choice).sum(1)
        found = self.found
        found.choices.append(solution.choice)
        found.losses = np.vstack([found.losses, taken])
        found.times_us = np.append(found.times_us, solution.time_us)
        found.bits.append(solution.bits)

    def _best(self, a: float, b: float) -> tuple[float, int | None]:
        """Least value among what keeps the ceilings, and its number; infinity and None if nothing does."""
        losses, ceiling = self.found.losses, self.domains.ceiling
        kept = np.all(losses <= ceiling * (1 + SLACK), axis=1)
        values = np.where(kept, a * self.domains.loss(losses.T) + b * self.found.times_us, np.inf)
        number = int(values.argmin())
        return float(values[number]), number if kept[number] else None

    def _peak(self, a: float, b: float, steepest: float) -> tuple[float, Prices, bool]:
        """The highest point under the planes found, its prices, and whether the limit on prices holds them down."""
        domains, found = self.domains, self.found
        scaled = a * domains.factor * found.losses
        times = b * found.times_us
        scale = float(abs(a * domains.loss(found.losses.T) + times).min()) or 1.0
        unit = {int(d): float(domains.ceiling[d] or found.losses[:, d].max() or 1.0) for d in self.capped}
        solver = pywraplp.Solver.CreateSolver("GLOP")
        height = solver.NumVar(-solver.infinity(), solver.infinity(), "")
        shares = [solver.NumVar(0, 1, "") for _ in domains.factor] if domains.worst else []
        costs = {d: solver.NumVar(0, steepest, "") for d in unit}  # prices times unit over scale
        if domains.worst:
            solver.Add(sum(shares) == 1)
        for number in range(len(found.choices)):
            plane = float(times[number] + (0.0 if domains.worst else scaled[number].sum())) / scale
            parts = [share * float(scaled[number, d] / scale) for d, share in enumerate(shares)]
            above = (found.losses[number] - domains.ceiling).tolist()
            parts += [cost * (above[d] / unit[d]) for d, cost in costs.items()]
            solver.Add(height <= plane + sum(parts))
        solver.Maximize(height)
        if solver.Solve() != pywraplp.Solver.OPTIMAL:
            raise RuntimeError("the program of the domains' prices was not solved")
        share, price = np.ones(len(domains.factor)), np.zeros(len(domains.factor))
        if domains.worst:
            share = np.array([max(0.0, one.solution_value()) for one in shares])
            share /= share.sum()
        for d, cost in costs.items():
            price[d] = max(0.0, cost.solution_value()) * scale / unit[d]
        held = any(cost.solution_value() >= 0.999 * steepest for cost in costs.values())
        return height.solution_value() * scale, Prices(share, price), held

    def _exchange(self, prices: Prices, a: float, b: float) -> None:
        """Add what lies between the assignments of least inner value: each, with choices of the others, two at a time.

        At the right prices these are all nearly optimal, and the domains' losses are level somewhere between them.
        """
        inner = self.found.losses @ self._weights(prices, a) + b * self.found.times_us
        near = np.argsort(inner, kind="stable")[:NEAR].tolist()
        for start in near:
            choice, others = self.found.choices[start].copy(), [self.found.choices[other] for other in near]
            losses, bits = self.found.losses[start], self.found.bits[start]
            steep = STEEP * a * float(self.domains.loss(losses))
            moves = np.array(
                sorted({(*place, one[*place]) for one in others for place in np.argwhere(_differ(one, choice))})
            )
            moves = moves[:: max(1, -(-len(moves) // MOVES))]
            while len(moves):
                unit, bundle, option = moves.T
                here = choice[unit, bundle]
                by_domain, stored = self.problem.by_domain, self.problem.bits
                change = (by_domain[:, unit, bundle, option] - by_domain[:, unit, bundle, here]).T  # [M, D]
                extra = np.append(stored[unit, bundle, option] - stored[unit, bundle, here], 0)
                change = np.vstack([change, np.zeros(len(losses))])  # the last move is none
                after = self._burden(losses + change[:, None] + change[None], a, steep)
                after[bits + extra[:, None] + extra[None] > self.problem.budget] = np.inf
                place = np.append(unit * self.problem.loss.shape[1] + bundle, -1)
                after[np.equal(place[:, None], place[None]) & (place >= 0)] = np.inf
                one, two = np.unravel_index(int(after.argmin()), after.shape)
                if after[one, two] >= self._burden(losses, a, steep):
                    break
                for move in {int(one), int(two)} - {len(moves)}:
                    choice[unit[move], bundle[move]] = option[move]
                losses, bits = losses + change[one] + change[two], bits + int(extra[one] + extra[two])
                moves = moves[~np.isin(place[:-1], [place[one], place[two]])]
            loss, time_us, bits = self.problem.evaluate(choice)
            self._keep(Solution(choice, loss, time_us, bits, a, b, 0.0, 0.0))

    def _burden(self, losses: NDArray[np.float64], a: float, steep: float) -> NDArray[np.float64]:
        """a x loss of losses [..., D], and ``steep`` times what is above a ceiling, relative to it."""
        ceiling = self.domains.ceiling[self.capped]
        above = np.maximum(0.0, losses[..., self.capped] / np.where(ceiling > 0, ceiling, 1.0) - 1).sum(-1)
        return np.asarray(a * self.domains.loss(np.moveaxis(losses, -1, 0)) + steep * above)

    def _narrow(self, prices: Prices, a: float, b: float, bound: float, value: float, workers: int) -> float:
        """A bound from CP-SAT on the core of the best prices; a better assignment joins what was found.

        None, minus infinity, where modes make the core large.
        """
        self.relaxation.weigh(np.tensordot(self._weights(prices, a), self.problem.by_domain, 1))
        problem = self.relaxation.problem
        dual = self.relaxation.solve(1.0, b)
        base = dual.bound - self._paid(prices)
        limit = (value if np.isfinite(value) else 2 * abs(bound)) - base
        rows = [
            Row(self.problem.by_domain[d] * (a * self.domains.factor[d]), None, float(prices.share[d]))
            for d in range(len(prices.share) if self.domains.worst else 0)
        ]
        rows += [
            Row(self.problem.by_domain[d], float(self.domains.ceiling[d]), float(prices.price[d])) for d in self.capped
        ]
        core = Core(self.relaxation, dual, max(limit, SLACK * abs(base)), np.zeros(len(problem.loss)))
        if core.alive.sum() > MOST_OPEN:
            return -np.inf
        proven, choice = solve_by_cp_sat(core, work=WORK, workers=workers, rows=rows)
        if choice is not None:
            loss, time_us, bits = problem.evaluate(choice)
            self._keep(Solution(choice, loss, time_us, bits, a, b, 0.0, dual.lam))
        return core.bound - self._paid(prices) + proven


def _differ(one: NDArray[np.int64], other: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Where two assignments choose differently in units that both take."""
    return (one != other) & (one != IDLE) & (other != IDLE)
