"""Whether any allocation meets a budget: known from the sizes of the blocks, before there is a loss or a time."""

from collections.abc import Iterable

import numpy as np

from mxmoe_steps.allocation.blocks import Blocks, Losses
from mxmoe_steps.allocation.build import build_problem
from mxmoe_steps.allocation.constraints import Constraints
from mxmoe_steps.allocation.hull import require_reachable
from mxmoe_steps.allocation.relaxation import Relaxation
from mxmoe_steps.allocation.times import Times
from mxmoe_steps.errors import UserError
from mxmoe_steps.schemes import Scheme


def check_reachable(
    blocks: Blocks,
    candidates: list[Scheme],
    constraints: Constraints,
    scope: str,
    problems: Iterable[tuple[str, str]],
) -> None:
    """`UserError` for a problem, granularity and budget in bits, that no allocation of the candidates solves."""
    schemes = tuple(sorted({*candidates, *(scheme for _, scheme in constraints.fixed)}))
    shape = (len(blocks), len(schemes))
    bits = np.stack([[scheme.bits(features) for features in blocks.in_features.tolist()] for scheme in schemes], 1)
    weight_bits = np.rint(bits * blocks.params[:, None]).astype(np.int64)
    loss, tokens = np.zeros(shape), np.zeros(len(blocks), np.int64)
    losses = Losses(blocks, schemes, loss, weight_bits, "none", ("none",), loss[None], tokens)
    times = Times.zeros(*shape)
    for granularity, budget in problems:
        whole = scope == "model" or granularity == "uniform"
        masks = [np.ones(len(blocks), bool)] if whole else [blocks.layer == n for n in np.unique(blocks.layer)]
        for mask in masks:
            try:
                problem, *_ = build_problem(losses, candidates, times, granularity, budget, constraints, mask)
                require_reachable(Relaxation(problem))
            except UserError as error:
                raise UserError(f"sweep, granularity {granularity}, budget_bits {budget}: {error}") from None
