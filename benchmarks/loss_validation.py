"""Which predicted loss ranks allocations as their measured damage does?

    snakemake --cores 2                      # the demo: losses, packed weights, reference text
    python benchmarks/loss_validation.py     # 50 allocations per budget, about 4 s each on one core

At each budget, allocations of equal true bits (within 0.02) are drawn from near-optimal to random, every one is
evaluated on held-out text with its quantized weights, and each metric's prediction is rank-correlated with the
measured KL divergence and perplexity. Then the allocations that each metric, scope and granularity would choose
are measured at the same budgets, and those that concave functions of fisher choose. Weight-only schemes.
"""

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from held_out import load_weights
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from mxmoe_steps.allocation.files import read_allocation
from mxmoe_steps.evaluate import Reference, score
from mxmoe_steps.models.streaming import StreamedModel
from mxmoe_steps.quantizers.grid import from_tensors
from mxmoe_steps.quantizers.method import method_names
from mxmoe_steps.schemes import BLOCKS, parse_scheme
from mxmoe_steps.tables import LOSSES, read_table

SCHEMES = ["w1a16_g128_asym", "w2a16_g128_asym", "w3a16_g128_asym", "w4a16_g128_asym", "w8a16_g-1_sym"]
KEYS = ["layer", "expert", "block"]
CONCAVE = {  # fisher overstates large changes: functions of a block's that grow more slowly
    "fisher^0.8": lambda fisher: fisher**0.8,
    "fisher^0.5": lambda fisher: fisher**0.5,
    "0.01 (1 - exp(-fisher / 0.01))": lambda fisher: 0.01 * -np.expm1(-fisher / 0.01),
}


