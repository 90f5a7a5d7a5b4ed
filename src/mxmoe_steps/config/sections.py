"""Every block of keys of a configuration; what concerns several of them is checked in `Config`."""

import difflib
import re
from typing import Annotated, Any, TypeVar

from pydantic import BeforeValidator, Field, GetJsonSchemaHandler, field_validator, model_validator
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema

from mxmoe_steps.calibrate import CalibrateOptions, Quantizing
from mxmoe_steps.calibration.loss import LOSSES
from mxmoe_steps.capture import CapturedText
from mxmoe_steps.config.existence import (
    check_budgets,
    check_constraints,
    check_kernels,
    check_rotation,
    check_texts,
    known,
)
from mxmoe_steps.errors import UserError
from mxmoe_steps.evaluate import EvaluateOptions
from mxmoe_steps.extensions import load
from mxmoe_steps.extrapolate import Larger
from mxmoe_steps.frontier import Counting, Problem
from mxmoe_steps.harness.names import check_names
from mxmoe_steps.models.families import is_local
from mxmoe_steps.options.base import (
    Bits,
    Ceiling,
    Count,
    Exponent,
    Flag,
    Granularity,
    Names,
    Options,
    Schemes,
    Tokens,
    description_of,
)
from mxmoe_steps.options.shared import Extended, Forward, OfModel, Precision, TextAmount
from mxmoe_steps.quantizers.method import method_names
from mxmoe_steps.quantizers.names import QuantizerName
from mxmoe_steps.solve import SolveOptions
from mxmoe_steps.tasks import Questions, TasksOptions
from mxmoe_steps.time import Timed
from mxmoe_steps.timing.estimate import read_hardware
from mxmoe_steps.trace import TracedTexts
from mxmoe_steps.tune import Descent
from mxmoe_steps.values import distinct, expand, expand_files

_NAME = r"^\w[\w .+-]*$"  # of a text: a word on command lines, no part of a path
_RESERVED = (  # what else stands in results/
    "benchmarks", "compile", "logs", "measure", "profile", "readme.md", "report.html", "summary.csv"
)  # fmt: skip

Value = TypeVar("Value")


class Section(Options, strict=True):
    """A block of keys: unknown keys are errors, and values are never converted silently."""

    @model_validator(mode="before")
    @classmethod
    def _known_keys(cls, values: Any) -> Any:
        if isinstance(values, dict):
            for key in values:
                if key not in cls.model_fields:
                    close = difflib.get_close_matches(str(key), cls.model_fields, n=1)
                    hint = f"did you mean {close[0]!r}?" if close else f"known keys: {', '.join(cls.model_fields)}"
                    raise ValueError(f"unknown key {key!r}; {hint}")
        return values


class Model(Precision, Section):
    """The model to quantize."""

    name: str = Field(description="name in result paths", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=100)
    path: str = Field(description=description_of(OfModel, "model"), min_length=1)

    @field_validator("name")
    @classmethod
    def _free(cls, name: str) -> str:
        if name.lower() in _RESERVED:
            raise ValueError(f"{name!r} is taken in results/; choose another name")
        return name

    @field_validator("path")
    @classmethod
    def _expanded(cls, path: str) -> str:
        return expand(path)


class Trace(TracedTexts, Section):
    """Expert traffic."""


class Calibrate(CapturedText, Quantizing, Section):
    """Losses and quantized weights per scheme."""

    schemes: Schemes = Field(
        description="candidate schemes, e.g. w4a16, w8a8_fp8 or published (docs/schemes.md)", min_length=1
    )
    quantizers: list[QuantizerName] = Field(
        ["gptq"], description=description_of(CalibrateOptions, "quantizer"), min_length=1
    )

    @field_validator("schemes")
    @classmethod
    def _candidates(cls, names: list[str]) -> list[str]:
        if "w16a16" in names:
            raise ValueError("w16a16 is the original; allow it with solve.keep_original instead")
        if len(set(names)) < len(names):
            raise ValueError(f"two entries are the same scheme: {', '.join(sorted(names))}")
        return names


