"""What `tune` gives, and how much calibration text it takes: KL divergence by text, untuned and tuned.

    snakemake --cores 2                        # the demo: traffic and profile
    python benchmarks/tuning.py                # 32,768 and 65,536 tokens, a quarter of an hour on one core
    python benchmarks/tuning.py --long --budgets 2.25 --sequences 4 16 32 64 128 240    # up to 491,520

Every checkpoint is made by the steps themselves: the demo's mixed allocation (block granularity, r = 0.75, 64 tokens)
of weight-only schemes, its losses, GPTQ weights and tuning on the same text. Text that is evaluated: `held_out`. The
demo's code ends at 18,944 tokens; ``--long`` adds functions and classes of Python's standard library to it. What an
earlier run left in ``--work`` is taken up.
"""

import argparse
import ast
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from held_out import DOMAINS, LENGTH, LIBRARY, STANDARD, Model, packed_weights, row_of
from loss_validation import SCHEMES
from quantizers import step
from transformers import AutoTokenizer

from mxmoe_steps.atomic import atomic_path, canonical_json
from mxmoe_steps.data.parsing import parse_sources
from mxmoe_steps.data.sources import documents
from mxmoe_steps.data.tokens import load_sequences

CHARACTERS = 350_000  # of the standard library's code: 120,000 tokens


def sources(long: bool, work: Path) -> dict[str, dict[str, Any]]:
    """Calibration texts, by domain."""
    found: dict[str, dict[str, Any]] = {name: {"package": package} for name, package in DOMAINS.items()}
    if long:
        code = parse_sources(found)["code"]
        files = {}
        for split, more in (("calibration", library_code()), ("test", [])):
            files[split] = work / f"code-{split}.jsonl"
            lines = [json.dumps({"text": text}) for text in [*documents(code, split), *more]]
            with atomic_path(files[split]) as partial:
                partial.write_text("\n".join(lines) + "\n", encoding="utf-8")
        found["code"] = {"files": [str(files["calibration"])], "test_files": [str(files["test"])], "column": "text"}
    return found


def library_code() -> list[str]:
    """Functions and classes of the standard library but for the modules that `held_out` has, in random order."""
    found = []
    for path in sorted(STANDARD.glob("*.py")):
        if path.stem not in LIBRARY:
            text = path.read_text(encoding="utf-8")
            found += [
                str(ast.get_source_segment(text, node))
                for node in ast.parse(text).body
                if isinstance(node, ast.FunctionDef | ast.ClassDef)
            ]
    drawn = [found[number] for number in np.random.default_rng(0).permutation(len(found))]
    return [text for text, before in zip(drawn, np.cumsum([0, *map(len, drawn)]), strict=False) if before < CHARACTERS]


class Study:
    """The steps, for one amount of calibration text; each result is made once."""

    def __init__(self, args: argparse.Namespace, sequences: int) -> None:
        self.args, self.folder = args, Path(args.work) / ("long" if args.long else "demo") / str(sequences)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.sources, self.sequences = sources(args.long, self.folder.parent), sequences
        self.text = {
            "sources": canonical_json(self.sources), "sequences": sequences, "length": LENGTH, "dtype": "float32"
        }  # fmt: skip
        self.compute = {"model": args.model, "device": args.device, "threads": args.threads}
        self.captures = [self.made("capture", f"capture/{name}", text=name, **self.text) for name in DOMAINS]
        common = {"capture": self.captures, "quantizer": "gptq"}
        for scheme in SCHEMES:
            self.made("calibrate", f"calibrate/{scheme}.parquet", self.folder / "calibrate", scheme=scheme, **common)

    def made(self, name: str, what: str, out: Path | None = None, **options: object) -> Path:
        """The step's result ``what``, which it writes as ``out`` (the same) if it is not there."""
        path = self.folder / what
        if not path.exists():
            step(name, out=out or path, **self.compute, **options)
        return path

    def tokens(self, domain: str) -> torch.Tensor:
        """The calibration text of a domain, int64 [sequences, LENGTH]."""
        tokenizer, texts = AutoTokenizer.from_pretrained(self.args.model), parse_sources(self.sources)
        found = load_sequences(texts, domain, "calibration", tokenizer, LENGTH, self.sequences, seed=0)
        return torch.from_numpy(found)

    def allocation(self, name: str, budget: float, r: float = 0.75, **how: object) -> Path:
        """The allocation called ``name``, from these losses; ``how``: options of `frontier`."""
        args, losses = self.args, [self.folder / "calibrate" / f"{scheme}.parquet" for scheme in SCHEMES]
        frontier, path = (self.folder / f"{kind}-{name}.json" for kind in ("frontier", "allocation"))
        if not path.exists():
            demo = {"trace": f"{args.results}/trace", "profile": f"{args.results}/profile/h100.parquet"}
            demo |= {"traffic-text": "mixed", "tokens": 64, "budget-bits": budget}
            step("frontier", losses=losses, out=frontier, **demo, **how)
            step("solve", frontier=frontier, r=r, out=path)
        return path

    def quantized(self, name: str, allocation: Path) -> Path:
        """The checkpoint called ``name``."""
        path = self.folder / f"quantize-{name}"
        if not path.exists():
            packed = self.folder / "calibrate"
            step("quantize", model=self.args.model, allocation=allocation, packed=packed, out=path)
        return path

    def tuned(self, name: str, checkpoint: Path, steps: int = 200, rate: float = 2.5e-3) -> Path:
        """That checkpoint, tuned."""
        options = {"checkpoint": checkpoint, "capture": self.captures, "texts": list(DOMAINS), **self.text}
        return self.made("tune", f"tune-{name}-{steps}-{rate:g}", steps=steps, rate=rate, **options)


def parsed(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """The command line, with options of `Study` and of what is evaluated; sets threads and the width of tables."""
    parser.add_argument("--results", default="results/demo-moe")
    parser.add_argument("--model", default="resources/demo-moe")
    parser.add_argument("--work", default="results/tuning", help="folder for captures, tables and checkpoints")
    parser.add_argument("--long", action="store_true", help="with more code than the demo has")
    parser.add_argument("--budgets", nargs="+", type=float, default=[2.25, 3.25])
    parser.add_argument("--evaluated", type=int, default=8, help="held-out sequences per text")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    pd.set_option("display.width", 250)
    return args


def main() -> None:
    """Run the study and print one table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sequences", nargs="+", type=int, default=[16, 32], help="of 512 tokens of each domain")
    parser.add_argument("--steps", nargs="+", type=int, default=[200], help="of tuning")
    parser.add_argument("--rates", nargs="+", type=float, default=[2.5e-3], help="of tuning")
    args = parsed(parser)
    model, rows = Model(args.model, args.evaluated), []
    for sequences in args.sequences:
        study = Study(args, sequences)
        for budget in args.budgets:
            name = f"{budget:g}"
            untuned = study.quantized(name, study.allocation(name, budget))
            made = [({}, untuned)]
            made += [
                ({"steps": steps, "rate": rate}, study.tuned(name, untuned, steps, rate))
                for steps in args.steps
                for rate in args.rates
            ]
            base = None
            for how, checkpoint in made:
                found = model.kl(packed_weights(checkpoint, args.model))
                base = base or found
                rows.append(row_of(found, base, bits=budget, tokens=sequences * LENGTH * len(DOMAINS), **how))
                print(pd.DataFrame(rows[-1:]).round(4).to_string(header=False), file=sys.stderr, flush=True)
    print(pd.DataFrame(rows).round(4).to_string(index=False))


if __name__ == "__main__":
    main()
