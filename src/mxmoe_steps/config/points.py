"""The sweep spelled out: every checkpoint that a configuration asks for, with its name in result paths."""

import itertools
from typing import Literal

from mxmoe_steps.config.sections import Config
from mxmoe_steps.evaluations import TUNED
from mxmoe_steps.frontier import Problem
from mxmoe_steps.options.base import Granularity
from mxmoe_steps.quantizers.names import QuantizerName
from mxmoe_steps.values import exact

Goal = Literal["r", "max_time_us", "max_loss"]
_GOAL_TAGS: dict[str, str] = {"r": "r", "max_time_us": "us", "max_loss": "loss"}


class Point(Problem):
    """One checkpoint of the sweep; its `name` is the wildcard in result paths."""

    quantizer: QuantizerName
    goal: Goal
    value: float
    tuned: bool

    @property
    def frontier(self) -> str:
        """Name of the frontier the point lies on: everything but the goal."""
        return f"b{exact(self.budget_bits)}_t{self.tokens}_{self.granularity}_{self.quantizer}"

    @property
    def allocation(self) -> str:
        """Name of the allocation, of which there may be a tuned checkpoint, too: everything but `tuned`."""
        return f"{self.frontier}_{_GOAL_TAGS[self.goal]}{exact(self.value)}"

    @property
    def name(self) -> str:
        """For example ``b2.25_t64_block_gptq_r0.75`` or ``b3_t64_block_gptq_us120_tuned``."""
        return f"{self.allocation}{TUNED if self.tuned else ''}"


def points(config: Config) -> list[Point]:
    """Every point of the sweep, then the uniform baselines of every budget; sorted, without repeats.

    A baseline is the single scheme of least loss within the budget (granularity uniform, r = 1).
    """
    found = set()
    least_tokens = min(tokens for grid in config.sweep for tokens in grid.tokens)
    for grid in config.sweep:
        goal: Goal = "max_time_us" if grid.max_time_us else "max_loss" if grid.max_loss else "r"
        axes = (grid.budget_bits, grid.tokens, grid.granularity, grid.quantizer, getattr(grid, goal), grid.tuned)
        for budget, tokens, granularity, quantizer, value, tuned in itertools.product(*axes):
            found.add(_point(budget, tokens, granularity, quantizer, goal, value, tuned))
        for budget, quantizer in itertools.product(grid.budget_bits, config.baselines):
            found.add(_point(budget, least_tokens, "uniform", quantizer, "r", 1.0, tuned=False))
    return sorted(found, key=lambda point: (point.budget_bits, point.name))


def _point(
    budget_bits: float,
    tokens: int,
    granularity: Granularity,
    quantizer: QuantizerName,
    goal: Goal,
    value: float,
    tuned: bool,
) -> Point:
    return Point(
        budget_bits=budget_bits,
        tokens=tokens,
        granularity=granularity,
        quantizer=quantizer,
        goal=goal,
        value=value,
        tuned=tuned,
    )
