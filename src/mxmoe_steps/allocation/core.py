"""What is left of a weighted-sum problem once prices have ruled choices out.

For any assignment x, in the variants and modes it uses and with the prices of `relaxation`, exactly

    a loss(x) + b time(x) - bound = sum of reduced costs + lam x unused bits
                                    + b sum_j max((1 - mu_j) (A_j - B_j), mu_j (B_j - A_j))

with every term at least zero (A_j: compute side of launch j with its longest tile, B_j: memory side). So a choice
whose reduced cost exceeds the distance from the bound to a known assignment is out; what remains is the core.
"""

import numpy as np
from numpy.typing import NDArray

from mxmoe_steps.allocation.problem import IDLE
from mxmoe_steps.allocation.relaxation import Dual, Relaxation, mode_values, starts


class Core:
    """What assignments within ``limit`` of the bound, and below ``value``, may use, under one set of prices.

    The ``bound`` is the dual's, raised by ``shift`` [U], for each unit the least amount that its launches' maxima add.

    Variants cost ``over`` [V] more than the cheapest of their layer, which is in ``base_variant`` [L]. Modes are those
    with a cost within the limit, K of them: their ``mode_cost`` [K] above the unit's cheapest, the ``item_cost``
    [K, N, C] of a choice above its bundle's cheapest, and which choices are ``alive``. ``cheapest`` [U, N]: what is
    cheapest in every unit that has modes, in its ``base_mode`` [U], one of the K; ``base``: that of the cheapest
    variants. ``room``: bits that it leaves. ``reach`` [U]: what a mode and a choice may cost above a unit's cheapest.
    """

    def __init__(
        self, relaxation: Relaxation, dual: Dual, limit: float, shift: NDArray[np.float64],
        value: float = np.inf, reach: NDArray[np.float64] | None = None,
    ) -> None:  # fmt: skip
        problem = self.problem = relaxation.problem
        self.relaxation, self.shift = relaxation, shift
        for _ in range(2):  # climbing may move the cheapest
            self.least = np.minimum.reduceat(dual.cost, relaxation.first)  # [U]
            by_variant = np.add.reduceat(self.least + shift, relaxation.first_unit)
            by_layer = np.minimum.reduceat(by_variant, relaxation.first_variant)
            self.over = by_variant - by_layer[problem.layer]
            self.bound = float(by_layer.sum()) - dual.lam * problem.budget
            self.limit = limit = min(limit, value - self.bound)
            self.reach = limit + shift - self.over[problem.variant] if reach is None else reach
            dual = relaxation.climb_within(dual, self.least + self.reach)
        self.dual, reach = dual, self.reach
        self.base_variant = relaxation.cheapest_variants(by_variant)
        self.modes = np.flatnonzero(dual.cost <= (self.least + reach)[relaxation.unit])
        self.unit = relaxation.unit[self.modes]
        values = mode_values(problem, dual, self.modes)
        self.mode_cost = dual.cost[self.modes] - self.least[self.unit]
        with np.errstate(invalid="ignore"):
            self.item_cost = values - values.min(2)[..., None]
        self.alive = self.mode_cost[:, None, None] + self.item_cost <= reach[self.unit, None, None]
        start = starts(self.unit)
        ends = np.r_[start[1:], len(self.unit)]
        self.base_mode = np.full(len(reach), -1)
        self.base_mode[self.unit[start]] = [i + self.mode_cost[i:j].argmin() for i, j in zip(start, ends, strict=True)]
        self.cheapest = values[self.base_mode].argmin(2)
        self.base = relaxation.taking(self.cheapest, self.base_variant)
        self.base_bits = problem.taken(problem.bits, self.cheapest)  # [U]
        self.room = problem.budget - int(problem.taken(problem.bits, self.base).sum())

    def excess(self, choice: NDArray[np.int64]) -> NDArray[np.float64]:
        """Each taken unit's a loss + lam bits + b time above its bound, [U]; 0 for others."""
        problem, dual = self.problem, self.dual
        cost = problem.taken(dual.a * problem.loss + dual.lam * problem.bits, choice)
        cost += dual.b * problem.unit_times(choice)
        return np.where(choice[:, 0] == IDLE, 0.0, cost - self.least)

    def flips(self, choice: NDArray[np.int64]) -> NDArray[np.float64]:
        """The part of `excess` that reduced costs leave out: b sum_j max((1 - mu) (A - B), mu (B - A)), [U]."""
        own = np.maximum(choice, 0)[self.unit][..., None]
        linear = np.take_along_axis(self.item_cost, own, 2).sum((1, 2)) + self.mode_cost
        least = np.zeros(len(choice))
        start = starts(self.unit)
        least[self.unit[start]] = np.minimum.reduceat(linear, start)
        return np.where(choice[:, 0] == IDLE, 0.0, self.excess(choice) - least)
