"""frontier: every allocation that some exchange rate between loss and time would choose, under a bit budget.

Reads one table of losses per scheme, the traced traffic and a GPU profile; writes the lower-left convex hull
of (loss, time) with the schemes of every vertex. `solve` picks from it for any r or ceiling, at no cost.
"""

import sys
from dataclasses import replace
from fractions import Fraction
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from mxmoe_steps.errors import UserError, run_cli
from mxmoe_steps.made_from import recorded
from mxmoe_steps.options.base import (
    Bits,
    Count,
    Exponent,
    Flag,
    Granularity,
    InFile,
    InFiles,
    InFolder,
    Names,
    Objective,
    Options,
    OutFile,
    Schemes,
    Settings,
    StepOptions,
    Threads,
    Tokens,
)
from mxmoe_steps.options.command_line import parse
from mxmoe_steps.options.shared import DrawnLoss, Limits, Seeded
from mxmoe_steps.values import exact


class Problem(Options):
    """An allocation problem."""

    budget_bits: Bits = Field(description="average bits per expert weight, scales and zero points counted, e.g. 2.25")
    tokens: Tokens = Field(description="tokens in one forward step, for predicted time")
    granularity: Granularity = Field("block", description="what shares a scheme: block, expert, layer, uniform")


class Counting(DrawnLoss, Limits):
    """The allocation problem."""

    domains: Objective = Field(
        "relative",
        description="how losses of the text's domains add up: their sum, the sum of their ratios to those of the best"
        " single scheme within the budget, or the worst of these ratios",
    )
    domain_weights: Annotated[list[str], Flag("DOMAIN=WEIGHT")] = Field(
        [], description="how much a domain's loss counts, e.g. code=2; others count 1"
    )
    no_worse_than_uniform: Names = Field(
        [], description="domains whose loss may not exceed that under the best single scheme within the budget"
    )
    least_tokens: Annotated[float, Field(ge=0, le=1000)] = Field(
        1.0,
        description="a routed expert's losses count as if it had seen at least this many times the calibration tokens"
        " of its layer's mean routed expert; a guard for text that calibration lacks",
    )
    time_as: Settings = Field(
        [], description="count another scheme's kernel for one that the GPU has none for, e.g. w4a4=w4a8_fp8"
    )

    @model_validator(mode="after")
    def _one_budget(self) -> Self:
        if self.scope == "layer" and (self.domains == "worst" or self.no_worse_than_uniform):
            raise ValueError(
                "domains: worst and no_worse_than_uniform are about the whole model's loss; use them with scope: model"
            )
        return self


class FrontierOptions(Problem, Counting, Seeded, StepOptions):
    """Options of the step."""

    losses: InFiles = Field(description="one table of losses per scheme")
    trace: InFolder = Field(description="folder that trace wrote")
    profile: InFile = Field(description="table that profile wrote")
    candidates: Schemes = Field([], description="schemes that blocks may take (default: all with a table); w16a16 too")
    loss: Literal["root_sum_squares", "sum_of_norms"] = Field("root_sum_squares", description="how losses add up")
    traffic_text: Names = Field([], description="traced texts to sample steps from (default: all)")
    phase: Literal["auto", "prefill", "decode"] = Field("auto", description="steps to sample; auto: by their tokens")
    steps: Count = Field(16, description="sampled steps that times average over")
    shared_tile: bool = Field(False, description="one token tile for the whole kernel, as in the paper")
    gap: Exponent | None = Field(
        None, description="relative distance to the bound (default: 0 for layers, 1e-4 for a whole model)"
    )
    prove: bool = Field(False, description="have CP-SAT confirm every vertex (with --gap 0)")
    threads: Threads = Field(1, description="solver workers; part of the result's bytes")
    out: OutFile = Field(description="JSON file to write")

    @model_validator(mode="after")
    def _norm_of_out_sq(self) -> Self:
        if self.loss == "sum_of_norms" and self.metric != "out_sq":
            raise ValueError("--loss sum_of_norms is the norm of out_sq; use it with --metric out_sq")
        return self


MODEL_GAP = 1e-4  # of a whole-model frontier; a layer's is exact
RICHER_GAP = 1e-2  # of what half a bit more would give


