"""What a loss is when the calibration text has several domains: their weights, their units, the worst of them.

With q_d(x) the loss of domain d under allocation x, U_d that of the uniform allocation of the same budget, their sums
over domains q and U, and weights w_d whose mean is 1, the loss to minimise is

    sum         sum_d w_d q_d(x)                   nats where most nats are lost; q without weights
    relative    sum_d w_d q_d(x) U / (D U_d)       the mean ratio to uniform, times U
    worst       max_d w_d q_d(x) U / U_d           the largest ratio to uniform, times U

so that all are U at the uniform allocation, and the same where there is one domain. A ceiling asks for q_d(x) <= U_d.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mxmoe_steps.allocation.blocks import Losses, budget_in_bits
from mxmoe_steps.allocation.constraints import split_setting
from mxmoe_steps.errors import UserError
from mxmoe_steps.options.base import Objective
from mxmoe_steps.schemes import Scheme

HEAVIEST = 1e6  # weight of a domain; more is a slip of the pen


@dataclass(frozen=True)
class Uniform:
    """The single scheme of least loss within a budget, and the loss of every domain under it, [D]."""

    scheme: Scheme
    losses: NDArray[np.float64]


@dataclass(frozen=True)
class Domains:
    """How D domains count: each loss times its ``factor`` [D] is summed, or the largest of them is the ``worst``.

    ``ceiling`` [D]: most that a domain's loss may be, infinite where it may be anything.
    """

    factor: NDArray[np.float64]
    ceiling: NDArray[np.float64]
    worst: bool

    @property
    def is_plain_sum(self) -> bool:
        """Whether the loss is the one that the domains' losses are parts of."""
        return not self.worst and bool((self.factor == 1).all())

    @property
    def coupled(self) -> bool:
        """Whether the objective is more than a sum over blocks."""
        return self.worst or bool(np.isfinite(self.ceiling).any())

    def loss(self, by_domain: NDArray[np.float64]) -> NDArray[np.float64]:
        """The loss to minimise, from those of every domain [D, ...]."""
        scaled = by_domain * self.factor.reshape(-1, *[1] * (by_domain.ndim - 1))
        return np.asarray(scaled.max(0) if self.worst else scaled.sum(0))


def parse_weights(settings: Sequence[str]) -> dict[str, float]:
    """Weights of ``DOMAIN=WEIGHT``; `UserError` for one that is no positive number."""
    weights = {}
    for text in settings:
        name, value = split_setting(text, "--domain-weights")
        try:
            weights[name] = float(value)
        except ValueError:
            weights[name] = math.nan
        if not 0 < weights[name] <= HEAVIEST:
            raise UserError(f"--domain-weights {text!r}: {value!r} is not a positive number; write e.g. {name}=2")
    return weights


def uniform_within(losses: Losses, candidates: Sequence[Scheme], budget_bits: str) -> Uniform:
    """The best single scheme, whatever is fixed; the smallest where none meets the budget."""
    budget = budget_in_bits(budget_bits, int(losses.blocks.params.sum()))
    columns = [losses.schemes.index(scheme) for scheme in candidates]
    within = [column for column in columns if losses.bits[:, column].sum() <= budget]
    if within:
        best = min(within, key=lambda column: float(losses.loss[:, column].sum()))
    else:
        best = min(columns, key=lambda column: int(losses.bits[:, column].sum()))
    return Uniform(losses.schemes[best], losses.by_domain[:, :, best].sum(1))


def count_domains(
    losses: Losses, uniform: Uniform, objective: Objective, weights: dict[str, float], capped: Sequence[str]
) -> Domains:
    """What ``objective`` says, with a ceiling for every domain in ``capped``.

    `UserError` for a domain that the text does not have.
    """
    for name in (*weights, *capped):
        if name not in losses.domains:
            raise UserError(f"no domain {name!r}: the calibration text has {', '.join(losses.domains)}")
    count = len(losses.domains)
    weight = np.array([weights.get(name, 1.0) for name in losses.domains])
    factor = weight * (count / weight.sum())
    ceiling = np.full(count, np.inf)
    total = float(uniform.losses.sum())
    unit = np.where(uniform.losses > 0, uniform.losses, total / count or 1.0)
    if objective != "sum":
        factor *= (total or 1.0) / (unit if objective == "worst" else count * unit)
    named = np.isin(losses.domains, capped)
    ceiling[named] = uniform.losses[named]
    return Domains(factor, ceiling, objective == "worst")
