"""The allocation problem as arrays: layers, variants, units, bundles, choices.

A *bundle* is a set of blocks that take the same choice (granularity), a *unit* a set of bundles that share launches. A
*variant* of a layer is a way to run it, with units of its own: SwiGLU in the gate/up launch or apart, which schemes its
blocks may take. Minimising a x loss + b x time under the budget then reads

    min over one variant of every layer, and x of its units, of
    sum_g a q[g, x_g]  +  b sum_j max(compute_j(x) + longest_j(x), memory_j(x))  +  b sum_u us_u(x)
    subject to  sum_g w[g, x_g] <= M

where launch j belongs to one unit u, compute_j and memory_j are sums over the unit's bundles and longest_j is the
maximum over them. All of them, and us_u, depend on the *kernel* that carries what the unit's choices use. A *mode* of a
unit names what its kernels carry and caps longest_j: inside a mode the bundles are independent.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

MOST_KEPT = 1 << 28  # bytes of what is kept to save time
IDLE = -1  # choice of every bundle of a unit whose variant is not taken


@dataclass(frozen=True)
class Kernels:
    """What the launches of a unit may run, sorted by unit, int64 [Q] each.

    ``carries``: bits of what it can run, see `Problem.uses`. ``row``: which of the problem's times are its own. ``us``
    float64 [Q]: its constant time, microseconds.
    """

    unit: NDArray[np.int64]
    carries: NDArray[np.int64]
    row: NDArray[np.int64]
    us: NDArray[np.float64]

    def __getitem__(self, index: NDArray[np.int64]) -> "Kernels":
        return Kernels(self.unit[index], self.carries[index], self.row[index], self.us[index])


@dataclass(frozen=True)
class Modes:
    """All P modes, sorted by unit: their kernels [P] and caps [P, J]."""

    kernels: Kernels
    cap: NDArray[np.float64]

    def __len__(self) -> int:
        return len(self.cap)


@dataclass(frozen=True)
class Problem:
    """Arrays over U units, N bundles per unit (padded with free ones), C choices, J launches per unit, R rows of times.

    ``uses`` has a bit for everything that a launch's kernel carries because of a choice. ``variant`` [U] and ``layer``
    [V] say whose units and variants are, and ascend.
    """

    loss: NDArray[np.float64]  # [U, N, C]
    bits: NDArray[np.int64]  # [U, N, C]
    allowed: NDArray[np.bool_]  # [U, N, C]
    uses: NDArray[np.int64]  # [U, N, C]
    compute: NDArray[np.float64]  # [R, N, C, J] microseconds
    longest: NDArray[np.float64]  # [R, N, C, J]
    memory: NDArray[np.float64]  # [R, N, C, J]
    kernels: Kernels  # for every union of what a unit's allowed choices use; the last for others, and all
    variant: NDArray[np.int64]  # [U]
    layer: NDArray[np.int64]  # [V]
    budget: int  # bits
    params: int
    by_domain: NDArray[np.float64] = field(default_factory=lambda: np.zeros(0))  # [D, U, N, C], for `domains`

    @cached_property
    def lead(self) -> NDArray[np.float64]:
        """compute - memory, [R, N, C, J]."""
        return self.compute - self.memory

    @cached_property
    def modes(self) -> Modes:
        """The modes that some assignment may need."""
        number, caps = [], []
        for kernel in np.flatnonzero(_undominated(self.kernels)).tolist():
            for cap in _caps(self, kernel):
                number.append(kernel)
                caps.append(cap)
        return Modes(self.kernels[np.array(number)], np.array(caps))

    @cached_property
    def _kernel_of(self) -> dict[tuple[int, int], int]:
        keys = zip(self.kernels.unit.tolist(), self.kernels.carries.tolist(), strict=True)
        return {key: number for number, key in enumerate(keys)}

    @cached_property
    def _allowed_by_mode(self) -> NDArray[np.bool_] | None:
        """`allowed_in` of all modes, unless it is large."""
        if len(self.modes) * self.allowed[0].size > MOST_KEPT:
            return None
        return np.concatenate([self._allowed_in(np.array([mode])) for mode in range(len(self.modes))])

    def allowed_in(self, modes: NDArray[np.int64]) -> NDArray[np.bool_]:
        """The choices that K modes allow, [K, N, C]."""
        kept = self._allowed_by_mode
        return self._allowed_in(modes) if kept is None else kept[modes]

    def _allowed_in(self, modes: NDArray[np.int64]) -> NDArray[np.bool_]:
        kernels = self.modes.kernels[modes]
        inside = self.uses[kernels.unit] & ~kernels.carries[:, None, None] == 0
        inside &= self.allowed[kernels.unit]
        inside &= np.less_equal(self.longest[kernels.row], self.modes.cap[modes][:, None, None]).all(3)
        return inside

    def with_loss(self, loss: NDArray[np.float64]) -> "Problem":
        """The same with other losses, on which its modes do not depend."""
        other = replace(self, loss=loss)
        for name in ("modes", "lead", "_allowed_by_mode", "_kernel_of"):
            vars(other)[name] = getattr(self, name)
        return other

    def taken(self, values: NDArray, choice: NDArray[np.int64]) -> NDArray:  # type: ignore[type-arg]
        """Of values [..., U, N, C], the sum over the choices of an assignment [U, N], by unit: [..., U]."""
        units, bundles = (np.arange(size) for size in choice.shape)
        own = values[..., units[:, None], bundles, np.maximum(choice, 0)].sum(-1)
        return own * (choice[:, 0] != IDLE)

    def evaluate(self, choice: NDArray[np.int64]) -> tuple[float, float, int]:
        """Squared loss (or what adds up), time in microseconds and bits of an assignment [U, N]."""
        loss, bits = self.taken(self.loss, choice).sum(), self.taken(self.bits, choice).sum()
        return float(loss), float(self.unit_times(choice).sum()), int(bits)

    def unit_times(self, choice: NDArray[np.int64]) -> NDArray[np.float64]:
        """Microseconds of every unit's launches with the kernels that carry what they use, [U]."""
        units = np.flatnonzero(choice[:, 0] != IDLE)
        own, bundles = choice[units], np.arange(choice.shape[1])
        used = np.bitwise_or.reduce(self.uses[units[:, None], bundles, own], 1)
        last = np.searchsorted(self.kernels.unit, units, side="right") - 1
        keys = zip(units.tolist(), used.tolist(), last.tolist(), strict=True)
        kernels = self.kernels[np.array([self._kernel_of.get((unit, use), full) for unit, use, full in keys], np.int64)]
        at = (kernels.row[:, None], bundles, own)
        sides = np.maximum(self.compute[at].sum(1) + self.longest[at].max(1), self.memory[at].sum(1))
        times = np.zeros(len(choice))
        times[units] = kernels.us + sides.sum(1)
        return times


