"""frontier: every allocation that some exchange rate between loss and time would choose, under a bit budget.

Reads one table of losses per scheme, the traced traffic and a GPU profile; writes the lower-left convex hull
of (loss, time) with the schemes of every vertex. `solve` picks from it for any r or ceiling, at no cost.
"""

import argparse
import sys
from dataclasses import replace
from fractions import Fraction
from typing import Any

from mxmoe_steps.arguments import file_to_write, natural, parser_for, positive, zero_to_one
from mxmoe_steps.errors import UserError, run_cli
from mxmoe_steps.made_from import recorded

MOST_BITS = 64  # of a weight
MODEL_GAP = 1e-4  # of a whole-model frontier; a layer's is exact


def frontier(args: argparse.Namespace) -> None:
    """Compute and write the frontier."""
    import numpy as np

    from mxmoe_steps.allocation.blocks import read_losses
    from mxmoe_steps.allocation.constraints import parse_constraints
    from mxmoe_steps.allocation.files import write_frontier
    from mxmoe_steps.allocation.parts import part_frontier
    from mxmoe_steps.allocation.pick import Part
    from mxmoe_steps.schemes import ORIGINAL, parse_scheme
    from mxmoe_steps.timing.predict import times_by_tile
    from mxmoe_steps.timing.profile import read_profile, timing_schemes
    from mxmoe_steps.timing.traffic import sample_traffic

    constraints = parse_constraints(args.fix, args.min_bits, args.time_as, args.max_schemes, args.tie_gate_up)
    try:
        if not 0 < Fraction(args.budget_bits) <= MOST_BITS:
            raise ValueError
    except (ValueError, ZeroDivisionError):
        raise UserError(
            f"--budget-bits {args.budget_bits!r}: expected a number above 0 and up to {MOST_BITS}, e.g. 2.25"
        ) from None
    if args.loss == "sum_of_norms" and args.metric != "out_sq":
        raise UserError("--loss sum_of_norms is the norm of out_sq; use it with --metric out_sq")
    wanted = {parse_scheme(text) for text in args.candidates}
    fixed = {scheme for _, scheme in constraints.fixed}
    losses = read_losses(args.losses, args.metric, ORIGINAL in wanted | fixed)
    candidates = sorted(wanted or set(losses.schemes))
    missing = sorted((wanted | fixed) - set(losses.schemes))
    if missing:
        raise UserError(f"no table of losses for {missing[0]}: calibrate it, or take it out of the candidates")
    if args.loss == "sum_of_norms":
        losses = replace(losses, loss=np.sqrt(losses.loss))

    profile = read_profile(args.profile)
    traffic = sample_traffic(args.trace, args.traffic_text, args.tokens, args.phase, args.steps, args.seed)
    if traffic.model != losses.model:
        raise UserError(f"{args.trace} and {args.losses[0]} are of different models; trace and calibrate one model")
    kernels = timing_schemes(losses.schemes, profile, constraints.time_as)
    used = [kernel for kernel, scheme in zip(kernels, losses.schemes, strict=True) if scheme in {*candidates, *fixed}]
    alone = args.granularity in ("layer", "uniform") and not fixed and not args.shared_tile
    times = times_by_tile(losses.blocks, kernels, traffic, profile, None if alone else used, args.shared_tile)
    whole = args.scope == "model" or args.granularity == "uniform"
    layers = np.unique(losses.blocks.layer).tolist()
    masks = [np.ones(len(losses.blocks), bool)] if whole else [losses.blocks.layer == layer for layer in layers]
    gap = args.gap if args.gap is not None else (MODEL_GAP if whole else 0.0)
    if args.prove and gap:
        raise UserError("--prove confirms optima; use it with --gap 0")
    parts: list[Part] = []
    for mask in masks:
        part = part_frontier(
            losses, candidates, times, args.granularity, args.budget_bits, constraints, mask, gap,
            args.threads, args.prove,
        )  # fmt: skip
        print(f"frontier: part {len(parts) + 1} of {len(masks)}: {len(part.vertices)} vertices", file=sys.stderr)
        parts.append(part)
    blocks = losses.blocks
    facts: dict[str, Any] = {
        "budget_bits": float(Fraction(args.budget_bits)),
        "candidates": [scheme.name for scheme in candidates],
        "constraints": {
            "fix": args.fix, "max_schemes": args.max_schemes, "min_bits": args.min_bits,
            "shared_tile": args.shared_tile, "tie_gate_up": args.tie_gate_up,
        },
        "device": profile.device,
        "experts": [[layer, blocks.expert[(blocks.layer == layer) & (blocks.kind == 0)].tolist()] for layer in layers],
        "granularity": args.granularity,
        "loss": args.loss,
        "metric": args.metric,
        "model": losses.model,
        "gap_limit": gap,
        "params": int(blocks.params.sum()),
        "proved_by": "cp-sat" if args.prove else "states",
        "quantizer": losses.quantizer,
        "schemes": [scheme.name for scheme in losses.schemes],
        "scope": args.scope,
        "time_is_estimate": profile.estimate,
        "timed_as": {s.name: k.name for s, k in zip(losses.schemes, kernels, strict=True) if s != k},
        "tokens": args.tokens,
        "traffic": {"phase": args.phase, "seed": args.seed, "steps": args.steps, "texts": args.traffic_text},
    }  # fmt: skip
    write_frontier(args.out, facts, parts)


