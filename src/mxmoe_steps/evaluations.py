"""What is known of a checkpoint, and what `evaluate` found: JSON, read and checked in one place.

``mxmoe.json`` in a packed checkpoint holds ``allocation``, what `solve` wrote but for the assignment, and
``weights_bytes``, the size of its files of weights, with ``tuned`` true where `tune` wrote them. An evaluation holds
the same, the allocation None for the original, with the metrics of every text and their means.
"""

import math
from pathlib import Path
from typing import Annotated, Any, Literal, NotRequired

from pydantic import Field
from typing_extensions import TypedDict

from mxmoe_steps.allocation.files import AllocationSummary
from mxmoe_steps.records import STRICT, Name, Positive, Quantity, Total, read_record

TUNED = "_tuned"  # at the end of the name of a checkpoint that `tune` wrote, after that of its allocation


class Metrics(TypedDict):
    """Negative log-likelihood and KL divergence from the original, nats per token."""

    kl: Annotated[float, Field(ge=-1e-3, le=1e100)]  # rounding may take that of equal models below zero
    nll: Quantity
    perplexity: Positive


class _Manifest(TypedDict):
    __pydantic_config__ = STRICT  # type: ignore[misc]

    allocation: AllocationSummary
    tuned: NotRequired[Literal[True]]
    weights_bytes: Total


class _Evaluation(TypedDict):
    __pydantic_config__ = STRICT  # type: ignore[misc]

    allocation: AllocationSummary | None
    overall: Metrics
    texts: Annotated[dict[Name, Metrics], Field(min_length=1)]
    tuned: NotRequired[Literal[True]]
    weights_bytes: Total


def read_manifest(folder: Path) -> dict[str, Any]:
    """``mxmoe.json`` of a packed checkpoint; `UserError` names what is missing or out of range."""
    return read_record(folder / "mxmoe.json", _Manifest, "run the quantize step again")


def read_evaluation(path: str | Path) -> dict[str, Any]:
    """What `evaluate` wrote; `UserError` names what is missing, out of range or at odds."""
    return read_record(path, _Evaluation, "run the evaluate step again", _check_means)


def _check_means(content: Any) -> None:
    """`ValueError` unless ``overall`` holds the means over the texts, and perplexities are those of their nll."""
    texts = list(content["texts"].values())
    for key in ("nll", "kl"):
        mean = sum(one[key] for one in texts) / len(texts)
        if not math.isclose(content["overall"][key], mean, rel_tol=1e-9, abs_tol=1e-12):
            raise ValueError(f"overall.{key}: is {content['overall'][key]}, the mean over the texts is {mean}")
    for place, one in {"overall": content["overall"], **content["texts"]}.items():
        if not math.isclose(math.log(one["perplexity"]), one["nll"], rel_tol=1e-9, abs_tol=1e-9):
            raise ValueError(f"{place}.perplexity: is {one['perplexity']}, not e to the power of nll, {one['nll']}")