class Profile(Section):
    """Kernel times."""

    hardware: str = Field(
        "h100",
        description="a GPU that the package knows (a100, h100, h200, h20, rtx3090, rtx4090, rtx5090), or local: compile"
        " kernels and measure this machine's GPU",
    )

    @field_validator("hardware")
    @classmethod
    def _exists(cls, name: str) -> str:
        if name != "local":
            try:
                read_hardware(name)
            except UserError as error:
                raise ValueError(f"{error}; or local, to measure this machine's GPU") from None
        return name


class Solve(Counting, Section):
    """The allocation problem."""

    traffic: str = Field(description="traced text whose routing decides predicted times")
    keep_original: bool = Field(False, description="let blocks stay at 16 bits (w16a16)")


def _listed(value: Any) -> Any:
    """``budget_bits: 3`` means ``budget_bits: [3]``."""
    return value if isinstance(value, list) else [value]


class _OrOne:
    """Says so in the JSON schema."""

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        listed = handler(schema)
        return {"anyOf": [listed["items"], listed]}


Several = Annotated[list[Value], BeforeValidator(_listed), _OrOne()]


class Sweep(Section):
    """A grid of allocations: every combination of the listed values."""

    budget_bits: Several[Bits] = Field(description=description_of(Problem, "budget_bits"))
    tokens: Several[Tokens] = Field(description=description_of(Problem, "tokens"))
    granularity: Several[Granularity] = Field(
        [Problem.model_fields["granularity"].default], description=description_of(Problem, "granularity")
    )
    r: Several[Exponent] = Field([0.75], description=description_of(SolveOptions, "r"))
    max_time_us: Several[Ceiling] = Field([], description=description_of(SolveOptions, "max_time_us"))
    max_loss: Several[Ceiling] = Field([], description=description_of(SolveOptions, "max_loss"))
    quantizer: Several[QuantizerName] = Field(["gptq"], description=description_of(CalibrateOptions, "quantizer"))
    tuned: Several[bool] = Field([False], description="whether the checkpoint's weights are tuned (docs/tuning.md)")

    @model_validator(mode="after")
    def _one_goal(self) -> "Sweep":
        goals = self.model_fields_set & {"r", "max_time_us", "max_loss"}
        if len(goals) > 1:
            raise ValueError(f"{' and '.join(sorted(goals))} exclude each other; use one of them in a grid")
        for name in {"budget_bits", "tokens", "granularity", "quantizer", "tuned"} | (goals or {"r"}):
            if not getattr(self, name):
                raise ValueError(f"{name} is empty; list at least one value")
        return self


class Extrapolate(Larger, Section):
    """Loss against time at the size of a larger model, with this one's losses; leave it out, and there is none."""


class Tune(Descent, Section):
    """Tuning of the checkpoints that `sweep[].tuned` asks for, on the calibration text."""


class Time(Timed, Section):
    """Measured times of the checkpoints, where `profile.hardware` is local (docs/profile.md)."""

    whole_model: bool = Field(
        True, description="also measure tokens a second of the whole models, as far as they fit in the GPU's memory"
    )


class Evaluate(Questions, TextAmount, Section):
    """Held-out evaluation: on text, and on tasks (docs/tasks.md)."""

    texts: Names = Field(description=description_of(EvaluateOptions, "texts"), min_length=1)
    tasks: Names = Field(
        [], description="tasks and groups of lm-eval, e.g. arc_easy or mmlu, or of task_folder; needs the extra [eval]"
    )
    task_folder: str | None = Field(None, description=description_of(TasksOptions, "task_folder"))
    few_shot: Annotated[list[str], Flag("TASK=EXAMPLES")] = Field(
        [], description="worked examples before each question of a task, e.g. mmlu=5; others: as the task says"
    )

    @field_validator("task_folder")
    @classmethod
    def _expanded(cls, folder: str | None) -> str | None:
        return None if folder is None else expand(folder)

    @model_validator(mode="after")
    def _tasks_exist(self) -> "Evaluate":
        try:
            check_names(self.tasks, self.task_folder, self.few_shot)
        except UserError as error:
            raise ValueError(str(error)) from None
        return self


