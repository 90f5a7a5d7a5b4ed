"""Lower bounds: the Lagrangian dual of the budget and, inside every mode, of each launch's maximum.

With a price ``lam`` per bit and a split ``mu`` of each launch's time (max(A, B) >= mu A + (1 - mu) B for mu in
[0, 1]) the problem falls apart into layers, variants, units, modes and bundles:

    bound(lam) = sum over layers of min over variants of sum over units of min over modes of max over mu of
                 sum over bundles of min over choices (a q + lam w + b (mu compute + (1 - mu) memory))
                 + b (mu longest + us)
                 - lam M

It is concave in lam, and in mu for fixed lam. Both are climbed by intersecting tangents, exact for piecewise
linear functions; every intermediate value is a valid bound.

A unit has as many modes as sets of schemes that its kernels may carry, times caps. Most are never climbed: the cost of
a mode is concave and homogeneous in (a, b, lam), being a maximum over mu of minima of linear functions. So what is
known of it in two directions, or at two prices, bounds it between them.
"""

from bisect import bisect
from dataclasses import dataclass
from operator import attrgetter

import numpy as np
from numpy.typing import NDArray

from mxmoe_steps.allocation.problem import IDLE, Problem

CONVERGED = 1e-9  # relative distance between bound and tangents at which the climb stops
STRIDE = 1.005  # first step in lam, relative
PASSES = 60  # of the climb in mu for one lam
AT_ONCE = 1 << 20  # numbers in one array


@dataclass(frozen=True)
class Dual:
    """A proven bound on a x loss + b x time over the feasible assignments, and its prices.

    ``split`` [P, J] is mu of every mode, ``cost`` [P] a lower bound on the mode's cost; of ``climbed`` modes [P] it is
    the cost at that split.
    """

    a: float
    b: float
    bound: float
    lam: float
    split: NDArray[np.float64]
    cost: NDArray[np.float64]
    climbed: NDArray[np.bool_]


@dataclass(frozen=True)
class Known:
    """A direction that was solved, and lower bounds on the cost of every mode there, [P]."""

    a: float
    b: float
    lam: float
    cost: NDArray[np.float64]

    @property
    def share(self) -> float:
        return self.a / (self.a + self.b)


def mode_values(problem: Problem, dual: Dual, modes: NDArray[np.int64]) -> NDArray[np.float64]:
    """Lagrangian cost of every choice inside the named modes, [K, N, C]; infinite where not allowed."""
    rows, split = problem.modes.kernels.row[modes], dual.split[modes]
    # Modes that differ in what they allow have the same costs.
    same, first, number = np.unique(np.column_stack([rows, split]), axis=0, return_index=True, return_inverse=True)
    of, row = problem.modes.kernels.unit[modes[first]], rows[first]
    values = dual.a * problem.loss[of] + dual.lam * problem.bits[of]
    if dual.b:
        values += dual.b * (problem.memory[row] + same[:, None, None, 1:] * problem.lead[row]).sum(3)
    values = values[number.ravel()]
    values[~problem.allowed_in(modes)] = np.inf
    return values


def starts(numbers: NDArray[np.int64]) -> NDArray[np.int64]:
    """Where each of ascending numbers begins."""
    return np.flatnonzero(np.r_[True, numbers[1:] != numbers[:-1]])


