"""What a reader must know of the numbers: sentences, and warnings."""

from statistics import median
from typing import Any

import pandas as pd

from mxmoe_steps.reporting.summary import prediction_errors
from mxmoe_steps.schemes import SHARED
from mxmoe_steps.timing.sources import changed_kernels

_NAMED = 5  # starved experts
_VARIES = 1.05  # predicted times that differ by less than this factor are called equal


def time_note(times: dict[str, dict[int, float]], facts: dict[str, Any], timed_as: dict[str, str]) -> str:
    """What the predicted times are, and at which token counts they tell checkpoints apart."""
    source = "a roofline estimate from the data sheet" if facts["estimate"] else "a model fitted to measured kernels"
    sentences = [f"Layer times are predicted for {facts['device']} by {source}."]
    if not facts["estimate"]:
        earlier = ", in an earlier version" if changed_kernels(facts["kernels"], facts["arch"]) else ""
        sentences.append(f"The kernels were {facts['source']}{earlier}. {held_out_errors(facts)}")
    for scheme, kernel in sorted(timed_as.items()):
        sentences.append(f"{scheme} has no kernel of its own: its time is an estimate, that of {kernel}.")
    for tokens in sorted(next(iter(times.values()))):
        values = [one[tokens] for one in times.values()]
        if max(values) < _VARIES * min(values):
            sentences.append(
                f"At {tokens} tokens in a step all checkpoints take within {100 * (_VARIES - 1):.0f} % of the same"
                f" time ({min(values):.1f} to {max(values):.1f} µs): GEMMs this small sit on launch latency, so the"
                " allocation there is decided by accuracy alone."
            )
    return " ".join(sentences)


def published_note(original: dict[str, Any]) -> list[str]:
    """What a reader must know of the original: its commit on the hub, and how its publisher quantized it."""
    sentences = []
    if original["name"] is not None:
        sentences.append(f"The original is commit {original['commit']} of {original['name']}.")
    if original["formats"]:
        formats, share = ", ".join(original["formats"]), original["bytes"] / original["bytes_16_bit"]
        sentences.append(
            f"The original was published in {formats}: {original['expert_bits']:.2f} bits an expert weight and"
            f" {original['bytes'] / 1e6:.2f} MB, {share:.1%} of its size in 16 bits. Losses and KL divergences"
            " are against what its weights mean."
        )
    return [" ".join(sentences)] if sentences else []


def held_out_errors(facts: dict[str, Any]) -> str:
    """How far the time model is off on launches it was not fitted to, beside how far repeats are apart."""
    parts = [
        f"{100 * error['median']:.1f} % (95th percentile {100 * error['p95']:.1f} %) on {error['problems']} launches"
        f" of {'one scheme' if kind == 'single' else 'mixed schemes'}"
        for kind, error in facts["errors"].items()
    ]
    repeat = facts["repeat_spread"]
    return (
        f"Median error of the model on launches that it was not fitted to: {' and '.join(parts)}; repeats of one launch"
        f" spread over {100 * repeat['median']:.1f} % (95th percentile {100 * repeat['p95']:.1f} %)."
    )


def measured_note(table: pd.DataFrame, layers: dict[str, Any] | None, whole: dict[str, Any] | None = None) -> list[str]:
    """Where layers and whole models were timed, what was not, and how far predictions are off.

    ``layers``, ``whole``: facts of what `time` wrote, None where it wrote none.
    """
    notes = []
    if layers is not None and any(name.startswith("measured_moe_us_") for name in table.columns):
        errors = [
            f"{100 * median(map(abs, found)):.1f} % at {tokens} tokens"
            f" ({100 * min(found):+.1f} to {100 * max(found):+.1f} %)"
            for tokens, found in prediction_errors(table).items()
            if found
        ]
        off = f" The predicted times of their expert GEMMs are off by {'; '.join(errors)}." if errors else ""
        notes.append(
            f"Layers were measured on {layers['device']} ({layers['date']}) under the routing of {layers['text']}; the"
            f" original's are transformers' bfloat16 experts, the faster of its implementations.{off}"
        )
    if whole is not None:
        turns = (
            "in turns" if whole["together"] else "one after the other, because they do not fit in its memory together"
        )
        notes.append(
            f"Whole models were measured on {whole['device']} ({whole['date']}) {turns}, in transformers"
            f" {whole['transformers']}, on prompts of {whole['text']}."
        )
        notes += [f"Not measured: {sentence}." for sentence in whole["left_out"]]
    return notes


def starved_note(losses: pd.DataFrame) -> list[str]:
    """Which routed experts saw too little of the calibration text; ``losses``: of one scheme, a row per block."""
    routed = losses[losses["expert"] != SHARED]
    experts = routed.groupby(["layer", "expert"]).agg(tokens=("tokens", "min"), starved=("fallback", "any"))
    starved = experts[experts["starved"] | (experts["tokens"] == 0)].sort_values(["tokens"], kind="stable")
    if starved.empty:
        return []
    some = ", ".join(
        f"{expert} of layer {layer} ({tokens} tokens)"
        for (layer, expert), tokens in zip(starved.index[:_NAMED], starved["tokens"][:_NAMED], strict=True)
    )
    more = f" and {len(starved) - _NAMED} more" if len(starved) > _NAMED else ""
    return [
        f"Starved experts: {len(starved)} of {len(experts)} saw too few calibration tokens for statistics of their own,"
        f" and mostly the layer's were used: {some}{more}. More calibration text mends it (calibrate.sequences)."
    ]
