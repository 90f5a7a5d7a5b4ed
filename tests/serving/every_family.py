"""Every family in vLLM beside transformers, original and packed: what docs/serving.md says of families.

    python tests/serving/every_family.py --work FOLDER [--out docs/measurements/serving_families.json] [FAMILY ...]

Each engine runs in a process of its own, with a time limit. Families whose original vLLM does not run on a CPU, or
computes otherwise, are tried again with what stands in for the parts that a CPU lacks (`stand_in.fill_cpu_gaps`).
"""

import argparse
import json
import os
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import engine

os.environ |= engine.SETTINGS

import torch
import transformers
import vllm
from family_sizes import FAMILY_SIZES, VISION_SIZES
from stand_in import fill_cpu_gaps
from tiny import OPTIONS, make_tiny
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

from mxmoe_steps.inference import plugin  # noqa: F401  # transformers reads packed checkpoints

TOKENS = torch.randint(3, 96, (4, 48), generator=torch.Generator().manual_seed(1))
SECONDS = 300  # of an engine
RIGHT = 1e-4


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--work", type=Path, required=True, help="folder for checkpoints and logs")
    parser.add_argument("--out", type=Path, help="JSON file whose families are replaced")
    parser.add_argument("--options", type=json.loads, default={}, help="more options of vLLM's LLM, as JSON")
    parser.add_argument("families", nargs="*", default=list(FAMILY_SIZES))
    options = parser.parse_args()
    for family in options.families:
        found = compare(family, options.work / family, OPTIONS.get(family, {}) | options.options)
        print(family, json.dumps(found), flush=True)
        if options.out is not None and "error" not in found:
            known = json.loads(options.out.read_text())["families"] if options.out.exists() else {}
            facts = {"vllm": vllm.__version__, "families": dict(sorted({**known, family: found}.items()))}
            options.out.write_text(json.dumps(facts, indent=1) + "\n")


def compare(family: str, work: Path, options: dict[str, Any]) -> dict[str, Any]:
    """Largest difference of log-probabilities, or the error, of the original and of the packed checkpoint; only
    ``error`` where transformers makes none."""
    expected = work / "expected.pt"
    if not expected.exists():
        work.mkdir(parents=True)
        if error := run_alone(lambda: prepare(family, work), work / "prepare.log"):
            return {"error": error}
    original, packed = torch.load(expected)
    found: dict[str, Any] = {"original": difference(work / "model", original, work, options)}
    gaps = False
    if not is_right(found["original"]):
        filled = difference(work / "model", original, work, options, gaps=True)
        if gaps := is_right(filled) or isinstance(found["original"], str):
            found["original, gaps filled"] = filled
    found["packed"] = difference(work / "packed" / "checkpoint", packed, work, options, gaps)
    log = (work / "checkpoint.log").read_text()
    found["transformers"] = transformers.__version__
    found["class"] = "transformers" if "Transformers modeling backend" in log else "vLLM"
    return found


def is_right(result: Any) -> bool:
    """Whether it is a difference, and small."""
    return isinstance(result, float) and result < RIGHT


def prepare(family: str, work: Path) -> None:
    """Both checkpoints, and their log-probabilities in transformers."""
    packed = make_tiny(work, family, engine.dealt(engine.A16))
    kind = AutoModelForImageTextToText if family in VISION_SIZES else AutoModelForCausalLM
    expected = []
    for folder in (work / "model", packed):
        with torch.inference_mode():
            logits = kind.from_pretrained(folder, dtype="float32").eval()(TOKENS).logits.float()
        expected.append(logits.log_softmax(-1)[:, :-1].gather(-1, TOKENS[:, 1:, None]).squeeze(-1))
    torch.save(expected, work / "expected.pt")


def difference(
    folder: Path, expected: torch.Tensor, work: Path, options: dict[str, Any], gaps: bool = False
) -> float | str:
    """The largest between vLLM on ``folder`` and ``expected``, or how vLLM failed."""
    out = work / "found.pt"

    def call() -> None:
        if gaps:
            fill_cpu_gaps()
        torch.save(engine.served(folder, TOKENS, **options), out)

    error = run_alone(call, work / f"{folder.name}.log")
    return error or float(f"{(torch.load(out) - expected).abs().max():.1e}")


def run_alone(call: Callable[[], None], log: Path) -> str:
    """Run it in a forked process that writes into ``log``; its last error, or an empty string."""
    child = os.fork()
    if not child:
        os.setsid()
        with log.open("w") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        status = 1
        try:
            call()
            status = 0
        except BaseException:  # a process of its own, which ends here
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
    end = time.monotonic() + SECONDS
    while time.monotonic() < end:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            errors = [line for line in log.read_text().splitlines() if "Error" in line]
            return "" if status == 0 else (errors or ["no error message"])[-1]
        time.sleep(0.2)
    os.killpg(child, 9)
    os.waitpid(child, 0)
    return f"no end after {SECONDS} s"


if __name__ == "__main__":
    main()
