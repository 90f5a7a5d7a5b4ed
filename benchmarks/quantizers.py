"""What each quantizer is worth: the embedded model with one scheme everywhere, measured on held-out text.

    snakemake --cores 2                  # the demo: captured layers and reference text
    python benchmarks/quantizers.py      # every quantizer and scheme, about half a minute each on one core

Every pair is calibrated, packed, loaded and evaluated by the steps themselves.
"""

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from mxmoe_steps.allocation.files import write_allocation
from mxmoe_steps.evaluations import read_evaluation
from mxmoe_steps.models.families import open_model
from mxmoe_steps.models.identity import fingerprint
from mxmoe_steps.quantizers.method import method_names
from mxmoe_steps.schemes import parse_scheme

SCHEMES = ["w1a16", "w2a16", "w3a16", "w4a16", "w8a8", "w4a8", "w4a4", "w4a4_g128"]
UNTIMED = {  # an allocation that nothing was solved for
    "bits": 16.0, "bound": 0.0, "budget_bits": 16.0, "buys": [], "candidates": [], "device": "none", "gap": 0.0,
    "gap_limit": 0.0,
    "constraints": {"fix": [], "max_schemes": None, "min_bits": [], "shared_tile": False, "tie_gate_up": False},
    "granularity": "uniform", "loss": 0.0, "loss_form": "root_sum_squares", "max_loss": None, "max_time_us": None,
    "metric": "out_sq", "objective": 0.0, "price": 0.0, "proved_by": "states", "r": 1.0, "scope": "model",
    "status": "optimal", "tile_tokens": None, "time_is_estimate": True, "time_us": 1.0, "timed_as": {}, "tokens": 1,
    "traffic": {"phase": "auto", "seed": 0, "steps": 1, "texts": []},
    "domains": {"least_tokens": 0.0, "losses": {"text": 0.0},
                "no_worse_than_uniform": [], "objective": "sum", "uniform": {"text": 0.0},
                "weights": {}},
}  # fmt: skip


def step(name: str, **options: object) -> None:
    """Run one step of the pipeline; what a step says that fails ends the program."""
    lists = {key: value if isinstance(value, list) else [value] for key, value in options.items()}
    words = [word for key, values in lists.items() for word in (f"--{key}", *map(str, values))]
    done = subprocess.run([sys.executable, "-m", f"mxmoe_steps.{name}", *words], capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{name}: {done.stderr}")


def damage(
    args: argparse.Namespace, quantizer: str, scheme: str, work: Path, captures: Sequence[Path]
) -> dict[str, float]:
    """Overall metrics of the model with ``scheme`` in every block; ``work``: an empty folder."""
    packed, allocation, checkpoint = work / "packed", work / "allocation.json", work / "checkpoint"
    common = {"model": args.model, "out": packed, "threads": args.threads, "device": args.device}
    step("calibrate", capture=list(captures), quantizer=quantizer, scheme=scheme, **common)
    folder = open_model(args.model)
    assignment = [[layer, expert, *[scheme] * 3] for layer in folder.moe_layers for expert in folder.expert_ids()]
    choice = {"assignment": assignment, "model": fingerprint(folder), "quantizer": quantizer}
    write_allocation(str(allocation), UNTIMED | choice)
    step("quantize", model=args.model, allocation=allocation, packed=packed, out=checkpoint)
    common |= {"model": checkpoint, "out": work / "metrics.json"}
    step("evaluate", dtype="float32", reference=f"{args.results}/evaluate/original.safetensors", **common)
    return dict(read_evaluation(work / "metrics.json")["overall"])


def main() -> None:
    """Run the study and print one table: KL divergence from the original / perplexity."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", default="results/demo-moe")
    parser.add_argument("--model", default="resources/demo-moe")
    parser.add_argument("--schemes", nargs="+", default=SCHEMES)
    parser.add_argument("--quantizers", nargs="+", default=method_names(), choices=method_names())
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    rows = []
    for scheme in (parse_scheme(text).name for text in args.schemes):
        row = {"scheme": scheme}
        for quantizer in args.quantizers:
            with tempfile.TemporaryDirectory() as work:
                metrics = damage(args, quantizer, scheme, Path(work), sorted(Path(args.results).glob("capture/*")))
            row[quantizer] = f"{metrics['kl']:.4f} / {metrics['perplexity']:.2f}"
            print(f"{scheme} {quantizer}: {row[quantizer]}", file=sys.stderr, flush=True)
        rows.append(row)
    print(pd.DataFrame(rows).to_string(index=False))


if __name__ == "__main__":
    main()