class Relaxation:
    """The bound of one problem for any weights (a, b); prices carry over from one pair of weights to the next."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self.unit = problem.modes.kernels.unit
        # Modes, units and variants are sorted: those of a unit, variant or layer begin here.
        self.first, self.first_unit = starts(self.unit), starts(problem.variant)
        self.first_variant = starts(problem.layer)
        self.split = np.zeros((len(self.unit), problem.lead.shape[3]))
        bits = np.where(problem.allowed, problem.bits, 0).max(2).sum(1)
        self.most_bits = bits[self.unit]
        large = np.iinfo(np.int64).max
        self.fewest_bits = np.concatenate(
            [
                np.where(problem.allowed_in(modes), problem.bits[self.unit[modes]], large).min(2).sum(1)
                for modes in self._batches(np.arange(len(self.unit)))
            ]
        )
        frugal = np.array([int(first + cost.argmin()) for first, cost in
                           zip(self.first, np.split(self.fewest_bits, self.first[1:]), strict=True)])  # fmt: skip
        fewest = np.add.reduceat(self.fewest_bits[frugal], self.first_unit)
        choice = np.where(problem.allowed_in(frugal), problem.bits, large).argmin(2)  # [U, N]
        self.smallest = self.taking(choice, self.cheapest_variants(fewest))
        self.smallest_bits = int(np.minimum.reduceat(fewest, self.first_variant).sum())
        self.cost, self.climbed = np.zeros(len(self.unit)), np.zeros(len(self.unit), bool)
        self.lam = self.at = 0.0  # of the last solution, and of the bounds in cost
        self.distance = 0.0  # relative, from the last bound to the optimum: where the next search starts
        self.known: list[Known] = []  # by their shares

    def weigh(self, loss: NDArray[np.float64]) -> None:
        """From now on bound the same problem with other losses [U, N, C]."""
        self.problem = self.problem.with_loss(loss)
        self.known = []

    def cheapest_variants(self, cost: NDArray[np.number]) -> NDArray[np.int64]:
        """The variant of least ``cost`` [V] of every layer, [L]."""
        parts = np.split(cost, self.first_variant[1:])
        return self.first_variant + np.array([part.argmin() for part in parts])

    def taking(self, choice: NDArray[np.int64], variants: NDArray[np.int64]) -> NDArray[np.int64]:
        """``choice`` [U, N] in the units of these variants, one a layer, and no other."""
        return np.where(np.isin(self.problem.variant, variants)[:, None], choice, IDLE)

    def solve(self, a: float, b: float) -> Dual:
        """The best bound on a x loss + b x time."""
        problem = self.problem
        lam = self._start(a, b)
        best = Dual(a, b, -np.inf, 0.0, self.split, self.cost, self.climbed)
        low: tuple[float, float, float] | None = None  # tangent (lam, value, slope) with slope > 0: over budget
        high: tuple[float, float, float] | None = None
        cost: dict[bool, NDArray[np.float64]] = {}  # of the modes, at low (True) and high
        stride = STRIDE
        while True:
            self._move(lam)
            if low and high:
                share = (lam - low[0]) / (high[0] - low[0])
                self.cost = np.maximum(self.cost, (1 - share) * cost[True] + share * cost[False])
            value, slope = self._climb(a, b, lam)
            if value > best.bound:
                best = Dual(a, b, value, lam, self.split.copy(), self.cost.copy(), self.climbed.copy())
            if slope == 0 or (slope < 0 and lam == 0):
                break
            if slope > 0:
                low = (lam, value, slope)
            else:
                high = (lam, value, slope)
            cost[slope > 0] = self.cost.copy()
            if low and high:
                lam = (high[1] - low[1] + low[2] * low[0] - high[2] * high[0]) / (low[2] - high[2])
                crossing = low[1] + low[2] * (lam - low[0])
                if crossing - best.bound <= CONVERGED * abs(crossing) or not low[0] < lam < high[0]:
                    break
            elif low:
                lam = lam * stride or abs(value) / problem.budget
                stride *= stride
            else:
                lam = lam / stride if stride < 1e6 else 0.0
                stride *= stride
        self.lam = best.lam
        known = Known(a, b, lam=best.lam, cost=best.cost)
        self.known.insert(bisect(self.known, known.share, key=attrgetter("share")), known)
        return best

    def climb_within(self, dual: Dual, reach: NDArray[np.float64]) -> Dual:
        """``dual`` with every mode climbed that costs at most the ``reach`` [U] of its unit."""
        if (dual.climbed | (dual.cost > reach[self.unit])).all():
            return dual
        self.split, self.cost, self.climbed = dual.split.copy(), dual.cost.copy(), dual.climbed.copy()
        self.at = dual.lam
        self._climb(dual.a, dual.b, dual.lam, reach)
        return Dual(dual.a, dual.b, dual.bound, dual.lam, self.split, self.cost, self.climbed)

    def _start(self, a: float, b: float) -> float:
        """Bounds on all modes from the directions on either side of (a, b), if there are, and the price to start at."""
        self.climbed = np.zeros(len(self.unit), bool)
        place = bisect(self.known, a / (a + b), key=attrgetter("share"))
        if 0 < place < len(self.known):
            left, right = self.known[place - 1 : place + 1]
            area = left.a * right.b - right.a * left.b
            of_left = max(0.0, (a * right.b - right.a * b) / area)
            of_right = max(0.0, (left.a * b - a * left.b) / area)
            self.cost = of_left * left.cost + of_right * right.cost
            self.at = of_left * left.lam + of_right * right.lam  # the lam of self.cost
            return self.at
        self.cost, self.at = np.zeros(len(self.unit)), self.lam
        return self.lam

    def _move(self, lam: float) -> None:
        """Bounds on all modes at another price, from those at the last one."""
        if lam != self.at:
            shift = lam - self.at
            self.cost = np.maximum(0, self.cost + shift * (self.fewest_bits if shift > 0 else self.most_bits))
            self.climbed[:] = False
        self.at = lam

    def _batches(self, modes: NDArray[np.int64]) -> list[NDArray[np.int64]]:
        """Modes, a few at a time: their arrays are large."""
        size = max(1, AT_ONCE // self.problem.lead[0].size)
        return [modes[at : at + size] for at in range(0, len(modes), size)]

    def _cheapest(
        self, dual: Dual, modes: NDArray[np.int64]
    ) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.int64]]:
        """Cost of K modes at the dual's prices, and of the choices that give it A - B of launches [K, J] and bits."""
        problem = self.problem
        kernels, cap = problem.modes.kernels[modes], problem.modes.cap[modes]
        values = mode_values(problem, dual, modes)
        cheapest = values.argmin(2)[..., None]
        cost = np.take_along_axis(values, cheapest, 2)[..., 0].sum(1)
        cost += dual.b * ((dual.split[modes] * cap).sum(1) + kernels.us)
        bundles = np.arange(values.shape[1])
        lead = problem.lead[kernels.row[:, None], bundles, cheapest[..., 0]].sum(1) + cap
        return cost, lead, problem.bits[kernels.unit[:, None], bundles, cheapest[..., 0]].sum(1)

    def _climb(self, a: float, b: float, lam: float, reach: NDArray[np.float64] | None = None) -> tuple[float, float]:
        """Best value over mu at ``lam`` and a supergradient in lam (bits used by a mixture, minus the budget).

        ``reach`` [U]: climb all modes of no higher cost, instead of those that may be the cheapest.
        """
        problem, unit = self.problem, self.unit
        launches = self.split.shape[1]
        count = len(self.split)
        upper = np.full(len(self.first), np.inf)  # cost of a known mixture, per unit
        closed = self.climbed.copy() if reach is not None else np.zeros(count, bool)
        used = np.zeros(count)  # bits of the mode's mixture
        split = self.split.copy()
        # Tangents of the mode's concave function along the launch being moved: (mu, value, slope, bits) per side.
        below, above = np.full((count, 4), np.nan), np.full((count, 4), np.nan)
        moving = np.full(count, -1)
        for _ in range(PASSES):
            most = self._most(upper) if reach is None else reach
            modes = np.flatnonzero(~closed & (self.cost <= most[unit]))
            if not len(modes):
                break
            dual = Dual(a, b, 0.0, lam, split, self.cost, self.climbed)
            found = [self._cheapest(dual, batch) for batch in self._batches(modes)]
            cost, lead, bits = (np.concatenate(parts) for parts in zip(*found, strict=True))
            better = ~self.climbed[modes] | (cost > self.cost[modes])
            self.cost[modes[better]] = cost[better]
            self.split[modes[better]] = split[modes[better]]
            self.climbed[modes] = True
            # The same assignment with its true maxima bounds the mode from above.
            slack = np.maximum(lead * (1 - split[modes]), -lead * split[modes])
            np.minimum.at(upper, unit[modes], cost + b * slack.sum(1))
            used[modes] = bits
            tight = b * slack.max(1) <= CONVERGED * abs(cost)
            closed[modes[tight]] = True
            for k in np.flatnonzero(~tight).tolist():
                mode, worst = modes[k], int(slack[k].argmax())
                if moving[mode] != worst and launches > 1:
                    below[mode] = above[mode] = np.nan
                    moving[mode] = worst
                side = below if lead[k, worst] > 0 else above
                side[mode] = (split[mode, worst], cost[k], b * lead[k, worst], bits[k])
                (mu0, v0, s0, w0), (mu1, v1, s1, w1) = below[mode], above[mode]
                if np.isnan(s0) or np.isnan(s1):
                    split[mode, worst] = 1.0 if np.isnan(s1) else 0.0
                    continue
                crossing = (v1 - v0 + s0 * mu0 - s1 * mu1) / (s0 - s1)
                peak = v0 + s0 * (crossing - mu0)
                used[mode] = (w0 * -s1 + w1 * s0) / (s0 - s1)
                if peak - self.cost[mode] <= CONVERGED * abs(peak) or not mu0 < crossing < mu1:
                    closed[mode] = True
                    if launches == 1:
                        upper[unit[mode]] = min(upper[unit[mode]], peak)
                split[mode, worst] = crossing
        least = np.minimum.reduceat(self.cost, self.first)  # [U]
        by_variant = np.add.reduceat(least, self.first_unit)
        value = float(np.minimum.reduceat(by_variant, self.first_variant).sum()) - lam * problem.budget
        known = np.where(self.climbed, self.cost, np.inf)
        winners = np.flatnonzero(known == np.minimum.reduceat(known, self.first)[unit])
        winners = winners[starts(unit[winners])]
        winners = winners[np.isin(problem.variant[unit[winners]], self.cheapest_variants(by_variant))]
        return value, float(used[winners].sum()) - problem.budget

    def _most(self, upper: NDArray[np.float64]) -> NDArray[np.float64]:
        """What a mode may cost and still be the cheapest, given the ``upper`` cost of each unit, [U]."""
        least = np.minimum.reduceat(self.cost, self.first)
        by_variant = np.add.reduceat(least, self.first_unit)
        known = np.add.reduceat(upper, self.first_unit)
        over = np.minimum.reduceat(known, self.first_variant)[self.problem.layer] - by_variant  # [V]
        return np.minimum(np.where(np.isfinite(upper), upper, least), least + over[self.problem.variant])
