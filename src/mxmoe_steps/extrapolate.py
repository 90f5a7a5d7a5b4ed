"""extrapolate: loss against time at the size of a larger model, from the losses of this one.

The allocation problem of a larger model's layers, on the same GPU: shapes and routing are the larger model's, every
layer's losses are those of a layer here, spread over its blocks. So times are of the real size, and losses say what
mixtures look like, not what that model loses. Writes, for every number of tokens in a step, the uniform schemes and the
frontier under every budget.
"""

import sys
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field, field_validator

from mxmoe_steps.errors import run_cli
from mxmoe_steps.made_from import recorded
from mxmoe_steps.options.base import (
    Bits,
    Count,
    Exponent,
    Flag,
    InFile,
    InFiles,
    Options,
    OutFile,
    Schemes,
    Settings,
    StepOptions,
    Tokens,
)
from mxmoe_steps.options.command_line import parse
from mxmoe_steps.options.shared import DrawnLoss, Seeded
from mxmoe_steps.timing.shapes import MODELS, shape_like
from mxmoe_steps.values import exact

if TYPE_CHECKING:
    from mxmoe_steps.allocation.blocks import Losses
    from mxmoe_steps.allocation.pick import Part
    from mxmoe_steps.timing.profile import Profile
    from mxmoe_steps.timing.shapes import LayerShape
    from mxmoe_steps.timing.traffic import Traffic

_SHAPES = [shape.model for shape in MODELS]


class Larger(Options):
    """Loss against time at the size of a larger model; without this section there is no such step."""

    shape: Annotated[str, Flag("MODEL")] = Field(description=f"whose layers: {', '.join(_SHAPES)}")
    skew: Annotated[float, Field(ge=0, le=4)] = Field(
        0.5,
        description="of its traffic: the popularity of rank k is 1 / k^skew; at 0.5 the busiest of 60 takes four times"
        " the mean",
    )
    budget_bits: list[Bits] = Field([3.25, 5.0], description="budgets, average bits per expert weight", min_length=1)
    tokens: list[Tokens] = Field([64, 8192], description="tokens in one forward step", min_length=1)
    r: Exponent = Field(0.75, description="the allocation to mark: that of least loss^r time^(1-r)")

    @field_validator("shape")
    @classmethod
    def _known(cls, name: str) -> str:
        if name not in _SHAPES:
            raise ValueError(f"no shape {name!r}; known are {', '.join(_SHAPES)}")
        return name


class ExtrapolateOptions(Larger, DrawnLoss, Seeded, StepOptions):
    """Options of the step."""

    losses: InFiles = Field(description="one table of losses per scheme")
    profile: InFile = Field(description="table that profile wrote")
    candidates: Schemes = Field(description="schemes that blocks may take")
    time_as: Settings = Field([], description="count another scheme's kernel for one that the GPU has none for")
    steps: Count = Field(16, description="sampled steps that times average over")
    gap: Exponent = Field(1e-2, description="relative distance of a frontier to its bound")
    out: OutFile = Field(description="JSON file to write")


def larger_losses(losses: "Losses", name: str) -> tuple["Losses", "LayerShape"]:
    """The losses on layers of the model ``name``, and these layers."""
    import numpy as np

    from mxmoe_steps.allocation.enlarged import enlarged, layer_blocks
    from mxmoe_steps.schemes import SHARED

    shape = shape_like(name, shared=bool((losses.blocks.expert == SHARED).any()))
    layers, width = np.unique(losses.blocks.layer).tolist(), shape.intermediate
    return enlarged(losses, layer_blocks(layers, shape.experts, shape.hidden, width, width * shape.slices)), shape


class Clock:
    """Predicted times of allocations of all blocks, and what else is told of them."""

    def __init__(self, losses: "Losses", traffic: "Traffic", profile: "Profile", timed_as: dict[str, str]) -> None:
        self._losses, self._traffic, self._profile, self._timed_as = losses, traffic, profile, timed_as
        self._tables: dict[Any, Any] = {}

    def layer_us(self, names: list[str]) -> float:
        """Of a scheme for every block."""
        from mxmoe_steps.timing.predict import mean_layer_us

        blocks = self._losses.blocks
        experts = zip(blocks.layer[::3].tolist(), blocks.expert[::3].tolist(), strict=True)
        rows = [[*key, *names[3 * i : 3 * i + 3]] for i, key in enumerate(experts)]
        allocation = {"assignment": rows, "timed_as": self._timed_as}
        return mean_layer_us(allocation, blocks, self._traffic, self._profile, self._tables)

    def spot(self, columns: list[int]) -> dict[str, Any]:
        """Bits, loss and time when every block takes the scheme of that column of the losses."""
        import numpy as np

        losses, index = self._losses, np.arange(len(columns))
        params = int(losses.blocks.params.sum())
        return {
            "bits": int(losses.bits[index, columns].sum()) / params,
            "loss": float(losses.loss[index, columns].sum()),
            "time_us": self.layer_us([losses.schemes[column].name for column in columns]),
        }

    def shares(self, columns: list[int]) -> dict[str, float]:
        """Scheme -> part of the weights."""
        import numpy as np

        losses = self._losses
        weights = np.bincount(columns, weights=losses.blocks.params, minlength=len(losses.schemes))
        of = zip(losses.schemes, (weights / weights.sum()).tolist(), strict=True)
        return {scheme.name: share for scheme, share in of if share}


