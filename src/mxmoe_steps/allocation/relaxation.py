"""Lower bounds: the Lagrangian dual of the budget and, inside every mode, of each launch's maximum.

With a price ``lam`` per bit and a split ``mu`` of each launch's time (max(A, B) >= mu A + (1 - mu) B for mu in
[0, 1]) the problem falls apart into units, modes and bundles:

    bound(lam) = sum over units of min over modes of max over mu of
                 sum over bundles of min over choices (a q + lam w + b (mu compute + (1 - mu) memory))  +  b mu longest
                 - lam M

It is concave in lam, and in mu for fixed lam. Both are climbed by intersecting tangents, exact for piecewise
linear functions; every intermediate value is a valid bound.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mxmoe_steps.allocation.problem import Problem

CONVERGED = 1e-9  # relative distance between bound and tangents at which the climb stops
PASSES = 60  # of the climb in mu for one lam


@dataclass(frozen=True)
class Dual:
    """A proven bound on a x loss + b x (time - constant) over the feasible assignments, and its prices.

    ``split`` [P, J] is mu of every mode, ``cost`` [P] a lower bound on the mode's cost.
    """

    a: float
    b: float
    bound: float
    lam: float
    split: NDArray[np.float64]
    cost: NDArray[np.float64]


def mode_values(problem: Problem, dual: Dual, modes: NDArray[np.int64]) -> NDArray[np.float64]:
    """Lagrangian cost of every choice inside the named modes, [K, N, C]; infinite where not allowed."""
    unit, mask, _ = problem.modes
    of = unit[modes]
    values = dual.a * problem.loss[of] + dual.lam * problem.bits[of]
    if dual.b:
        split = dual.split[modes][:, None, None]
        values += dual.b * (problem.memory[of] + split * problem.lead[of]).sum(3)
    return np.where(mask[modes], values, np.inf)


class Relaxation:
    """The bound of one problem for any weights (a, b); prices carry over from one pair of weights to the next."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        unit, mask, _ = problem.modes
        self.first = np.flatnonzero(np.r_[True, unit[1:] != unit[:-1]])  # modes are sorted by unit
        self.split = np.zeros((len(unit), problem.lead.shape[3]))
        bits = np.where(problem.allowed, problem.bits, 0).max(2).sum(1)
        self.most_bits = bits[unit]
        self.fewest_bits = np.where(mask, problem.bits[unit], np.iinfo(np.int64).max).min(2).sum(1)
        frugal = [int(first + cost.argmin()) for first, cost in
                  zip(self.first, np.split(self.fewest_bits, self.first[1:]), strict=True)]  # fmt: skip
        self.smallest = np.where(mask[frugal], problem.bits, np.iinfo(np.int64).max).argmin(2)  # [U, N]
        self.smallest_bits = int(self.fewest_bits[frugal].sum())
        self.lam = 0.0
        self.distance = 0.0  # relative, from the last bound to the optimum: where the next search starts

    def weigh(self, loss: NDArray[np.float64]) -> None:
        """From now on bound the same problem with other losses [U, N, C]."""
        self.problem = self.problem.with_loss(loss)

    def solve(self, a: float, b: float) -> Dual:
        """The best bound on a x loss + b x time."""
        problem = self.problem
        self.cost = np.full(len(self.split), -np.inf)
        self.at = self.lam  # the lam of self.cost
        best = Dual(a, b, -np.inf, 0.0, self.split, self.cost)
        low: tuple[float, float, float] | None = None  # tangent (lam, value, slope) with slope > 0: over budget
        high: tuple[float, float, float] | None = None
        lam, stride = self.lam, 1.1
        while True:
            value, slope = self._climb(a, b, lam)
            if value > best.bound:
                best = Dual(a, b, value, lam, self.split.copy(), self.cost.copy())
            if slope == 0 or (slope < 0 and lam == 0):
                break
            if slope > 0:
                low = (lam, value, slope)
            else:
                high = (lam, value, slope)
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
        return best

    def _climb(self, a: float, b: float, lam: float) -> tuple[float, float]:
        """Best value over mu at ``lam`` and a supergradient in lam (bits used by a mixture, minus the budget)."""
        problem = self.problem
        unit, _, cap = problem.modes
        launches = self.split.shape[1]
        shift = lam - self.at
        self.cost += shift * (self.fewest_bits if shift > 0 else self.most_bits)  # still a lower bound
        self.at = lam
        count = len(self.split)
        upper = np.full(len(self.first), np.inf)  # cost of a known mixture, per unit
        closed = np.zeros(count, bool)
        fresh = np.zeros(count, bool)
        used = np.zeros(count)  # bits of the mode's mixture
        split = self.split.copy()
        # Tangents of the mode's concave function along the launch being moved: (mu, value, slope, bits) per side.
        below, above = np.full((count, 4), np.nan), np.full((count, 4), np.nan)
        moving = np.full(count, -1)
        for _ in range(PASSES):
            lower = self.cost
            open_ = ~closed & (lower < upper[unit])
            if not np.isfinite(upper).all():
                floor = np.minimum.reduceat(lower, self.first)
                open_ &= ~np.isfinite(lower) | (lower <= floor[unit])
            modes = np.flatnonzero(open_)
            if not len(modes):
                break
            dual = Dual(a, b, 0.0, lam, split, self.cost)
            values = mode_values(problem, dual, modes)
            cheapest = values.argmin(2)[..., None]
            cost = np.take_along_axis(values, cheapest, 2)[..., 0].sum(1) + b * (split[modes] * cap[modes]).sum(1)
            of = unit[modes]
            lead = np.take_along_axis(problem.lead[of], cheapest[..., None], 2)[:, :, 0].sum(1) + cap[modes]  # [K, J]
            bits = np.take_along_axis(problem.bits[of], cheapest, 2)[..., 0].sum(1)
            better = ~fresh[modes] | (cost > self.cost[modes])
            self.cost[modes[better]] = cost[better]
            self.split[modes[better]] = split[modes[better]]
            fresh[modes] = True
            # The same assignment with its true maxima bounds the mode from above.
            slack = np.maximum(lead * (1 - split[modes]), -lead * split[modes])
            np.minimum.at(upper, of, cost + b * slack.sum(1))
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
        value = float(np.minimum.reduceat(self.cost, self.first).sum()) - lam * problem.budget
        known = np.where(fresh, self.cost, np.inf)
        winners = np.flatnonzero(known == np.minimum.reduceat(known, self.first)[unit])
        winners = winners[np.r_[True, unit[winners][1:] != unit[winners][:-1]]]
        return value, float(used[winners].sum()) - problem.budget
