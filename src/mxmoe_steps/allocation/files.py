"""Frontier and allocation files: JSON, read and checked in one place. No numpy."""

from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field
from typing_extensions import TypedDict

from mxmoe_steps.allocation.pick import Part, Vertex, corners
from mxmoe_steps.atomic import write_json
from mxmoe_steps.quantizers.names import QuantizerName
from mxmoe_steps.records import (
    STRICT,
    Count,
    Expert,
    Index,
    Name,
    Positive,
    Quantity,
    SchemeName,
    Seed,
    Share,
    Total,
    read_record,
)
from mxmoe_steps.schemes import BLOCKS

DIGITS = "0123456789abcdefghijklmnopqrstuvwxyz"  # a scheme's place in "schemes", one character per block
VERSION = 2
SLACK = 1e-9  # relative; a budget in a file is rounded to float64


class _Constraints(TypedDict):
    fix: list[str]
    max_schemes: Count | None
    min_bits: list[str]
    shared_tile: bool
    tie_gate_up: bool


class _Traffic(TypedDict):
    phase: Literal["auto", "prefill", "decode"]
    seed: Seed
    steps: Count
    texts: list[Name]


class _Counted(TypedDict):
    """How losses of domains count."""

    least_tokens: Quantity  # of a routed expert, over the mean
    no_worse_than_uniform: list[Name]
    objective: Literal["sum", "relative", "worst"]
    weights: dict[Name, Positive]


class _Domains(_Counted):
    names: Annotated[list[Name], Field(min_length=1)]
    uniform: list[Quantity]  # losses under the best single scheme within the budget


class DomainLosses(_Counted):
    """Of an allocation, and of the best single scheme within its budget."""

    losses: dict[Name, Quantity]
    uniform: dict[Name, Quantity]


class _Problem(TypedDict):
    """What was asked for, with what."""

    __pydantic_config__ = STRICT  # type: ignore[misc]

    version: Literal[2]
    budget_bits: Positive
    candidates: list[SchemeName]
    constraints: _Constraints
    device: Name
    gap_limit: Share
    granularity: Literal["block", "expert", "layer", "uniform"]
    metric: Name
    model: Name  # fingerprint
    proved_by: Literal["cp-sat", "states"]
    quantizer: QuantizerName
    scope: Literal["layer", "model"]
    time_is_estimate: bool
    timed_as: dict[SchemeName, SchemeName]
    tokens: Count
    traffic: _Traffic


class _Vertex(TypedDict):
    loss_sum: Quantity
    time_us: Positive
    bits: Total
    price: Quantity
    schemes: Name
    by_domain: list[Quantity]
    tile_tokens: Count | None


class _Part(TypedDict):
    vertices: Annotated[list[_Vertex], Field(min_length=1)]
    cuts: list[tuple[Quantity, Quantity, float]]


class _Point(TypedDict):
    loss_sum: Quantity
    time_us: Positive


class _Frontier(_Problem):
    kind: Literal["frontier"]
    domains: _Domains
    experts: Annotated[list[tuple[Index, Annotated[list[Expert], Field(min_length=1)]]], Field(min_length=1)]
    loss: Literal["root_sum_squares", "sum_of_norms"]
    params: Total
    parts: list[_Part]
    richer: list[Annotated[list[_Point], Field(min_length=1)]]  # vertices of the parts under `MORE_BITS` more
    schemes: Annotated[list[SchemeName], Field(min_length=1, max_length=len(DIGITS))]


class AllocationSummary(_Problem):
    """All of an allocation but the assignment."""

    kind: Literal["allocation"]
    domains: DomainLosses
    bits: Positive
    bound: Quantity
    buys: list[str]  # sentences: what more schemes, bits and time would give
    gap: Share
    loss: Quantity
    loss_form: Literal["root_sum_squares", "sum_of_norms"]
    max_loss: Quantity | None
    max_time_us: Quantity | None
    objective: Quantity
    price: Quantity
    r: Share | None
    status: Literal["optimal", "bounded"]
    tile_tokens: list[Count] | None
    time_us: Positive


class _Allocation(AllocationSummary):
    assignment: Annotated[list[tuple[Index, Expert, SchemeName, SchemeName, SchemeName]], Field(min_length=1)]


def write_frontier(path: str | Path, facts: dict[str, Any], parts: list[Part], richer: list[Part]) -> None:
    """Write the parts (each with its layers in ``facts["parts"]`` order), those of a larger budget, and the facts."""
    content = {
        "kind": "frontier",
        "version": VERSION,
        **facts,
        "parts": [
            {"vertices": [vars(vertex) for vertex in part.vertices], "cuts": [list(cut) for cut in part.cuts]}
            for part in parts
        ],
        "richer": [
            [{"loss_sum": vertex.loss_sum, "time_us": vertex.time_us} for vertex in part.vertices] for part in richer
        ],
    }
    write_json(path, content)