def described(part: "Part", budget_bits: float, r: float, clock: Clock) -> dict[str, Any]:
    """A frontier as it is written: fastest last, with the vertex that ``r`` picks."""
    from mxmoe_steps.allocation.files import DIGITS
    from mxmoe_steps.allocation.pick import pick_by_r

    columns = [[DIGITS.index(digit) for digit in vertex.schemes] for vertex in part.vertices]
    return {
        "budget_bits": budget_bits,
        "picked": part.vertices.index(pick_by_r(part, r, 0.5)[0]),
        "vertices": [clock.spot(of) | {"shares": clock.shares(of)} for of in columns],
    }


def extrapolate(options: ExtrapolateOptions) -> None:
    """Solve the larger model's allocation for every budget and number of tokens."""
    import numpy as np

    from mxmoe_steps.allocation.blocks import read_losses
    from mxmoe_steps.allocation.constraints import parse_constraints
    from mxmoe_steps.allocation.domains import Domains
    from mxmoe_steps.allocation.parts import part_frontier
    from mxmoe_steps.extrapolations import write_extrapolation
    from mxmoe_steps.schemes import ORIGINAL, parse_scheme
    from mxmoe_steps.timing.predict import times_by_tile
    from mxmoe_steps.timing.profile import read_profile, timing_schemes
    from mxmoe_steps.timing.traffic import skewed_traffic

    candidates = sorted(parse_scheme(text) for text in options.candidates)
    losses, shape = larger_losses(read_losses(options.losses, options.metric, ORIGINAL in candidates), options.shape)
    constraints = parse_constraints([], [], options.time_as, None, True)
    profile = read_profile(options.profile)
    kernels = timing_schemes(losses.schemes, profile, constraints.time_as)
    timed_as = {s.name: k.name for s, k in zip(losses.schemes, kernels, strict=True) if s != k}
    carried = [kernel for kernel, scheme in zip(kernels, losses.schemes, strict=True) if scheme in candidates]
    layers = tuple(np.unique(losses.blocks.layer).tolist())
    everything, plain = np.ones(len(losses.blocks), bool), np.full(len(losses.domains), np.inf)
    domains = Domains(np.ones_like(plain), plain, worst=False)
    cases = []
    for tokens in options.tokens:
        traffic = skewed_traffic(shape, layers, tokens, options.skew, options.steps, options.seed)
        times = times_by_tile(losses.blocks, kernels, traffic, profile, carried, one_tile=False)
        clock = Clock(losses, traffic, profile, timed_as)
        frontiers = []
        for budget in options.budget_bits:
            part = part_frontier(
                losses, domains, candidates, times, "block", exact(budget), constraints, everything,
                options.gap, 1, False,
            )  # fmt: skip
            print(f"extrapolate: {tokens} tokens, {budget:g} bits: {len(part.vertices)} vertices", file=sys.stderr)
            frontiers.append(described(part, budget, options.r, clock))
        uniform = [
            {"scheme": scheme.name, **clock.spot([losses.schemes.index(scheme)] * len(everything))}
            for scheme in candidates
        ]
        rows = traffic.rows.mean((0, 1))
        cases.append(
            {
                "busiest": float(rows.max() / rows.mean()),
                "frontiers": frontiers,
                "original_us": clock.layer_us([ORIGINAL.name] * len(everything)),
                "tokens": tokens,
                "uniform": uniform,
            }
        )
    write_extrapolation(
        options.out,
        {
            "cases": cases,
            "device": profile.device,
            "experts": shape.experts,
            "layers": len(layers),
            "metric": options.metric,
            "model": losses.model,
            "quantizer": losses.quantizer,
            "r": options.r,
            "shape": shape.model,
            "skew": options.skew,
            "time_is_estimate": profile.estimate,
            "timed_as": timed_as,
        },
    )


def main() -> None:
    """Command line."""
    options = parse(ExtrapolateOptions, __doc__)
    with recorded(options.made_from, [options.out]):
        extrapolate(options)


if __name__ == "__main__":
    run_cli(main)