class Bench:
    """The original model, every block's weights under every scheme, and the reference text."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.results, self.quantizer = Path(args.results), args.quantizer
        self.model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).to(args.device)
        self.head = StreamedModel(args.model, "float32", args.device)
        reference = Reference(self.results / "evaluate" / "original.safetensors", self.head)
        rows = slice(args.sequences)
        self.tokens = {text: values[rows] for text, values in reference.tokens.items()}
        self.hidden = {text: reference.hidden(text, rows) for text in reference.tokens}
        self.losses = {
            scheme: read_table(LOSSES, self.table(scheme))[0].to_pandas().set_index(KEYS).sort_index()
            for scheme in SCHEMES
        }
        self.blocks = self.losses[SCHEMES[0]].index
        self.params = (self.losses[SCHEMES[0]]["out_features"] * self.losses[SCHEMES[0]]["in_features"]).to_numpy()
        self.bits = np.stack([self.losses[scheme]["bits"].to_numpy() for scheme in SCHEMES], axis=1)
        self.weights = [self._dequantized(scheme) for scheme in SCHEMES]

    def table(self, scheme: str) -> Path:
        """Losses of a scheme."""
        return self.results / "calibrate" / self.quantizer / f"{scheme}.parquet"

    def _dequantized(self, name: str) -> list[torch.Tensor]:
        stored = load_file(self.table(name).with_suffix(".safetensors"))
        weights = []
        for (layer, expert, block), row in self.losses[name].iterrows():
            prefix = f"{layer}.{expert}.{block}."
            parts = {key.removeprefix(prefix): value for key, value in stored.items() if key.startswith(prefix)}
            weights.append(from_tensors(parse_scheme(name), int(row["in_features"]), parts).dequantize())
        return weights

    def true_bits(self, choice: np.ndarray) -> float:
        """Average bits of a choice (scheme number per block)."""
        return float((self.bits[np.arange(len(choice)), choice] * self.params).sum() / self.params.sum())

    @torch.no_grad()
    def measure(self, choice: np.ndarray) -> tuple[float, float]:
        """KL divergence from the original and perplexity, over all texts."""
        load_weights(
            self.model, {block: self.weights[choice[number]][number] for number, block in enumerate(self.blocks)}
        )
        found = []
        with self.head.head():
            for text, tokens in self.tokens.items():
                hidden = torch.cat(
                    [self.model.model(run.to(self.model.device)).last_hidden_state for run in tokens.split(8)]
                )
                sums = score(self.head, hidden, tokens, self.hidden[text])
                found.append(np.divide(sums, tokens[:, 1:].numel()))
        nll, kl = np.mean(found, axis=0)
        return float(kl), float(np.exp(nll))


def predictions(bench: Bench) -> dict[str, np.ndarray]:
    """Metric -> additive loss of every block under every scheme, [B, S]."""
    out_sq = np.stack([bench.losses[scheme]["out_sq"].to_numpy() for scheme in SCHEMES], axis=1)
    fisher = np.stack([bench.losses[scheme]["fisher"].to_numpy() for scheme in SCHEMES], axis=1)
    layers = bench.blocks.get_level_values("layer").to_numpy()
    weighted = out_sq.copy()
    for layer in np.unique(layers):
        weighted[layers == layer] *= fisher[layers == layer].sum() / out_sq[layers == layer].sum()
    return {
        "fisher": fisher,
        "out_sq weighted by the layer's fisher": weighted,
        "out_sq": out_sq,
        "sum of norms (paper)": np.sqrt(out_sq),
        **{name: function(fisher) for name, function in CONCAVE.items()},
    }


def cheapest(loss: np.ndarray, bench: Bench, budget: float) -> np.ndarray:
    """Choice of least Lagrangian value whose bits come closest to the budget from below (bisection)."""
    cost = bench.bits * bench.params[:, None]
    low, high = 1e-30, 1e6  # price of a bit
    for _ in range(200):
        price = np.sqrt(low * high)
        choice = (loss + price * cost).argmin(axis=1)
        low, high = (low, price) if bench.true_bits(choice) <= budget else (price, high)
    return (loss + high * cost).argmin(axis=1)


def draw(bench: Bench, losses: dict[str, np.ndarray], budget: float, count: int, seed: int) -> list[np.ndarray]:
    """Allocations within 0.02 bits of the budget, from near-optimal (little noise) to random (much)."""
    generator = np.random.default_rng(seed)
    found: list[np.ndarray] = []
    bases = [losses["fisher"], losses["out_sq"]]
    while len(found) < count:
        spread = 4.0 * len(found) / count
        base = bases[len(found) % 2]
        noise = np.exp(spread * generator.standard_normal((len(base), 1)))
        exponent = generator.uniform(0.6, 1.2)
        choice = cheapest((base * noise) ** exponent, bench, budget)
        if abs(bench.true_bits(choice) - budget) <= 0.02:
            found.append(choice)
    return found


def chosen(bench: Bench, budget: float, **options: str) -> np.ndarray:
    """What frontier and solve choose at r = 1."""
    with tempfile.TemporaryDirectory() as folder:
        frontier, out = f"{folder}/frontier.json", f"{folder}/allocation.json"
        command = [sys.executable, "-m", "mxmoe_steps.frontier", "--budget-bits", str(budget), "--tokens", "64"]
        command += ["--no-tie-gate-up", "--domains", "sum", "--least-tokens", "0"]
        command += ["--trace", f"{bench.results}/trace", "--profile", f"{bench.results}/profile/h100.parquet"]
        command += ["--losses", *(str(bench.table(scheme)) for scheme in SCHEMES), "--out", frontier]
        for name, value in options.items():
            command += [f"--{name}", value]
        subprocess.run(command, check=True, capture_output=True)
        pick = [sys.executable, "-m", "mxmoe_steps.solve", "--frontier", frontier, "--r", "1", "--out", out]
        subprocess.run(pick, check=True, capture_output=True)
        assignment = read_allocation(out)["assignment"]
    schemes = {(layer, expert): names for layer, expert, *names in assignment}
    return np.array(
        [SCHEMES.index(schemes[layer, expert][BLOCKS.index(block)]) for layer, expert, block in bench.blocks]
    )


def measured(bench: Bench, budget: float, name: str, choice: np.ndarray) -> dict[str, Any]:
    """A row of the second table."""
    kl, perplexity = bench.measure(choice)
    return {"budget": budget, "allocation": name, "bits": bench.true_bits(choice), "KL": kl, "ppl": perplexity}


CONTENDERS: list[tuple[str, dict[str, Any]]] = [
    ("fisher, model budget, per block", {"metric": "fisher", "scope": "model", "granularity": "block"}),
    ("fisher, model budget, per expert", {"metric": "fisher", "scope": "model", "granularity": "expert"}),
    ("fisher, layer budget, per block", {"metric": "fisher", "scope": "layer", "granularity": "block"}),
    ("out_sq, model budget, per block", {"metric": "out_sq", "scope": "model", "granularity": "block"}),
    ("out_sq, layer budget, per block", {"metric": "out_sq", "scope": "layer", "granularity": "block"}),
    (
        "sum of norms, layer budget, per block (paper)",
        {"metric": "out_sq", "loss": "sum_of_norms", "scope": "layer", "granularity": "block"},
    ),
    ("uniform", {"metric": "fisher", "scope": "model", "granularity": "uniform"}),
]


def main() -> None:
    """Run the study and print two tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", default="results/demo-moe")
    parser.add_argument("--model", default="resources/demo-moe")
    parser.add_argument("--quantizer", default="gptq", choices=method_names(), help="whose weights and losses")
    parser.add_argument("--budgets", nargs="+", type=float, default=[2.25, 3.25, 5.0])
    parser.add_argument("--count", type=int, default=50, help="allocations per budget")
    parser.add_argument("--sequences", type=int, default=4, help="sequences per text")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--save", help="CSV file for every measured allocation")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    bench = Bench(args)
    losses = predictions(bench)
    rows, correlations = [], []
    for budget in args.budgets:
        for choice in draw(bench, losses, budget, args.count, args.seed):
            kl, perplexity = bench.measure(choice)
            predicted = {name: loss[np.arange(len(choice)), choice].sum() for name, loss in losses.items()}
            rows.append({"budget": budget, "bits": bench.true_bits(choice), "kl": kl, "ppl": perplexity, **predicted})
            print(f"{budget:g} bits: {len(rows)} allocations, KL {kl:.4f}", file=sys.stderr, flush=True)
        table = pd.DataFrame([row for row in rows if row["budget"] == budget])
        ranks = table.rank()
        for name in losses:
            correlations.append(
                {"budget": budget, "metric": name, "rank corr. with KL": ranks[name].corr(ranks["kl"]),
                 "with perplexity": ranks[name].corr(ranks["ppl"])}
            )  # fmt: skip
    if args.save:
        pd.DataFrame(rows).to_csv(args.save, index=False)
    print(pd.DataFrame(correlations).round(3).to_string(index=False))
    contest = []
    for budget in args.budgets:
        for name, options in CONTENDERS:
            choice = chosen(bench, budget, **options)
            contest.append(measured(bench, budget, name, choice))
        for name in ("fisher", *CONCAVE):
            choice = cheapest(losses[name], bench, budget)
            contest.append(measured(bench, budget, f"{name}, by bisection", choice))
    print(pd.DataFrame(contest).round(4).to_string(index=False))


if __name__ == "__main__":
    main()
