"""From tables to the frontier of one part: a layer (scope layer) or the model (scope model)."""

import numpy as np
from numpy.typing import NDArray

from mxmoe_steps.allocation.blocks import Losses
from mxmoe_steps.allocation.build import build_problem
from mxmoe_steps.allocation.constraints import Constraints
from mxmoe_steps.allocation.domains import Domains
from mxmoe_steps.allocation.files import DIGITS
from mxmoe_steps.allocation.hull import lower_left_hull
from mxmoe_steps.allocation.pick import Part, Vertex, corners, envelope
from mxmoe_steps.allocation.times import Times
from mxmoe_steps.schemes import Scheme


def part_frontier(
    losses: Losses,
    domains: Domains,
    candidates: list[Scheme],
    times: dict[int | None, Times],
    granularity: str,
    budget_bits: str,
    constraints: Constraints,
    mask: NDArray[np.bool_],
    gap: float,
    workers: int,
    prove: bool,
) -> Part:
    """Frontier over the blocks ``mask`` (bool [B]); ``losses.loss`` is what ``domains`` make of the domains' losses.

    ``times`` has one entry, key None, or one per token tile when the whole kernel shares a tile: then the
    frontier is the hull of the tiles' frontiers.
    """
    frontiers = []
    for tile, tile_times in times.items():
        problem, assigned = build_problem(losses, candidates, tile_times, granularity, budget_bits, constraints, mask)
        hull = lower_left_hull(problem, gap, workers, prove, domains)
        vertices = []
        for solution in hull.solutions:
            columns = assigned.schemes(solution.choice)
            price = solution.lam * problem.params / solution.value if solution.value else 0.0
            text = "".join(DIGITS[column] for column in columns)
            by_domain = losses.by_domain[:, np.flatnonzero(mask), columns].sum(1).tolist()
            vertices.append(Vertex(solution.loss, solution.time_us, solution.bits, price, text, by_domain, tile))
        frontiers.append(Part(vertices, hull.cuts))
    alone = len(frontiers) == 1 and not domains.coupled  # coupled solutions need not be corners of their hull
    return frontiers[0] if alone else _merge(frontiers)


def _merge(frontiers: list[Part]) -> Part:
    """The hull of several frontiers."""
    cuts = []
    regions = [corners(part.cuts) for part in frontiers]
    for a, b, _ in {cut for part in frontiers for cut in part.cuts}:
        cuts.append((a, b, min(a * loss + b * time_us for region in regions for loss, time_us in region)))
    hull: list[Vertex] = []
    for vertex in sorted((v for part in frontiers for v in part.vertices), key=lambda v: (v.loss_sum, v.time_us)):
        if hull and vertex.time_us >= hull[-1].time_us:
            continue
        while len(hull) > 1 and _above(hull[-2], hull[-1], vertex):
            hull.pop()
        hull.append(vertex)
    return Part(hull, envelope(cuts))


def _above(left: Vertex, middle: Vertex, right: Vertex) -> bool:
    """Whether ``middle`` lies on or above the line from ``left`` to ``right``."""
    a, b = left.time_us - right.time_us, right.loss_sum - left.loss_sum
    return a * middle.loss_sum + b * middle.time_us >= a * left.loss_sum + b * left.time_us
