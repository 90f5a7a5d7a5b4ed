"""solve: the allocation that a frontier offers for an exchange rate r or under a ceiling.

``--r`` minimises loss^r x time^(1-r) (r = 1: accuracy alone; each layer on its own under scope layer), exactly:
the minimum lies on the frontier's hull. ``--max-time-us`` and ``--max-loss`` take the best hull allocation
under a ceiling on the whole model and state its proven gap to all allocations.
"""

import math
import sys
from typing import Annotated, Any, Self

from pydantic import Field, model_validator

from mxmoe_steps.allocation.buys import Goal, sentences
from mxmoe_steps.allocation.files import DIGITS, read_frontier, write_allocation
from mxmoe_steps.allocation.pick import Part, Vertex, pick_by_r, pick_under_ceiling
from mxmoe_steps.errors import UserError, run_cli
from mxmoe_steps.made_from import recorded
from mxmoe_steps.options.base import Ceiling, Exponent, Flag, InFile, Options, OutFile, StepOptions
from mxmoe_steps.options.command_line import parse


class Goals(Options):
    """What to ask of a frontier: one of these."""

    r: Exponent | None = Field(None, description="accuracy against time: minimise loss^r time^(1-r), 0 to 1")
    max_time_us: Annotated[Ceiling | None, Flag("MICROSECONDS")] = Field(
        None, description="instead of r: the most accurate allocation within this predicted time of all expert layers"
    )
    max_loss: Annotated[Ceiling | None, Flag("LOSS")] = Field(
        None, description="instead of r: the fastest allocation within this predicted loss"
    )


class SolveOptions(Goals, StepOptions):
    """Options of the step."""

    frontier: InFile = Field(description="file that frontier wrote")
    out: OutFile = Field(description="JSON file to write")

    @model_validator(mode="after")
    def _one_goal(self) -> Self:
        if [self.r, self.max_time_us, self.max_loss].count(None) != 2:
            raise ValueError("give one of --r, --max-time-us and --max-loss")
        return self


PROVEN = 1e-6  # gap up to which a choice counts as optimal; beyond it the gap tells what may be missed


def choose(options: SolveOptions, parts: list[Part], power: float) -> tuple[list[Vertex], float, float]:
    """Vertices, the objective they reach and its proven lower bound.

    The objective of r under scope layer is the geometric mean of the layers' objectives.
    """
    if options.r is not None:
        picks = [pick_by_r(part, options.r, power) for part in parts]
        value = math.prod(value ** (1 / len(picks)) for _, value, _ in picks)
        bound = math.prod(bound ** (1 / len(picks)) for _, _, bound in picks)
        return [vertex for vertex, _, _ in picks], value, bound
    max_loss_sum = options.max_loss ** (1 / power) if options.max_loss is not None else None
    try:
        vertices, value, bound = pick_under_ceiling(parts, options.max_time_us, max_loss_sum)
    except ValueError as error:
        least = error.args[0] if options.max_time_us is not None else error.args[0] ** power
        flag = "--max-time-us" if options.max_time_us is not None else "--max-loss"
        raise UserError(f"{flag}: the smallest value this frontier reaches is {least:.6g}") from None
    return vertices, *((value**power, bound**power) if options.max_time_us is not None else (value, bound))


def expand(facts: dict[str, Any], vertices: list[Vertex]) -> list[list[Any]]:
    """Rows [layer, expert, gate, up, down] of the chosen vertices."""
    schemes = [facts["schemes"][DIGITS.index(digit)] for vertex in vertices for digit in vertex.schemes]
    experts = [(layer, expert) for layer, members in facts["experts"] for expert in members]
    return [[*key, *schemes[3 * i : 3 * i + 3]] for i, key in enumerate(experts)]


def solve(options: SolveOptions) -> None:
    """Pick and write an allocation."""
    facts, parts = read_frontier(options.frontier)
    power = 0.5 if facts["loss"] == "root_sum_squares" else 1.0
    vertices, value, bound = choose(options, parts, power)
    gap = (value - bound) / value if value else 0.0
    max_loss_sum = options.max_loss ** (1 / power) if options.max_loss is not None else None
    goal = Goal(options.r, options.max_time_us, max_loss_sum, power)
    digits = "".join(DIGITS[facts["schemes"].index(name)] for name in facts["candidates"])
    buys = sentences(parts, vertices, goal, facts["richer"], facts["budget_bits"], facts["candidates"], digits)
    for sentence in buys:
        print(f"solve: {sentence}", file=sys.stderr)
    domains = facts["domains"]
    names, uniform = domains.pop("names"), domains.pop("uniform")
    losses = [math.fsum(found) for found in zip(*(vertex.by_domain for vertex in vertices), strict=True)]
    kept = (
        "budget_bits", "candidates", "constraints", "device", "gap_limit", "granularity", "metric", "model",
        "proved_by", "quantizer", "scope", "time_is_estimate", "timed_as", "tokens", "traffic",
    )  # fmt: skip
    write_allocation(
        options.out,
        {
            **{key: facts[key] for key in kept},
            "assignment": expand(facts, vertices),
            "bits": sum(vertex.bits for vertex in vertices) / facts["params"],
            "bound": bound,
            "buys": buys,
            "domains": {
                **domains,
                "losses": dict(zip(names, losses, strict=True)),
                "uniform": dict(zip(names, uniform, strict=True)),
            },
            "gap": gap,
            "loss": math.fsum(vertex.loss_sum for vertex in vertices) ** power,
            "loss_form": facts["loss"],
            "max_loss": options.max_loss,
            "max_time_us": options.max_time_us,
            "objective": value,
            "price": sum(vertex.price for vertex in vertices) / len(vertices),
            "r": options.r,
            "status": "optimal" if gap <= PROVEN else "bounded",
            "tile_tokens": [vertex.tile_tokens for vertex in vertices] if vertices[0].tile_tokens else None,
            "time_us": math.fsum(vertex.time_us for vertex in vertices),
        },
    )


def main() -> None:
    """Command line."""
    options = parse(SolveOptions, __doc__)
    with recorded(options.made_from, [options.out]):
        solve(options)


if __name__ == "__main__":
    run_cli(main)
