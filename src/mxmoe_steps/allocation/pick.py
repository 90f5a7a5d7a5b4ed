"""Choosing a vertex of a frontier, and the proven bound on what any allocation could reach. Stdlib only.

A *part* is a frontier on its own: one layer (scope layer) or the whole model (scope model). Loss here is the
quantity that adds up over blocks, ``loss_sum``; L = loss_sum ** power with power 1/2 or 1.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

PARALLEL = 1e-12  # relative: cuts whose slopes differ by less have no meeting point worth the name

Cut = tuple[float, float, float]  # a, b, bound: a x loss_sum + b x time_us >= bound for every allocation


@dataclass(frozen=True)
class Vertex:
    """One supported allocation of a part."""

    loss_sum: float
    time_us: float
    bits: int
    price: float
    schemes: str  # one character per block
    by_domain: Sequence[float] = ()  # loss of every domain of the text
    tile_tokens: int | None = None


@dataclass(frozen=True)
class Part:
    """Vertices by rising loss_sum, and the half-planes that bound every allocation."""

    vertices: list[Vertex]
    cuts: list[Cut]


def _meet(one: Cut, two: Cut) -> tuple[float, float] | None:
    """Where two cuts are tight; None when they are parallel, up to rounding."""
    determinant = one[0] * two[1] - two[0] * one[1]
    if abs(determinant) <= PARALLEL * (abs(one[0] * two[1]) + abs(two[0] * one[1])):
        return None
    return (
        (one[2] * two[1] - two[2] * one[1]) / determinant,
        (one[0] * two[2] - two[0] * one[2]) / determinant,
    )


def _distance(cut: Cut) -> float:
    """Of the cut's line from the origin."""
    return cut[2] / math.hypot(cut[0], cut[1])


def envelope(cuts: list[Cut]) -> list[Cut]:
    """The cuts that are tight somewhere, from least loss (b = 0) to least time (a = 0)."""
    kept: list[Cut] = []
    for cut in sorted(set(cuts), key=lambda c: (-math.atan2(c[0], c[1]), -_distance(c))):
        if kept and _meet(kept[-1], cut) is None:
            if _distance(cut) <= _distance(kept[-1]):
                continue
            kept.pop()
        while len(kept) > 1:
            meeting = _meet(kept[-2], cut)
            last = kept[-1]
            if meeting is None or last[0] * meeting[0] + last[1] * meeting[1] < last[2]:
                break
            kept.pop()
        kept.append(cut)
    return kept


def corners(cuts: list[Cut]) -> list[tuple[float, float]]:
    """Corners (loss_sum, time_us) of the region that the cuts leave, by rising loss."""
    kept = envelope(cuts)
    meetings = [_meet(one, two) for one, two in pairwise(kept)]
    return [(max(0.0, m[0]), max(0.0, m[1])) for m in meetings if m is not None]


def objective(loss_sum: float, time_us: float, r: float, power: float) -> float:
    """L^r T^(1-r) with L = loss_sum ** power."""
    return float(loss_sum ** (power * r) * time_us ** (1 - r))


def pick_by_r(part: Part, r: float, power: float) -> tuple[Vertex, float, float]:
    """The vertex of least L^r T^(1-r), its value and the proven lower bound on that value.

    Ties go to the smaller loss, then time; at r = 0, 1 or L = 0 that is the other quantity.
    """
    values = [objective(v.loss_sum, v.time_us, r, power) for v in part.vertices]
    best = min(values)

    def order(index: int) -> tuple[bool, float, float]:
        vertex = part.vertices[index]
        return (values[index] > best, vertex.loss_sum if r else vertex.time_us, vertex.time_us)

    picked = min(range(len(values)), key=order)
    bound = min(objective(*corner, r, power) for corner in corners(part.cuts))
    return part.vertices[picked], values[picked], min(bound, best)


def pick_under_ceiling(
    parts: list[Part], max_time_us: float | None, max_loss_sum: float | None
) -> tuple[list[Vertex], float, float]:
    """The vertices `under_ceiling` finds, the total of the minimised quantity and its proven lower bound over *all*
    allocations."""
    capped_time = max_time_us is not None
    ceiling = max_time_us if max_time_us is not None else max_loss_sum
    assert ceiling is not None
    vertices = under_ceiling(parts, max_time_us, max_loss_sum)
    value = math.fsum(vertex.loss_sum if capped_time else vertex.time_us for vertex in vertices)
    return vertices, value, min(_ceiling_bound(parts, ceiling, capped_time), value)


def under_ceiling(parts: Sequence[Part], max_time_us: float | None, max_loss_sum: float | None) -> list[Vertex]:
    """The hull allocation of least loss under a time ceiling, or of least time under a loss ceiling.

    Walks the merged frontier of the parts (the Minkowski sum of their hulls) by steepest exchange. `ValueError` with
    the reachable minimum when the ceiling is below it.
    """
    capped_time = max_time_us is not None
    ceiling = max_time_us if max_time_us is not None else max_loss_sum
    assert ceiling is not None
    at = [0 if capped_time else len(part.vertices) - 1 for part in parts]  # best of what is minimised
    step = 1 if capped_time else -1

    def capped(vertex: Vertex) -> float:
        return vertex.time_us if capped_time else vertex.loss_sum

    def minimised(vertex: Vertex) -> float:
        return vertex.loss_sum if capped_time else vertex.time_us

    def total(measure) -> float:  # type: ignore[no-untyped-def]
        return math.fsum(measure(part.vertices[i]) for part, i in zip(parts, at, strict=True))

    while total(capped) > ceiling:
        best_rate, best_part = math.inf, -1
        for number, part in enumerate(parts):
            after = at[number] + step
            if 0 <= after < len(part.vertices):
                here, there = part.vertices[at[number]], part.vertices[after]
                rate = (minimised(there) - minimised(here)) / (capped(here) - capped(there))
                if rate < best_rate:
                    best_rate, best_part = rate, number
        if best_part < 0:
            raise ValueError(total(capped))
        at[best_part] += step
    return [part.vertices[i] for part, i in zip(parts, at, strict=True)]


def _ceiling_bound(parts: list[Part], ceiling: float, capped_time: bool) -> float:
    """Least total of one quantity under a ceiling on the other, over the regions that the cuts leave."""
    regions = [corners(part.cuts) for part in parts]
    rates = {(a / b if not capped_time else b / a) for part in parts for a, b, _ in part.cuts if a > 0 and b > 0}
    best = 0.0
    for rate in {0.0, *rates}:  # weak duality: min m + rate x (c - ceiling)
        least = math.fsum(
            min((loss + rate * time) if capped_time else (time + rate * loss) for loss, time in region)
            for region in regions
        )
        best = max(best, least - rate * ceiling)
    return best
