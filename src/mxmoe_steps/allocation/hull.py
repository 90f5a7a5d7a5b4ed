"""The lower-left convex hull of (loss, time): all that any r in L^r T^(1-r) can ask for."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from mxmoe_steps.allocation.coupled import CoupledSearch
from mxmoe_steps.allocation.domains import Domains
from mxmoe_steps.allocation.minimize import Solution, minimize, prove_by_cp_sat
from mxmoe_steps.allocation.pick import corners, envelope
from mxmoe_steps.allocation.problem import Problem
from mxmoe_steps.allocation.relaxation import Relaxation
from mxmoe_steps.errors import UserError

TIE = 1e-9  # weight of the other quantity, relative, where one alone is minimised
ON_EDGE = 1e-10  # relative distance below a hull edge that counts as on it


Solve = Callable[[float, float, float, int], Solution]  # of directions a, b, a gap and workers


@dataclass(frozen=True)
class Hull:
    """Vertices by rising loss, and proven half-planes a x loss + b x time >= bound as (a, b, bound)."""

    solutions: list[Solution]
    cuts: list[tuple[float, float, float]]


def lower_left_hull(
    problem: Problem, gap: float, workers: int = 1, prove: bool = False, domains: Domains | None = None
) -> Hull:
    """Dichotomic search (Aneja and Nair 1979): solve along each edge's normal until no edge moves.

    With ``gap`` > 0 an edge is left once the proven half-planes are within that relative distance of it.
    ``prove`` has CP-SAT confirm every vertex along the normal that found it. ``domains``: where they couple blocks, and
    the loss is theirs; solutions then are as near to their bounds as `CoupledSearch` brings them.
    """
    relaxation = Relaxation(problem)
    require_reachable(relaxation)
    solve: Solve = partial(minimize, relaxation)
    if domains is not None and domains.coupled:
        solve = CoupledSearch(problem, domains).minimize
    cuts: list[tuple[float, float, float]] = []
    fastest = _end(solve, 0.0, cuts, gap, workers)
    accurate = _end(solve, 1.0, cuts, gap, workers)
    solutions = [accurate]
    edges = [(accurate, fastest)]  # still to refine, the one of least loss last
    while edges:
        left, right = edges.pop()
        a, b = left.time_us - right.time_us, right.loss - left.loss
        if a <= 0 or b <= 0:  # the same solution, up to ties
            continue
        chord = a * left.loss + b * left.time_us
        if gap and min(a * loss + b * time_us for loss, time_us in corners(cuts)) >= chord * (1 - gap):
            solutions.append(right)
            continue
        middle = solve(a / chord, b / chord, gap / 2, workers)
        cuts.append((middle.a, middle.b, middle.bound))
        if middle.value < 1 - ON_EDGE and left.loss < middle.loss < right.loss:
            edges += [(middle, right), (left, middle)]
        else:
            solutions.append(right)
    if prove:
        solutions = [prove_by_cp_sat(relaxation, solution, workers) for solution in solutions]
    return Hull(solutions, envelope(cuts))


def require_reachable(relaxation: Relaxation) -> None:
    """`UserError` where the smallest allocation is above the budget."""
    problem = relaxation.problem
    if relaxation.smallest_bits > problem.budget:
        raise UserError(
            f"no allocation meets an average of {problem.budget / problem.params:g} bits per weight: the smallest "
            f"reachable average is {relaxation.smallest_bits / problem.params:.4f} bits with these candidates"
        )


def _end(solve: Solve, share: float, cuts: list[tuple[float, float, float]], gap: float, workers: int) -> Solution:
    """Least loss (share 1) or least time (share 0), ties broken by the other quantity."""
    first = solve(share, 1 - share, gap / 2, workers)
    cuts.append((share, 1 - share, first.bound))
    a, b = (1.0, TIE * first.loss / first.time_us) if share else (TIE * first.time_us / (first.loss or 1.0), 1.0)
    last = solve(a, b or TIE, gap / 2, workers)
    cuts.append((a, b or TIE, last.bound))
    return last
