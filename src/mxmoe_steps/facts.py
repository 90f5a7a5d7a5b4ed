"""What tables and files of tensors say of themselves: the schema of the facts of every kind.

``model`` is the `mxmoe_steps.models.identity.fingerprint` of the original model.
"""

from typing import Annotated, Any, Literal, NotRequired

from pydantic import Field
from typing_extensions import TypedDict

from mxmoe_steps.quantizers.names import QuantizerName
from mxmoe_steps.records import STRICT, Count, Expert, Index, Name, Positive, Quantity, SchemeName, Total


class TrafficFacts(TypedDict):
    """Of what `trace` wrote, also in the metadata of its routing."""

    __pydantic_config__ = STRICT  # type: ignore[misc]

    activation: NotRequired[Name]  # `gating.Gating.variant` of experts that are no plain SwiGLU
    experts: Count  # routed, per layer
    layers: Annotated[list[Index], Field(min_length=1)]
    length: Count  # tokens of a sequence
    model: Name
    sequences: Count  # of every text
    texts: Annotated[list[Name], Field(min_length=1)]
    top_k: Count


class StoreFacts(TypedDict):
    """Of packed weights that `calibrate` wrote."""

    __pydantic_config__ = STRICT  # type: ignore[misc]

    model: Name
    quantizer: QuantizerName
    scheme: SchemeName


class LossFacts(StoreFacts):
    """Of losses that `calibrate` wrote."""

    domains: Annotated[dict[Name, Count], Field(min_length=1)]  # tokens of each
    fisher: bool  # whether gradients were captured


class MeasurementFacts(TypedDict):
    """Of what `measure` wrote; the last four only where there are rows."""

    __pydantic_config__ = STRICT  # type: ignore[misc]

    capability: list[Index]
    compiler: Name
    cuda: Name
    date: Name
    device: Name
    driver: str
    sms: Count
    torch: Name
    clocks: NotRequired[list[list[Quantity]]]
    kernels: NotRequired[dict[Name, Name]]
    repeats: NotRequired[Count]
    rounds: NotRequired[Count]


class _MeasuredHere(TypedDict):
    __pydantic_config__ = STRICT  # type: ignore[misc]

    cuda: Name
    date: Name
    device: Name
    driver: str
    model: Name
    rounds: Count
    text: Name  # whose routing, or which prompts are of
    torch: Name


class TimeFacts(_MeasuredHere):
    """Of the layers that `time` measured."""

    compiler: Name
    repeats: Count
    steps: Count


class ThroughputFacts(_MeasuredHere):
    """Of the whole models that `time` measured."""

    generated: Count  # tokens of a call of generate
    left_out: list[Name]  # sentences: what was not measured, and why
    together: bool  # all models were in memory together and took turns
    transformers: Name


class Errors(TypedDict):
    """Relative errors."""

    median: Quantity
    p95: Quantity


class ProblemErrors(Errors):
    """Of so many launches."""

    problems: Count


class _HeldOut(TypedDict):
    measured_us: list[Positive]
    mixed: list[bool]
    predicted_us: list[Positive]


class _Ratios(TypedDict):
    launches: Count
    least: Positive
    median: Positive
    most: Positive
    tokens_from: Count


class _Gpu(TypedDict):
    __pydantic_config__ = STRICT  # type: ignore[misc]

    activation_gbs: Positive
    arch: Name
    bandwidth_gbs: Positive
    device: Name
    exposed: Quantity
    launch_us: Quantity
    loop_launch_us: Quantity
    loop_tile_us: Quantity
    sms: Count
    source: Name
    tail: Quantity


class _Estimated(_Gpu):
    estimate: Literal[True]


class _Measured(_Gpu):
    estimate: Literal[False]
    capability: list[Index]
    clocks: list[list[Quantity]]
    compiler: Name
    cuda: Name
    date: Name
    driver: str
    errors: dict[Literal["single", "mixed"], ProblemErrors]
    fused_over_apart: list[_Ratios]
    held_out: _HeldOut
    kernels: dict[Name, Name]
    phase_loss: Errors
    repeat_spread: Errors
    repeats: Count
    rounds: Count
    torch: Name


# Of what `profile` wrote.
ProfileFacts = Annotated[_Estimated | _Measured, Field(discriminator="estimate")]


class CaptureFacts(TypedDict):
    """Of a layer's file that `capture` wrote."""

    __pydantic_config__ = STRICT  # type: ignore[misc]

    layer: Index
    length: Count  # tokens of a sequence
    model: Name
    sequences: Count
    text: Name


class PartFacts(TypedDict):
    """Of one layer's packed weights that `calibrate` keeps until all layers are done."""

    __pydantic_config__ = STRICT  # type: ignore[misc]

    fisher: bool
    key: dict[str, Any]  # what decides the bytes
    rows: list[
        tuple[
            Index,
            Expert,
            Literal["gate", "up", "down"],
            Index,
            Count,
            Positive,
            Total,
            bool,
            list[list[Quantity]],
        ]
    ]


class ReferenceFacts(TypedDict):
    """Of what `evaluate` kept of the original."""

    __pydantic_config__ = STRICT  # type: ignore[misc]

    model: Name
    texts: Annotated[list[Name], Field(min_length=1)]
