"""What a chosen allocation could be traded for, from its frontier, in sentences. Stdlib only."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from mxmoe_steps.allocation.pick import Part, Vertex, objective, under_ceiling

MORE_BITS = 0.5  # of a weight
MORE_TIME = 0.1  # relative
EQUAL = 5e-4  # relative changes below it are none: sentences show a tenth of a percent


@dataclass(frozen=True)
class Goal:
    """What `solve` was asked for: one of an exchange rate and ceilings; ``power`` as in `pick`."""

    r: float | None
    max_time_us: float | None
    max_loss_sum: float | None
    power: float

    def best(self, parts: Sequence[Part]) -> list[Vertex]:
        """A vertex of every part; `ValueError` under a ceiling that none meets."""
        if self.r is None:
            return under_ceiling(parts, self.max_time_us, self.max_loss_sum)
        r = self.r
        return [min(part.vertices, key=lambda v: objective(v.loss_sum, v.time_us, r, self.power)) for part in parts]


@dataclass(frozen=True)
class Total:
    """Loss L and time of a whole allocation."""

    loss: float
    time_us: float

    @classmethod
    def of(cls, vertices: Sequence[Vertex], power: float) -> "Total":
        return cls(math.fsum(v.loss_sum for v in vertices) ** power, math.fsum(v.time_us for v in vertices))

    def beside(self, other: "Total") -> str:
        """``other`` in words, by what this has less or more: ``3.1 % less loss and 0.4 % more time``."""
        changes = []
        for name, ours, theirs in (("loss", self.loss, other.loss), ("time", self.time_us, other.time_us)):
            if not ours:
                changes += [f"some {name} where it has none"] * (theirs > 0)
                continue
            change = theirs / ours - 1
            if abs(change) >= EQUAL:
                changes.append(f"{abs(change):.1%} {'more' if change > 0 else 'less'} {name}".replace("%", " %"))
        return " and ".join(changes)


def sentences(
    parts: Sequence[Part],
    chosen: Sequence[Vertex],
    goal: Goal,
    richer: Sequence[Part],
    budget_bits: float,
    schemes: Sequence[str],
    digits: str,
) -> list[str]:
    """What one more scheme, half a bit more and a tenth more time would buy for the ``chosen`` vertices of ``parts``.

    ``richer``: the parts under `MORE_BITS` more than ``budget_bits``. ``schemes``: those that blocks may take, and
    ``digits`` their characters.
    """
    here = Total.of(chosen, goal.power)
    return [
        _one_more_scheme(parts, chosen, here, goal.power, dict(zip(digits, schemes, strict=True))),
        _half_a_bit(here, goal, richer, budget_bits + MORE_BITS),
        _a_tenth_more_time(parts, here, goal.power),
    ]


def _one_more_scheme(
    parts: Sequence[Part], chosen: Sequence[Vertex], here: Total, power: float, names: dict[str, str]
) -> str:
    """The nearest allocation with a scheme that is not used yet, of those that change one part's vertex."""
    used = {digit for vertex in chosen for digit in vertex.schemes}
    unused = sorted(names[digit] for digit in set(names) - used)
    if not unused:
        return f"It uses all {len(names)} candidates."
    near: list[tuple[float, str, Total]] = []
    for number, part in enumerate(parts):
        for vertex in part.vertices:
            if added := sorted({names[digit] for digit in set(vertex.schemes) - used}):
                there = Total.of([*chosen[:number], vertex, *chosen[number + 1 :]], power)
                far = max(abs(math.log((there.loss or 1e-300) / (here.loss or 1e-300))),
                          abs(math.log(there.time_us / here.time_us)))  # fmt: skip
                near.append((far, " and ".join(added), there))
    if not near:
        return f"No allocation of the frontier uses {' or '.join(unused)}."
    _, added_names, there = min(near, key=lambda one: one[:2])
    return (
        f"The nearest allocation of the frontier that also uses {added_names} has {here.beside(there) or 'the same'}."
    )


def _half_a_bit(here: Total, goal: Goal, richer: Sequence[Part], bits: float) -> str:
    try:
        there = Total.of(goal.best(richer), goal.power)
    except ValueError:
        return f"{bits:g} bits a weight would not meet the ceiling either."
    return f"{MORE_BITS:g} bits more, {bits:g} a weight, would give {here.beside(there) or 'nothing'}."


def _a_tenth_more_time(parts: Sequence[Part], here: Total, power: float) -> str:
    there = Total.of(under_ceiling(parts, here.time_us * (1 + MORE_TIME), None), power)
    share = 1 - there.loss / here.loss if here.loss else 0.0
    gain = f"{share:.1%} less loss" if share >= EQUAL else "nothing within the budget"
    return f"{MORE_TIME:.0%} more time would give {gain}.".replace("%", " %")
