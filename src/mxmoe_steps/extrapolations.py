"""What `extrapolate` found, at the size of a larger model: JSON, read and checked in one place.

A case is a number of tokens in a step. ``loss`` is the sum over blocks, as in a frontier's ``loss_sum``; ``time_us`` is
that of a layer's expert GEMMs, the mean over layers; ``shares`` are of the weights, by scheme.
"""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field
from typing_extensions import TypedDict

from mxmoe_steps.atomic import write_json
from mxmoe_steps.quantizers.names import QuantizerName
from mxmoe_steps.records import STRICT, Count, Index, Name, Positive, Quantity, SchemeName, Share, read_record

VERSION = 1


class _Spot(TypedDict):
    bits: Positive
    loss: Quantity
    time_us: Positive


class _Uniform(_Spot):
    scheme: SchemeName


class _Vertex(_Spot):
    shares: dict[SchemeName, Share]


class _Frontier(TypedDict):
    budget_bits: Positive
    picked: Index  # the vertex that `r` picks
    vertices: Annotated[list[_Vertex], Field(min_length=1)]


class _Case(TypedDict):
    busiest: Positive  # rows of the busiest expert over the mean
    frontiers: Annotated[list[_Frontier], Field(min_length=1)]
    original_us: Positive
    tokens: Count
    uniform: Annotated[list[_Uniform], Field(min_length=1)]


class _Extrapolation(TypedDict):
    __pydantic_config__ = STRICT  # type: ignore[misc]

    kind: Literal["extrapolation"]
    version: Literal[1]
    cases: Annotated[list[_Case], Field(min_length=1)]
    device: Name
    experts: Count
    layers: Count  # of the model whose losses these are
    metric: Name
    model: Name  # fingerprint of it
    quantizer: QuantizerName
    r: Share
    shape: Name
    skew: Quantity
    time_is_estimate: bool
    timed_as: dict[SchemeName, SchemeName]


def write_extrapolation(path: str | Path, content: dict[str, Any]) -> None:
    """Write an extrapolation; see `read_extrapolation`."""
    write_json(path, {"kind": "extrapolation", "version": VERSION, **content})


def read_extrapolation(path: str | Path) -> dict[str, Any]:
    """What `extrapolate` wrote; `UserError` names what is missing, out of range or at odds."""
    return read_record(path, _Extrapolation, "run the extrapolate step again", _check)


def _check(content: Any) -> None:
    """`ValueError` where keys that are right by themselves contradict each other."""
    for number, case in enumerate(content["cases"]):
        for one, frontier in enumerate(case["frontiers"]):
            if frontier["picked"] >= len(frontier["vertices"]):
                raise ValueError(f"cases[{number}].frontiers[{one}].picked: there is no such vertex")