def main() -> None:
    """Command line."""
    parser = parser_for(__doc__)
    add = parser.add_argument
    add("--losses", nargs="+", required=True, metavar="PARQUET", help="one table of losses per scheme")
    add("--trace", required=True, help="folder that trace wrote")
    add("--profile", required=True, help="table that profile wrote")
    add("--budget-bits", required=True, metavar="BITS", help="average true bits per expert weight, e.g. 2.25")
    add("--tokens", type=positive, required=True, help="tokens in one forward step")
    add("--candidates", nargs="+", default=[], metavar="SCHEME", help="default: all with a table; may add w16a16")
    add("--granularity", default="block", choices=["block", "expert", "layer", "uniform"])
    add("--scope", default="layer", choices=["layer", "model"], help="whether the budget holds in each layer")
    add("--metric", default="out_sq", choices=["out_sq", "fisher"], help="fisher compares across layers")
    add("--loss", default="root_sum_squares", choices=["root_sum_squares", "sum_of_norms"])
    add("--traffic-text", nargs="+", default=[], metavar="NAME", help="texts to sample steps from (default: all)")
    add("--phase", default="auto", choices=["auto", "prefill", "decode"])
    add("--steps", type=positive, default=16, help="sampled steps that times average over (default 16)")
    add("--seed", type=natural, default=0)
    add("--fix", action="append", default=[], metavar="SELECTOR=SCHEME", help="e.g. shared=w8a8 or layer:0=w4a16")
    add("--min-bits", action="append", default=[], metavar="SELECTOR=BITS", help="e.g. block:down=3")
    add("--max-schemes", type=positive, metavar="K", help="different schemes per layer")
    add("--tie-gate-up", action="store_true", help="gate and up of an expert take the same scheme")
    add("--shared-tile", action="store_true", help="one token tile for the whole kernel, as in the paper")
    add("--time-as", action="append", default=[], metavar="SCHEME=SCHEME", help="count another scheme's kernel")
    add("--gap", type=zero_to_one, help="relative distance to the bound (default 0 for layers, 1e-4 for a whole model)")
    add("--prove", action="store_true", help="have CP-SAT confirm every vertex (with --gap 0)")
    add("--threads", type=positive, default=1, help="solver workers; part of the result's bytes (default 1)")
    add("--out", type=file_to_write, required=True, help="JSON file to write")
    args = parser.parse_args()
    with recorded(args.made_from, [args.out]):
        frontier(args)


if __name__ == "__main__":
    run_cli(main)