def frontier(options: FrontierOptions) -> None:
    """Compute and write the frontier."""
    import numpy as np

    from mxmoe_steps.allocation.blocks import read_losses, with_least_tokens
    from mxmoe_steps.allocation.buys import MORE_BITS
    from mxmoe_steps.allocation.constraints import parse_constraints
    from mxmoe_steps.allocation.domains import count_domains, parse_weights, uniform_within
    from mxmoe_steps.allocation.files import write_frontier
    from mxmoe_steps.allocation.parts import part_frontier
    from mxmoe_steps.allocation.pick import Part
    from mxmoe_steps.schemes import ORIGINAL, parse_scheme
    from mxmoe_steps.timing.predict import times_by_tile
    from mxmoe_steps.timing.profile import read_profile, timing_schemes
    from mxmoe_steps.timing.traffic import sample_traffic

    constraints = parse_constraints(
        options.fix, options.min_bits, options.time_as, options.max_schemes, options.tie_gate_up
    )
    wanted = {parse_scheme(text) for text in options.candidates}
    fixed = {scheme for _, scheme in constraints.fixed}
    losses = read_losses(options.losses, options.metric, ORIGINAL in wanted | fixed)
    losses = with_least_tokens(losses, options.least_tokens)
    candidates = sorted(wanted or set(losses.schemes))
    missing = sorted((wanted | fixed) - set(losses.schemes))
    if missing:
        raise UserError(f"no table of losses for {missing[0]}: calibrate it, or take it out of the candidates")
    if options.loss == "sum_of_norms":
        losses = replace(losses, loss=np.sqrt(losses.loss), by_domain=np.sqrt(losses.by_domain))
    uniform = uniform_within(losses, candidates, exact(options.budget_bits))
    weights = parse_weights(options.domain_weights)
    domains = count_domains(losses, uniform, options.domains, weights, options.no_worse_than_uniform)
    if options.prove and domains.coupled:
        raise UserError("--prove confirms sums over blocks; leave out --domains worst and --no-worse-than-uniform")
    if not domains.is_plain_sum:
        losses = replace(losses, loss=domains.loss(losses.by_domain))

    profile = read_profile(options.profile)
    traffic = sample_traffic(
        options.trace, options.traffic_text, options.tokens, options.phase, options.steps, options.seed
    )
    if traffic.model != losses.model:
        raise UserError(
            f"{options.trace} and {options.losses[0]} are of different models; trace and calibrate one model"
        )
    kernels = timing_schemes(losses.schemes, profile, constraints.time_as)
    used = [kernel for kernel, scheme in zip(kernels, losses.schemes, strict=True) if scheme in {*candidates, *fixed}]
    times = times_by_tile(losses.blocks, kernels, traffic, profile, used, options.shared_tile)
    whole = options.scope == "model" or options.granularity == "uniform"
    layers = np.unique(losses.blocks.layer).tolist()
    masks = [np.ones(len(losses.blocks), bool)] if whole else [losses.blocks.layer == layer for layer in layers]
    gap = options.gap if options.gap is not None else (MODEL_GAP if whole else 0.0)
    if options.prove and gap:
        raise UserError("--prove confirms optima; use it with --gap 0")
    budget = exact(options.budget_bits)
    more = str(Fraction(budget) + Fraction(MORE_BITS))
    parts: list[Part] = []
    richer: list[Part] = []
    for mask in masks:
        problem = (losses, domains, candidates, times, options.granularity)
        part = part_frontier(*problem, budget, constraints, mask, gap, options.threads, options.prove)
        print(f"frontier: part {len(parts) + 1} of {len(masks)}: {len(part.vertices)} vertices", file=sys.stderr)
        parts.append(part)
        coarse = max(gap, RICHER_GAP)
        richer.append(part_frontier(*problem, more, constraints, mask, coarse, options.threads, False))
    blocks = losses.blocks
    facts: dict[str, Any] = {
        "budget_bits": options.budget_bits,
        "candidates": [scheme.name for scheme in candidates],
        "constraints": {
            "fix": options.fix, "max_schemes": options.max_schemes, "min_bits": options.min_bits,
            "shared_tile": options.shared_tile, "tie_gate_up": options.tie_gate_up,
        },
        "device": profile.device,
        "domains": {
            "least_tokens": options.least_tokens, "names": list(losses.domains),
            "no_worse_than_uniform": options.no_worse_than_uniform,
            "objective": options.domains, "uniform": uniform.losses.tolist(), "weights": weights,
        },
        "experts": [[layer, blocks.expert[(blocks.layer == layer) & (blocks.kind == 0)].tolist()] for layer in layers],
        "granularity": options.granularity,
        "loss": options.loss,
        "metric": options.metric,
        "model": losses.model,
        "gap_limit": gap,
        "params": int(blocks.params.sum()),
        "proved_by": "cp-sat" if options.prove else "states",
        "quantizer": losses.quantizer,
        "schemes": [scheme.name for scheme in losses.schemes],
        "scope": options.scope,
        "time_is_estimate": profile.estimate,
        "timed_as": {s.name: k.name for s, k in zip(losses.schemes, kernels, strict=True) if s != k},
        "tokens": options.tokens,
        "traffic": {
            "phase": options.phase, "seed": options.seed, "steps": options.steps, "texts": options.traffic_text
        },
    }  # fmt: skip
    write_frontier(options.out, facts, parts, richer)


def main() -> None:
    """Command line."""
    options = parse(FrontierOptions, __doc__)
    with recorded(options.made_from, [options.out]):
        frontier(options)


if __name__ == "__main__":
    run_cli(main)