def _undominated(kernels: Kernels) -> NDArray[np.bool_]:
    """All kernels but those beside which another of the same times, and no more constant time, carries more."""
    keep = np.ones(len(kernels.row), bool)
    order = np.lexsort((kernels.row, kernels.unit))
    same = (np.diff(kernels.row[order]) == 0) & (np.diff(kernels.unit[order]) == 0)
    for group in np.split(order, np.flatnonzero(~same) + 1):
        carries, us = kernels.carries[group], kernels.us[group]
        more = (carries[:, None] & ~carries[None] == 0) & (carries[:, None] != carries[None])
        keep[group] = ~(more & (us[None] <= us[:, None])).any(1)
    return keep


def _caps(problem: Problem, kernel: int) -> Iterator[NDArray[np.float64]]:
    """The caps [J] of a kernel's modes, the shortest first; none if it cannot run every bundle of its unit."""
    unit, row = problem.kernels.unit[kernel], problem.kernels.row[kernel]
    inside = problem.allowed[unit] & (problem.uses[unit] & ~problem.kernels.carries[kernel] == 0)
    if not inside.any(1).all():
        return
    longest = problem.longest[row]
    floor = np.where(inside[..., None], longest, np.inf).min(1).max(0)  # some bundle needs this tile
    tiles = np.unique(np.maximum(longest[inside], floor), axis=0)
    # Componentwise maxima of the tiles in use: every reachable pair of longest tiles is among them.
    grid = np.stack([axis.ravel() for axis in np.meshgrid(*(np.unique(t) for t in tiles.T), indexing="ij")], 1)
    reached = np.less_equal(tiles[None], grid[:, None]).all(2)  # [caps, tiles]
    tight = np.equal(np.where(reached[..., None], tiles[None], -np.inf).max(1), grid).all(1)
    for cap in grid[tight]:
        if (inside & (longest <= cap).all(2)).any(1).all():
            yield cap
