"""Who gains and who loses by mixing precisions: KL divergence by text, for every way that domains may count.

    snakemake --cores 2                      # the demo: captures and losses
    python benchmarks/domains.py             # half an hour on two cores

First table: allocations of least loss (r = 1) under every objective, beside uniform GPTQ weights. Second: the same when
one domain is left out of the calibration text, and what guards against that: a floor on bits, a floor on an expert's
traffic, shrinkage of an expert's losses toward the mean of its layer.

Text: `held_out`. Differences and ratios are to uniform weights; a difference comes with its standard error, paired over
sequences.
"""

import argparse
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from held_out import DOMAINS, Model, Weights, row_of
from loss_validation import KEYS, SCHEMES
from safetensors.torch import load_file

from mxmoe_steps.allocation.blocks import Losses, read_losses, with_least_tokens
from mxmoe_steps.allocation.build import build_problem
from mxmoe_steps.allocation.constraints import Constraints
from mxmoe_steps.allocation.coupled import CoupledSearch
from mxmoe_steps.allocation.domains import Domains, count_domains, uniform_within
from mxmoe_steps.allocation.minimize import minimize
from mxmoe_steps.allocation.relaxation import Relaxation
from mxmoe_steps.allocation.times import Times
from mxmoe_steps.quantizers.grid import from_tensors
from mxmoe_steps.schemes import BLOCKS, SHARED, parse_scheme
from mxmoe_steps.tables import LOSSES, read_table

GAP = 1e-4

OBJECTIVES: dict[str, dict[str, Any]] = {
    "sum": {"objective": "sum"},
    "relative": {"objective": "relative"},
    "relative, code no worse than uniform": {"objective": "relative", "capped": ["code"]},
    "worst": {"objective": "worst"},
    "relative, traffic at least the mean's": {"objective": "relative", "traffic": 1.0},
    "relative, at least 2 bits": {"objective": "relative", "floor": 2.0},
}
GUARDS: dict[str, dict[str, Any]] = {
    "none": {},
    "at least 2 bits": {"floor": 2.0},
    "traffic at least 0.75 of the mean's": {"traffic": 0.75},
    "traffic at least the mean's": {"traffic": 1.0},
    "traffic at least twice the mean's": {"traffic": 2.0},
    "losses shrunk by 0.1": {"shrink": 0.1},
    "losses shrunk by 0.3": {"shrink": 0.3},
    "losses shrunk by 0.6": {"shrink": 0.6},
    "norms shrunk by 0.05": {"shrink": 0.05, "power": 0.5},
    "norms shrunk by 0.1": {"shrink": 0.1, "power": 0.5},
    "norms shrunk by 0.2": {"shrink": 0.2, "power": 0.5},
    "logarithms shrunk by 0.1": {"shrink": 0.1, "power": 0.01},
    "logarithms shrunk by 0.2": {"shrink": 0.2, "power": 0.01},
    "traffic and logarithms 0.1": {"traffic": 1.0, "shrink": 0.1, "power": 0.01},
    "traffic filled up to the mean's half": {"fill": 0.5},
    "traffic filled up to the mean's": {"fill": 1.0},
    "a domain of even traffic": {"even": 1.0},
    "the same, counting half": {"even": 0.5},
    "the same, no worse than uniform": {"even": 0.01, "capped": ["even"]},
}


