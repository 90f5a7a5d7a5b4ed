"""Options that several steps ask for, one class a subject; a step's class inherits those that it needs."""

from pathlib import Path
from typing import Annotated, Any

from pydantic import BeforeValidator, Field

from mxmoe_steps.options.base import (
    Count,
    Device,
    Dtype,
    Flag,
    InFiles,
    Length,
    LossName,
    Options,
    OutFolder,
    Scope,
    Seed,
    Sequences,
    Settings,
    StepOptions,
    Threads,
    description_of,
)
from mxmoe_steps.values import from_json

Sources = Annotated[dict[str, dict[str, Any]], BeforeValidator(from_json), Flag("JSON")]


class Seeded(Options):
    """Where to begin."""

    seed: Seed = Field(0, description="seed of text order, sampled steps and sampled labels")


class Compute(Seeded):
    """Where and how to compute."""

    device: Device = Field("auto", description="cpu, cuda, cuda:1 or auto, which is the first GPU where there is one")
    threads: Threads = Field(1, description="CPU threads of one job; part of a result's bytes")


class Forward(Compute):
    """Where and how to run a model."""

    batch: Sequences = Field(8, description="sequences per forward pass")


class RemoteCode(Options):
    """What to trust."""

    trust_remote_code: bool = Field(False, description="run Python code that comes with the model")


class Precision(RemoteCode):
    """How to read a model."""

    dtype: Dtype = Field(
        "auto", description="precision of activations; auto is the checkpoint's own; float32 is fastest on most CPUs"
    )


class OfModel(Options):
    """Which model."""

    model: Annotated[str, Flag("MODEL")] = Field(
        description="local checkpoint folder (relative to the working directory), hub id or id@revision"
    )


class TextAmount(Options):
    """How much text."""

    sequences: Sequences = Field(32, description="sequences per text")
    length: Length = Field(512, description="tokens per sequence")


class CalibrationAmount(TextAmount):
    """How much calibration text. 128 x 2048 tokens are 8 or more a feature and expert in models of today
    (docs/tuning.md).
    """

    sequences: Sequences = Field(
        128, description="calibration sequences of every domain: of the text, or of each member of a mix"
    )
    length: Length = Field(2048, description=description_of(TextAmount, "length"))


class Texts(Options):
    """Which texts there are."""

    sources: Sources = Field(description="JSON object: name -> text source (docs/texts.md)")


class Waiting(StepOptions):
    """Where text waits between layers."""

    out: OutFolder = Field(description="folder to write")
    borders: OutFolder | None = Field(
        None, description="folder of hidden states at layer borders, removed at the end (default: OUT.borders)"
    )

    @property
    def waiting_room(self) -> Path:
        """The folder of hidden states at layer borders."""
        return self.borders or Path(f"{self.out}.borders")


class Extended(Options):
    """Whose code to run besides ours."""

    extensions: InFiles = Field(
        [], description="Python files whose classes are quantizers, losses or text sources (docs/extending.md)"
    )


class TextThroughModel(Waiting, Extended, Texts, TextAmount, OfModel, Precision, Forward):
    """Of the steps that run text through a model."""


class Limits(Options):
    """What an allocation may be."""

    scope: Scope = Field("model", description="one bit budget for the model, or the same per layer")
    fix: Settings = Field([], description="fixed schemes, e.g. shared=w8a8_fp8 or layer:0/block:down=w4a16")
    min_bits: Settings = Field([], description="least weight bits, e.g. block:down=3")
    max_schemes: Count | None = Field(None, description="at most this many schemes in a layer")
    tie_gate_up: bool = Field(
        False, description="gate and up of an expert always take the same scheme, as in the paper"
    )


class DrawnLoss(Options):
    """Which loss counts."""

    metric: LossName = Field(
        "fisher", description="loss: estimated KL divergence (fisher), or squared change of the layer output (out_sq)"
    )
