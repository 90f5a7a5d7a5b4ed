"""solve: the allocation that a frontier offers for an exchange rate r or under a ceiling.

``--r`` minimises loss^r x time^(1-r) (r = 1: accuracy alone; each layer on its own under scope layer), exactly:
the minimum lies on the frontier's hull. ``--max-time-us`` and ``--max-loss`` take the best hull allocation
under a ceiling on the whole model and state its proven gap to all allocations.
"""

import argparse
import math
from typing import Any

from mxmoe_steps.allocation.files import DIGITS, read_frontier, write_allocation
from mxmoe_steps.allocation.pick import Part, Vertex, pick_by_r, pick_under_ceiling
from mxmoe_steps.arguments import file_to_write, finite, parser_for, zero_to_one
from mxmoe_steps.errors import UserError, run_cli
from mxmoe_steps.made_from import recorded

PROVEN = 1e-6  # gap up to which a choice counts as optimal; beyond it the gap tells what may be missed


def choose(args: argparse.Namespace, parts: list[Part], power: float) -> tuple[list[Vertex], float, float]:
    """Vertices, the objective they reach and its proven lower bound.

    The objective of r under scope layer is the geometric mean of the layers' objectives.
    """
    if args.r is not None:
        picks = [pick_by_r(part, args.r, power) for part in parts]
        value = math.prod(value ** (1 / len(picks)) for _, value, _ in picks)
        bound = math.prod(bound ** (1 / len(picks)) for _, _, bound in picks)
        return [vertex for vertex, _, _ in picks], value, bound
    max_loss_sum = args.max_loss ** (1 / power) if args.max_loss is not None else None
    try:
        vertices, value, bound = pick_under_ceiling(parts, args.max_time_us, max_loss_sum)
    except ValueError as error:
        least = error.args[0] if args.max_time_us is not None else error.args[0] ** power
        flag = "--max-time-us" if args.max_time_us is not None else "--max-loss"
        raise UserError(f"{flag}: the smallest value this frontier reaches is {least:.6g}") from None
    return vertices, *((value**power, bound**power) if args.max_time_us is not None else (value, bound))


def expand(facts: dict[str, Any], vertices: list[Vertex]) -> list[list[Any]]:
    """Rows [layer, expert, gate, up, down] of the chosen vertices."""
    schemes = [facts["schemes"][DIGITS.index(digit)] for vertex in vertices for digit in vertex.schemes]
    experts = [(layer, expert) for layer, members in facts["experts"] for expert in members]
    return [[*key, *schemes[3 * i : 3 * i + 3]] for i, key in enumerate(experts)]


def solve(args: argparse.Namespace) -> None:
    """Pick and write an allocation."""
    facts, parts = read_frontier(args.frontier)
    power = 0.5 if facts["loss"] == "root_sum_squares" else 1.0
    vertices, value, bound = choose(args, parts, power)
    gap = (value - bound) / value if value else 0.0
    kept = (
        "budget_bits", "candidates", "constraints", "device", "gap_limit", "granularity", "metric", "model",
        "proved_by", "quantizer", "scope", "time_is_estimate", "timed_as", "tokens", "traffic",
    )  # fmt: skip
    write_allocation(
        args.out,
        {
            **{key: facts[key] for key in kept},
            "assignment": expand(facts, vertices),
            "bits": sum(vertex.bits for vertex in vertices) / facts["params"],
            "bound": bound,
            "gap": gap,
            "loss": math.fsum(vertex.loss_sum for vertex in vertices) ** power,
            "loss_form": facts["loss"],
            "max_loss": args.max_loss,
            "max_time_us": args.max_time_us,
            "objective": value,
            "price": sum(vertex.price for vertex in vertices) / len(vertices),
            "r": args.r,
            "status": "optimal" if gap <= PROVEN else "bounded",
            "tile_tokens": [vertex.tile_tokens for vertex in vertices] if vertices[0].tile_tokens else None,
            "time_us": math.fsum(vertex.time_us for vertex in vertices),
        },
    )


def main() -> None:
    """Command line."""
    parser = parser_for(__doc__)
    parser.add_argument("--frontier", required=True, help="file that frontier wrote")
    goal = parser.add_mutually_exclusive_group(required=True)
    goal.add_argument("--r", type=zero_to_one, help="weight of the loss, 0 to 1; the paper uses 0.75")
    goal.add_argument("--max-time-us", type=finite, help="most accurate allocation under this time")
    goal.add_argument("--max-loss", type=finite, help="fastest allocation under this loss")
    parser.add_argument("--out", type=file_to_write, required=True, help="JSON file to write")
    args = parser.parse_args()
    with recorded(args.made_from, [args.out]):
        solve(args)


if __name__ == "__main__":
    run_cli(main)
