"""Our checkpoints beside uniform ones, text by text: who gains by mixing, and who loses."""

import math
from typing import Any

from mxmoe_steps.reporting.checkpoints import TUNED_KIND, Checkpoint


def uniform_beside(checkpoint: Checkpoint, checkpoints: list[Checkpoint]) -> Checkpoint | None:
    """The uniform checkpoint of the same budget and quantizer, tuned if this one is, or what comes near; or None."""
    assert checkpoint.allocation is not None
    quantizer, budget = checkpoint.allocation["quantizer"], checkpoint.allocation["budget_bits"]
    uniform = [
        other
        for other in checkpoints
        if other.kind.startswith("uniform") and other.allocation and other.allocation["budget_bits"] == budget
    ]
    return min(
        uniform,
        key=lambda other: (
            other.kind.endswith(TUNED_KIND) != checkpoint.kind.endswith(TUNED_KIND),
            other.kind.removesuffix(TUNED_KIND) != f"uniform {quantizer}",
            other.metrics["overall"]["kl"],
        ),
        default=None,
    )


def over_uniform(checkpoint: Checkpoint, uniform: Checkpoint | None) -> dict[str, float]:
    """Text -> KL divergence over that of the uniform checkpoint, the worst first; empty without one."""
    others = {} if uniform is None else uniform.metrics["texts"]
    texts = checkpoint.metrics["texts"]
    return _worst_first({text: texts[text]["kl"] / other["kl"] for text, other in others.items() if other["kl"] > 0})


def predicted_over_uniform(allocation: dict[str, Any]) -> dict[str, float]:
    """Domain of the calibration text -> predicted loss over that of the best single scheme, the worst first."""
    losses, uniform = allocation["domains"]["losses"], allocation["domains"]["uniform"]
    return _worst_first({name: loss / uniform[name] for name, loss in losses.items() if uniform[name] > 0})


def predicted_loss(checkpoint: Checkpoint) -> float | None:
    """The sum over domains of what the allocation is predicted to lose; None of the original, and of tuned weights."""
    if checkpoint.allocation is None or checkpoint.kind.endswith(TUNED_KIND):
        return None
    return math.fsum(checkpoint.allocation["domains"]["losses"].values())


def beside_uniform(checkpoint: Checkpoint, checkpoints: list[Checkpoint]) -> dict[str, Any]:
    """Columns that compare one of ours with uniform weights."""
    assert checkpoint.allocation is not None
    uniform = uniform_beside(checkpoint, checkpoints)
    ratios = over_uniform(checkpoint, uniform)
    kl = 0.0 if uniform is None else uniform.metrics["overall"]["kl"]
    return {
        "kl_over_uniform": checkpoint.metrics["overall"]["kl"] / kl if kl > 0 else None,
        "worst_over_uniform": max(ratios.values(), default=None),
        "texts_over_uniform": _listed(ratios),
        "predicted_over_uniform": _listed(predicted_over_uniform(checkpoint.allocation)),
    }


def _worst_first(ratios: dict[str, float]) -> dict[str, float]:
    return dict(sorted(ratios.items(), key=lambda item: (-item[1], item[0])))


def _listed(ratios: dict[str, float]) -> str:
    """``code 1.04, english 0.98``."""
    return ", ".join(f"{name} {ratio:.2f}" for name, ratio in ratios.items())


def domain_lines(checkpoints: list[Checkpoint]) -> list[str]:
    """One line per budget: how our best checkpoint fares on every text beside the uniform one, the worst first."""
    ours = [checkpoint for checkpoint in checkpoints if checkpoint.kind.startswith("ours")]
    best: dict[float, Checkpoint] = {}
    for checkpoint in sorted(ours, key=lambda one: float(one.metrics["overall"]["kl"]), reverse=True):
        assert checkpoint.allocation is not None
        best[checkpoint.allocation["budget_bits"]] = checkpoint
    lines = []
    for budget, checkpoint in sorted(best.items()):
        if not (ratios := over_uniform(checkpoint, uniform_beside(checkpoint, checkpoints))):
            continue
        worse = [text for text, ratio in ratios.items() if ratio > 1]
        verdict = f"It is worse on {' and '.join(worse)}." if worse else "It is worse on none."
        lines.append(f"{budget:g} bits: KL over that of uniform weights: {_listed(ratios)}. {verdict}")
    return lines
