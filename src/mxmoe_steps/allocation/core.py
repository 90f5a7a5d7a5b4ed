"""What is left of a weighted-sum problem once prices have ruled choices out.

For any assignment x, in the modes it uses and with the prices of `relaxation`, exactly

    a loss(x) + b time(x) - bound = sum of reduced costs + lam x unused bits
                                    + b sum_j max((1 - mu_j) (A_j - B_j), mu_j (B_j - A_j))

with every term at least zero (A_j: compute side of launch j with its longest tile, B_j: memory side). So a choice
whose reduced cost exceeds the distance from the bound to a known assignment is out; what remains is the core.
"""

import numpy as np
from numpy.typing import NDArray

from mxmoe_steps.allocation.problem import Problem
from mxmoe_steps.allocation.relaxation import Dual, mode_values


class Core:
    """What assignments within ``limit`` of the bound may use, under one set of prices.

    The bound is the dual's, raised by ``shift`` [U], for each unit the least amount that its launches' maxima add.

    Modes are those with a cost within the limit, K of them: their ``mode_cost`` [K] above the unit's cheapest,
    the ``item_cost`` [K, N, C] of a choice above its bundle's cheapest, and which choices are ``alive``.
    """

    def __init__(self, problem: Problem, dual: Dual, limit: float, shift: NDArray[np.float64]) -> None:
        self.problem, self.dual, self.limit, self.shift = problem, dual, limit, shift
        unit, _, cap = problem.modes
        first = np.flatnonzero(np.r_[True, unit[1:] != unit[:-1]])
        least = self.least = np.minimum.reduceat(dual.cost, first)  # [U]
        self.modes = np.flatnonzero(dual.cost - least[unit] <= limit + shift[unit])
        self.unit = unit[self.modes]
        values = mode_values(problem, dual, self.modes)
        floor = values.min(2)
        total = floor.sum(1) + dual.b * (dual.split[self.modes] * cap[self.modes]).sum(1)
        self.mode_cost = total - least[self.unit]
        with np.errstate(invalid="ignore"):
            self.item_cost = values - floor[..., None]
        self.alive = self.mode_cost[:, None, None] + self.item_cost <= limit + shift[self.unit, None, None]
        start = np.flatnonzero(np.r_[True, self.unit[1:] != self.unit[:-1]])
        ends = np.r_[start[1:], len(self.unit)]
        self.base_mode = np.array([i + self.mode_cost[i:j].argmin() for i, j in zip(start, ends, strict=True)])
        self.base = values[self.base_mode].argmin(2)  # [U, N]: the cheapest assignment
        self.base_bits = int(np.take_along_axis(problem.bits, self.base[..., None], 2).sum())
        self.room = problem.budget - self.base_bits

    def excess(self, choice: NDArray[np.int64]) -> NDArray[np.float64]:
        """Each unit's a loss + lam bits + b time above its bound, [U]."""
        problem, dual = self.problem, self.dual
        items = dual.a * problem.loss + dual.lam * problem.bits
        taken = np.take_along_axis(items, choice[..., None], 2).sum((1, 2))
        return np.asarray(taken + dual.b * problem.launch_times(choice).sum(1) - self.least)

    def flips(self, choice: NDArray[np.int64]) -> NDArray[np.float64]:
        """The part of `excess` that reduced costs leave out: b sum_j max((1 - mu) (A - B), mu (B - A)), [U]."""
        linear = np.take_along_axis(self.item_cost, choice[self.unit][..., None], 2).sum((1, 2)) + self.mode_cost
        start = np.flatnonzero(np.r_[True, self.unit[1:] != self.unit[:-1]])
        return np.asarray(self.excess(choice) - np.minimum.reduceat(linear, start))