class Runtime(Forward, Section):
    """Where and how to compute; every value but `layers_per_job` is part of a result's identity."""

    layers_per_job: Annotated[Count | None, Flag("LAYERS")] = Field(
        None,
        description="decoder layers per job of trace, capture, calibrate and tune, null for one job each; results do"
        " not depend on it",
    )


class Config(Section):
    """A whole configuration."""

    extensions: list[str] = Field([], description=description_of(Extended, "extensions"))
    model: Model
    texts: dict[str, dict[str, Any]] = Field(
        description="named text sources: {files: [a.txt]}, {files: [a.jsonl], column: text}, {hub: wikitext, ...},"
        " {package: wiki-en} or {mix: [a, b]}, or a kind of your own (docs/texts.md)"
    )
    trace: Trace
    calibrate: Calibrate
    profile: Profile = Field(default_factory=lambda: Profile())
    solve: Solve
    sweep: list[Sweep] = Field(description="grids of allocations to compute", min_length=1)
    baselines: list[QuantizerName] = Field(
        ["rtn", "gptq"], description="quantizers of the uniform baselines: the best single scheme within each budget"
    )
    extrapolate: Extrapolate | None = None
    tune: Tune = Field(default_factory=lambda: Tune())
    evaluate: Evaluate
    time: Time = Field(default_factory=lambda: Time())
    runtime: Runtime = Field(default_factory=lambda: Runtime())

    @property
    def domains(self) -> list[str]:
        """Domains of the calibration text: the members of a mix, or the text itself."""
        text = self.calibrate.text
        return sorted(self.texts[text].get("mix", [text]))

    @field_validator("extensions")
    @classmethod
    def _loaded(cls, files: list[str]) -> list[str]:
        files = distinct([expand(file) for file in files])
        try:
            load(files)
        except UserError as error:
            raise ValueError(str(error).removeprefix("extensions: ")) from None
        return files

    @field_validator("texts")
    @classmethod
    def _named(cls, texts: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
        for name in texts:
            if not re.fullmatch(_NAME, name):
                raise ValueError(
                    f"{name!r} is no name for a text: begin with a letter or digit, and use no / or braces"
                )
        return {name: expand_files(source) for name, source in texts.items()}

    @model_validator(mode="after")
    def _consistent(self) -> "Config":
        check_texts(self)
        known("solve.traffic", [self.solve.traffic], self.trace.texts, "one of trace.texts")
        known("calibrate.quantizers", self.calibrate.quantizers, method_names(), "a quantizer")
        check_rotation(self)
        known("solve.metric", [self.solve.metric], list(LOSSES), "a loss")
        wanted = {quantizer for grid in self.sweep for quantizer in grid.quantizer} | set(self.baselines)
        known("sweep and baselines: quantizer", sorted(wanted), self.calibrate.quantizers, "in calibrate.quantizers")
        metric = self.solve.metric
        if LOSSES[metric].needs_gradient and not self.calibrate.gradient:
            raise ValueError(f"solve.metric {metric} needs calibrate.gradient: true; or set solve.metric: out_sq")
        known("solve.no_worse_than_uniform", self.solve.no_worse_than_uniform, self.domains, "a calibrated domain")
        try:
            check_constraints(self)
            check_kernels(self)
        except UserError as error:
            raise ValueError(str(error)) from None
        check_budgets(self)
        if self.runtime.layers_per_job is not None and not is_local(self.model.path):
            raise ValueError("runtime.layers_per_job needs a local model: download it and set model.path to its folder")
        return self