def read_frontier(path: str | Path) -> tuple[dict[str, Any], list[Part]]:
    """The facts and parts of a frontier file; `UserError` names what is missing, out of range or at odds."""
    facts = read_record(path, _Frontier, "run the frontier step again", _check_frontier)
    facts["richer"] = [
        Part([Vertex(**point, bits=0, price=0.0, schemes="") for point in part], []) for part in facts["richer"]
    ]
    return facts, [_part(part) for part in facts.pop("parts")]


def _part(content: Any) -> Part:
    return Part([Vertex(**vertex) for vertex in content["vertices"]], content["cuts"])


def _check_frontier(content: Any) -> None:
    """`ValueError` where keys that are right by themselves contradict each other."""
    for layer, members in content["experts"]:
        if len(set(members)) < len(members):
            raise ValueError(f"experts: layer {layer} names an expert twice")
    sizes = dict(content["experts"])
    if len(sizes) < len(content["experts"]):
        raise ValueError("experts: a layer is named twice")
    if len(set(content["schemes"])) < len(content["schemes"]):
        raise ValueError("schemes: a scheme is named twice")
    whole = content["scope"] == "model" or content["granularity"] == "uniform"
    experts = [sum(map(len, sizes.values()))] if whole else [len(members) for members in sizes.values()]
    if len(experts) != len(content["parts"]):
        raise ValueError(f"parts: {len(content['parts'])}, expected {len(experts)} for these experts and scope")
    if len(content["richer"]) != len(content["parts"]):
        raise ValueError(f"richer: {len(content['richer'])}, expected {len(content['parts'])}, one a part")
    for number, (part, count) in enumerate(zip(content["parts"], experts, strict=True)):
        _check_part(part, f"parts[{number}]", len(BLOCKS) * count, DIGITS[: len(content["schemes"])])
    names, uniform = content["domains"]["names"], content["domains"]["uniform"]
    losses = [vertex["by_domain"] for part in content["parts"] for vertex in part["vertices"]]
    if any(len(found) != len(names) for found in [*losses, uniform]):
        raise ValueError(f"domains: {len(names)} names, and another number of losses")
    most = sum(max(vertex["bits"] for vertex in part["vertices"]) for part in content["parts"])
    if most > content["budget_bits"] * content["params"] * (1 + SLACK):
        raise ValueError(
            f"parts: {most} bits exceed {content['budget_bits']} bits for each of {content['params']} weights"
        )


def _check_part(part: Any, place: str, blocks: int, digits: str) -> None:
    for number, vertex in enumerate(part["vertices"]):
        schemes = vertex["schemes"]
        if len(schemes) != blocks or not set(schemes) <= set(digits):
            raise ValueError(f"{place}.vertices[{number}].schemes: expected {blocks} characters among {digits}")
        if (vertex["tile_tokens"] is None) != (part["vertices"][0]["tile_tokens"] is None):
            raise ValueError(f"{place}.vertices[{number}].tile_tokens: all vertices have one, or none has")
    for number, (one, two) in enumerate(pairwise(part["vertices"]), start=1):
        if not (one["loss_sum"] < two["loss_sum"] and one["time_us"] > two["time_us"]):
            raise ValueError(f"{place}.vertices[{number}]: loss_sum does not rise, or time_us does not fall")
    if not corners(part["cuts"]):
        raise ValueError(f"{place}.cuts: do not bound loss_sum and time_us")


def write_allocation(path: str | Path, content: dict[str, Any]) -> None:
    """Write an allocation; see `read_allocation`."""
    write_json(path, {"kind": "allocation", "version": VERSION, **content})


def read_allocation(path: str | Path) -> dict[str, Any]:
    """An allocation; ``assignment`` rows are (layer, expert, gate, up, down) with canonical scheme names.

    `UserError` names what is missing, out of range or at odds.
    """
    return read_record(path, _Allocation, "run the solve step again", _check_allocation)


def _check_allocation(content: Any) -> None:
    """`ValueError` where keys that are right by themselves contradict each other."""
    seen = set()
    for layer, expert, *_ in content["assignment"]:
        if (layer, expert) in seen:
            raise ValueError(f"assignment: layer {layer} expert {expert} is assigned twice")
        seen.add((layer, expert))
    schemes = {name for row in content["assignment"] for name in row[2:]}
    if content["granularity"] == "uniform" and len(schemes) > 1:
        raise ValueError(f"assignment: granularity is uniform, schemes are {', '.join(sorted(schemes))}")
    if [content["r"], content["max_time_us"], content["max_loss"]].count(None) != 2:
        raise ValueError("r, max_time_us, max_loss: exactly one of them is the goal, the others are null")
    if content["bits"] > content["budget_bits"] * (1 + SLACK):
        raise ValueError(f"bits: {content['bits']} exceed budget_bits, {content['budget_bits']}")
