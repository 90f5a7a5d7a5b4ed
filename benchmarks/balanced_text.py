"""Does calibration text that is balanced over experts (MoEQuant, Hu et al., 2025) quantize better than random text?

    snakemake --cores 2                  # the demo: traced routing, reference text
    python benchmarks/balanced_text.py   # about 8 minutes on one core

A pool of sequences is captured once. From it, as many sequences are drawn at random (several times), or chosen greedily
so that tokens spread as evenly over the experts of every layer as the pool allows. Both calibrate the uniform GPTQ
models that are then evaluated on held-out text.
"""

import argparse
import sys
import tempfile
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from quantizers import damage, step
from safetensors.torch import load_file, save_file

from mxmoe_steps.atomic import canonical_json
from mxmoe_steps.facts import CaptureFacts
from mxmoe_steps.models.families import open_model
from mxmoe_steps.models.raw import facts_of
from mxmoe_steps.schemes import parse_scheme

TEXTS = {"english": "wiki-en", "french": "wiki-fr", "spanish": "wiki-es", "code": "code"}


def traffic(layers: list[dict[str, torch.Tensor]], sequences: int, experts: int) -> np.ndarray:
    """Tokens [sequence, layer x expert]."""
    counts = [
        torch.stack([part.flatten().long().bincount(minlength=experts) for part in layer["ids"].chunk(sequences)])
        for layer in layers
    ]
    return torch.cat(counts, dim=1).double().numpy()


def balanced(counts: np.ndarray, wanted: int) -> list[int]:
    """Sequences chosen one by one so that the sum of squared tokens per expert, relative to their sum, is least."""
    chosen: list[int] = []
    total = np.zeros(counts.shape[1])
    for _ in range(wanted):
        after = total + counts
        spread = (after**2).sum(1) / after.sum(1) ** 2
        spread[chosen] = np.inf
        chosen.append(int(spread.argmin()))
        total += counts[chosen[-1]]
    return chosen


def main() -> None:
    """Run the study and print one table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", default="results/demo-moe")
    parser.add_argument("--model", default="resources/demo-moe")
    parser.add_argument("--schemes", nargs="+", default=["w2a16", "w3a16"])
    parser.add_argument("--pool", type=int, default=64, help="sequences of 512 tokens to choose from")
    parser.add_argument("--sizes", nargs="+", type=int, default=[4, 16], help="sequences to calibrate on")
    parser.add_argument("--draws", type=int, default=3, help="random choices of each size")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    folder = open_model(args.model)
    sources = {name: {"package": package} for name, package in TEXTS.items()} | {"mixed": {"mix": list(TEXTS)}}
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        pool = Path(temporary) / "pool"
        text = {"sources": canonical_json(sources), "text": "mixed", "sequences": args.pool, "length": 512}
        step("capture", model=args.model, threads=args.threads, device=args.device, out=pool, **text)
        layers = {layer: load_file(pool / f"layer-{layer:03d}.safetensors") for layer in folder.moe_layers}
        counts = traffic(list(layers.values()), args.pool, folder.experts)
        for size in args.sizes:
            generator = np.random.default_rng(size)
            choices = [("random", generator.choice(args.pool, size, replace=False).tolist()) for _ in range(args.draws)]
            for name, chosen in [*choices, ("balanced", balanced(counts, size))]:
                capture = Path(temporary) / "capture"
                capture.mkdir(exist_ok=True)
                for layer, tensors in layers.items():
                    parts = {key: torch.cat([t.chunk(args.pool)[i] for i in chosen]) for key, t in tensors.items()}
                    file = f"layer-{layer:03d}.safetensors"
                    facts = facts_of(pool / file, CaptureFacts, "") | {"sequences": size}
                    save_file(parts, capture / file, metadata={"mxmoe": canonical_json(facts)})
                per_expert = counts[chosen].sum(0)
                row = {"sequences": size, "text": name, "least / mean tokens": per_expert.min() / per_expert.mean()}
                for scheme in (parse_scheme(text).name for text in args.schemes):
                    with tempfile.TemporaryDirectory() as work:
                        row[scheme] = damage(args, "gptq", scheme, Path(work), [capture])["kl"]
                rows.append(row)
                print(row, file=sys.stderr, flush=True)
    table = pd.DataFrame(rows)
    print(table.groupby(["sequences", "text"], sort=False).agg(["mean", "min", "max"]).round(4).to_string())


if __name__ == "__main__":
    main()