class Calibration:
    """Losses and quantized weights of every block under every scheme, of some domains."""

    def __init__(self, folder: Path) -> None:
        tables = [folder / f"{scheme}.parquet" for scheme in SCHEMES]
        self.losses = read_losses(tables, "fisher", original=False)
        blocks = self.losses.blocks
        places = list(zip(blocks.layer.tolist(), blocks.expert.tolist(), strict=True))
        self.keys = [(*place, BLOCKS[kind]) for place, kind in zip(places, blocks.kind.tolist(), strict=True)]
        self.weights = {scheme.name: dict(_weights(folder, scheme.name)) for scheme in self.losses.schemes}

    def of(self, choice: np.ndarray) -> Weights:
        """Weights of a choice, schemes by number, int64 [B]."""
        names = [scheme.name for scheme in self.losses.schemes]
        return {key: self.weights[names[column]][key] for key, column in zip(self.keys, choice.tolist(), strict=True)}

    def uniform(self, budget: float) -> np.ndarray:
        """The best single scheme within a budget."""
        scheme = uniform_within(self.losses, list(self.losses.schemes), f"{budget:g}").scheme
        return np.full(len(self.keys), self.losses.schemes.index(scheme))

    def guarded(
        self, traffic: float = 0.0, shrink: float = 0.0, power: float = 1.0, even: float = 0.0, fill: float = 0.0
    ) -> Losses:
        """Losses as if no routed expert saw fewer tokens than ``traffic`` times the mean of its layer, and mixed with
        the mean of its layer's routed experts by ``shrink``, as powers; with ``even``, with one domain more, whose
        tokens go to all experts alike.
        """
        losses, tokens = with_least_tokens(self.losses, traffic), self.losses.tokens
        by_domain, blocks, evenly = losses.by_domain, losses.blocks, self.losses.loss.copy()
        for layer in np.unique(blocks.layer):
            for kind in range(len(BLOCKS)):
                of = (blocks.layer == layer) & (blocks.kind == kind) & (blocks.expert != SHARED)
                evenly[of] *= tokens[of].mean() / np.maximum(tokens[of], 1.0)[:, None]
                rate = by_domain[:, of].sum(1, keepdims=True) / tokens[of].sum()
                by_domain[:, of] += rate * np.maximum(0.0, fill * tokens[of].mean() - tokens[of])[:, None]
                mean, powers = by_domain[:, of].mean(1, keepdims=True), by_domain[:, of] ** power
                by_domain[:, of] = (powers + shrink * (mean**power - powers)) ** (1 / power)
        names = self.losses.domains
        if even:
            by_domain, names = np.concatenate([by_domain, evenly[None]]), (*names, "even")
        return replace(self.losses, loss=self.losses.loss, by_domain=by_domain, domains=names)

    def allocate(self, budget: float, objective: str, capped: list[str] | None = None, **guard: float) -> np.ndarray:
        """Schemes by number, int64 [B], of least loss."""
        floor = guard.pop("floor", 0.0)
        losses = self.guarded(**guard)
        uniform = uniform_within(losses, list(losses.schemes), f"{budget:g}")
        weights = {"even": guard["even"]} if guard.get("even") else {}
        domains = count_domains(losses, uniform, objective, weights, capped or [])  # type: ignore[arg-type]
        losses = replace(losses, loss=domains.loss(losses.by_domain))
        constraints = Constraints(min_bits=(("all", floor),) if floor else (), tie_gate_up=True)
        return least_loss(losses, budget, constraints, domains)


def least_loss(
    losses: Losses, budget: float, constraints: Constraints, coupled_by: Domains | None = None
) -> np.ndarray:
    """Schemes by number, int64 [B], of least loss at block granularity, whatever their time."""
    every, times = np.ones(len(losses.blocks), bool), Times.zeros(*losses.loss.shape)
    candidates = list(losses.schemes)
    problem, assigned = build_problem(losses, candidates, times, "block", f"{budget:g}", constraints, every)
    if coupled_by is not None and coupled_by.coupled:
        found = CoupledSearch(problem, coupled_by).minimize(1.0, 0.0, GAP)
    else:
        found = minimize(Relaxation(problem), 1.0, 0.0, GAP)
    return assigned.schemes(found.choice)


def _weights(folder: Path, name: str) -> Iterator[tuple[tuple[int, int, str], torch.Tensor]]:
    parts: dict[str, dict[str, torch.Tensor]] = defaultdict(dict)
    for key, value in load_file(folder / f"{name}.safetensors").items():
        block, part = key.rsplit(".", 1)
        parts[block][part] = value
    for row in read_table(LOSSES, folder / f"{name}.parquet")[0].to_pandas().itertuples():
        key = tuple(getattr(row, column) for column in KEYS)
        tensors = parts[".".join(map(str, key))]
        yield key, from_tensors(parse_scheme(name), row.in_features, tensors).dequantize().half()


