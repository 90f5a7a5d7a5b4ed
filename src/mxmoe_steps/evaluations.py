"""What is known of a checkpoint, and what `evaluate` found: JSON, read and checked in one place.

``mxmoe.json`` in a packed checkpoint holds ``allocation``, what `solve` wrote but for the assignment;
``weights_bytes``, the size of its files of weights; ``other_bytes``, those of its tensors that are no expert blocks,
and ``others``, the same by kind; ``published``, what is known of the original (`mxmoe_steps.models.inventory`);
``left_out``, what of the original it does not hold and why; and ``tuned``, true where `tune` wrote it. An evaluation
holds allocation, sizes, ``published`` and ``tuned``, the allocation None for the original, with the metrics of every
text and their means.
"""

import math
from pathlib import Path
from typing import Annotated, Any, Literal, NotRequired

from pydantic import Field
from typing_extensions import TypedDict

from mxmoe_steps.allocation.files import AllocationSummary
from mxmoe_steps.errors import UserError
from mxmoe_steps.records import STRICT, Count, Name, Positive, Quantity, Total, read_record

Size = Annotated[int, Field(ge=1, lt=2**63)]

TUNED = "_tuned"  # at the end of the name of a checkpoint that `tune` wrote, after that of its allocation


class Metrics(TypedDict):
    """Negative log-likelihood and KL divergence from the original, nats per token."""

    kl: Annotated[float, Field(ge=-1e-3, le=1e100)]  # rounding may take that of equal models below zero
    nll: Quantity
    perplexity: Positive


class Published(TypedDict):
    """An original: name and commit on the hub, source formats, sizes (`mxmoe_steps.models.inventory.published`)."""

    name: Name | None
    commit: Name | None
    formats: list[Name]
    bytes: Size
    bytes_16_bit: Size
    expert_bits: Positive


class _LeftOut(TypedDict):
    name: Name
    count: Count
    why: Name


class _Manifest(TypedDict):
    __pydantic_config__ = STRICT  # type: ignore[misc]

    allocation: AllocationSummary
    tuned: NotRequired[Literal[True]]
    weights_bytes: Total
    other_bytes: Total
    others: dict[Name, Total]
    published: Published
    left_out: list[_LeftOut]


class _Evaluation(TypedDict):
    __pydantic_config__ = STRICT  # type: ignore[misc]

    allocation: AllocationSummary | None
    other_bytes: Total
    overall: Metrics
    published: Published
    texts: Annotated[dict[Name, Metrics], Field(min_length=1)]
    tuned: NotRequired[Literal[True]]
    weights_bytes: Total


def read_manifest(folder: Path) -> dict[str, Any]:
    """``mxmoe.json`` of a packed checkpoint; `UserError` names what is missing or out of range."""
    return read_record(folder / "mxmoe.json", _Manifest, "run the quantize step again")


def check_packed_from(checkpoint: Any, fingerprint: str, original: str) -> None:
    """`UserError` unless ``checkpoint``, a `ModelFolder`, was packed from the model of that fingerprint.

    ``original`` names that model in the message. Not typed: what imports that module runs again when families change.
    """
    if not checkpoint.is_packed or read_manifest(checkpoint.path)["allocation"]["model"] != fingerprint:
        raise UserError(f"{checkpoint.path}: was not packed from {original}; run the quantize step for this model")


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
