"""Whether there is enough calibration text."""

import sys

from mxmoe_steps.models.families import ModelFolder

ENOUGH = 8  # tokens of the mean expert for each of its input features (docs/tuning.md has the curve)


def warn_if_short(folder: ModelFolder, tokens: int) -> None:
    """Say in the log that a checkpoint made of so many ``tokens`` will be worse than it could be at the same bits."""
    hidden, top_k = folder.config.get("hidden_size"), folder.config.get("num_experts_per_tok")
    if hidden is None or top_k is None:  # in a configuration that leaves defaults out
        return
    enough = -(-ENOUGH * hidden * folder.experts // top_k)
    if tokens < enough:
        print(
            f"warning: {tokens:,} tokens of calibration text are {tokens / enough * ENOUGH:.2g} for each of an expert's"
            f" {hidden:,} input features; {enough:,}, {ENOUGH} for each, give better weights at the same bits:"
            " raise calibrate.sequences or calibrate.length",
            file=sys.stderr,
            flush=True,
        )