def calibrate_without(left_out: str, args: argparse.Namespace) -> Path:
    """Calibrate on the demo's other domains, what is there already not again; the folder of losses and weights."""
    out = Path(args.work) / left_out
    captures = [f"{args.results}/capture/{name}" for name in sorted(DOMAINS) if name != left_out]
    for scheme in SCHEMES:
        if not (out / f"{scheme}.parquet").is_file():
            command = [sys.executable, "-m", "mxmoe_steps.calibrate", "--model", args.model, "--capture", *captures]
            command += ["--quantizer", "gptq", "--scheme", scheme, "--device", "cpu", "--out", str(out)]
            subprocess.run(command, check=True, capture_output=True)
    return out


def main() -> None:
    """Run the study and print two tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", default="results/demo-moe")
    parser.add_argument("--model", default="resources/demo-moe")
    parser.add_argument("--work", default="results/forgotten", help="folder for calibrations without a domain")
    parser.add_argument("--budgets", nargs="+", type=float, default=[2.25, 3.25])
    parser.add_argument("--sequences", type=int, default=8, help="held-out sequences per text")
    parser.add_argument("--forgotten", nargs="*", default=sorted(DOMAINS), help="domains to leave out, one at a time")
    parser.add_argument("--only", choices=["objectives", "forgotten"], help="one of the two tables")
    parser.add_argument("--objectives", nargs="+", default=list(OBJECTIVES), choices=list(OBJECTIVES))
    parser.add_argument("--guards", nargs="+", default=list(GUARDS), choices=list(GUARDS))
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    pd.set_option("display.width", 250)
    model, rows = Model(args.model, args.sequences), []

    whole = Calibration(Path(args.results) / "calibrate" / "gptq")
    for budget in () if args.only == "forgotten" else args.budgets:
        base = model.kl(whole.of(whole.uniform(budget)))
        rows.append(row_of(base, base, budget=budget, objective="uniform GPTQ"))
        for name in args.objectives:
            found = model.kl(whole.of(whole.allocate(budget, **OBJECTIVES[name])))
            rows.append(row_of(found, base, budget=budget, objective=name))
            print(pd.DataFrame(rows[-1:]).round(4).to_string(header=False), file=sys.stderr, flush=True)
    if rows:
        print(pd.DataFrame(rows).round(4).to_string(index=False), flush=True)
    rows = []
    for left_out in () if args.only == "objectives" else args.forgotten:
        calibration = Calibration(calibrate_without(left_out, args))
        for budget in args.budgets:
            base = model.kl(calibration.of(calibration.uniform(budget)), list(DOMAINS))
            guards = {"uniform GPTQ": base} | {
                name: model.kl(calibration.of(calibration.allocate(budget, "relative", **guard)), list(DOMAINS))
                for name, guard in GUARDS.items()
                if name in args.guards
            }
            for name, found in guards.items():
                others = [text for text in DOMAINS if text != left_out]
                rows.append(
                    {"budget": budget, "left out": left_out, "guard": name,
                     "its KL": float(found[left_out].mean()),
                     "over uniform": float(found[left_out].mean() / base[left_out].mean()),
                     "others": float(np.mean([found[text].mean() for text in others]))}
                )  # fmt: skip
                print(pd.DataFrame(rows[-1:]).round(4).to_string(header=False), file=sys.stderr, flush=True)
    if rows:
        table = pd.DataFrame(rows)
        print(table.round(4).to_string(index=False))
        means = table.groupby(["budget", "guard"], sort=False)[["its KL", "over uniform", "others"]].mean()
        print(means.round(4).to_string())


if __name__ == "__main__":
    main()
