"""The configuration: every key with its type, default and meaning, and the sweep it spells out.

`load_config` checks a whole configuration before any job starts; `points` turns the sweep into the
points that the workflow computes. ``python -m mxmoe_steps.config`` prints the reference that
``config/README.md`` holds.
"""

import difflib
import itertools
import re
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from mxmoe_steps.data.parsing import parse_source
from mxmoe_steps.data.sources import FileText, MixText
from mxmoe_steps.errors import UserError
from mxmoe_steps.existence import check_constraints, check_kernels, check_selectors
from mxmoe_steps.models.families import is_local, open_original
from mxmoe_steps.quantizers.method import QuantizerName
from mxmoe_steps.schemes import parse_scheme
from mxmoe_steps.timing.estimate import read_hardware
from mxmoe_steps.values import distinct, exact, expand, expand_files

Granularity = Literal["block", "expert", "layer", "uniform"]
Goal = Literal["r", "max_time_us", "max_loss"]
_GOAL_TAGS: dict[str, str] = {"r": "r", "max_time_us": "us", "max_loss": "loss"}


_NAME = r"^\w[\w .+-]*$"  # of a text: a word on command lines, no part of a path
_RESERVED = (  # what else stands in results/
    "benchmarks", "compile", "logs", "measure", "profile", "readme.md", "report.html", "summary.csv"
)  # fmt: skip
_LARGEST = 1 << 20  # sequences, tokens of a sequence or of a step; more is a slip of the pen


class Section(BaseModel):
    """A block of keys: unknown keys are errors, and values are never converted silently."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

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


Names = Annotated[list[str], AfterValidator(distinct)]


class Model(Section):
    """The model to quantize."""

    name: str = Field(description="name in result paths", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=100)
    path: str = Field(
        description="local checkpoint folder (relative to the working directory), hub id or id@revision", min_length=1
    )
    dtype: Literal["float32", "bfloat16", "float16", "auto"] = Field(
        "auto", description="precision of activations; auto is the checkpoint's own; float32 is fastest on most CPUs"
    )
    trust_remote_code: bool = Field(False, description="run Python code that comes with the model")

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


class Trace(Section):
    """Expert traffic."""

    texts: Names = Field(description="text sources to trace", min_length=1)
    sequences: int = Field(32, description="sequences per text", gt=0, le=_LARGEST)
    length: int = Field(512, description="tokens per sequence", gt=1, le=_LARGEST)


class Calibrate(Section):
    """Losses and quantized weights per scheme."""

    text: str = Field(description="text source to calibrate on")
    sequences: int = Field(128, description="calibration sequences", gt=0, le=_LARGEST)
    length: int = Field(512, description="tokens per sequence", gt=1, le=_LARGEST)
    schemes: list[str] = Field(description="candidate schemes, e.g. w4a16 or w8a8_fp8 (docs/schemes.md)", min_length=1)
    quantizers: list[QuantizerName] = Field(
        ["gptq"], description="how to quantize weights (docs/schemes.md)", min_length=1
    )
    damping: float = Field(0.01, description="GPTQ: fraction of the mean Hessian diagonal added to it", gt=0, le=1)
    gradient: bool = Field(True, description="also run a backward pass, which the fisher metric needs")

    @field_validator("schemes")
    @classmethod
    def _canonical(cls, schemes: list[str]) -> list[str]:
        try:
            names = [parse_scheme(scheme).name for scheme in schemes]
        except UserError as error:
            raise ValueError(str(error)) from None
        if "w16a16" in names:
            raise ValueError("w16a16 is the original; allow it with solve.keep_original instead")
        if len(set(names)) < len(names):
            raise ValueError(f"two entries are the same scheme: {', '.join(sorted(names))}")
        return names


class Profile(Section):
    """Kernel times."""

    hardware: str = Field(
        "h100",
        description="a GPU that the package knows (a100, h100, h200, rtx4090), or local: compile kernels and measure"
        " this machine's GPU",
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


class Solve(Section):
    """The allocation problem."""

    metric: Literal["fisher", "out_sq"] = Field(
        "fisher", description="loss: estimated KL divergence (fisher), or squared change of the layer output (out_sq)"
    )
    scope: Literal["model", "layer"] = Field("model", description="one bit budget for the model, or the same per layer")
    traffic: str = Field(description="traced text whose routing decides predicted times")
    keep_original: bool = Field(False, description="let blocks stay at 16 bits (w16a16)")
    fix: list[str] = Field([], description="fixed schemes, e.g. shared=w8a8_fp8 or layer:0/block:down=w4a16")
    min_bits: list[str] = Field([], description="least weight bits, e.g. block:down=3")
    max_schemes: int | None = Field(None, description="at most this many schemes in a layer", gt=0)
    tie_gate_up: bool = Field(
        True, description="gate and up of an expert take the same scheme, as in the paper; GPU layers are faster"
    )
    time_as: list[str] = Field(
        [], description="count another scheme's kernel for one that the GPU has none for, e.g. w4a4=w4a8_fp8"
    )


class Sweep(Section):
    """A grid of allocations: every combination of the listed values."""

    budget_bits: list[float] = Field(description="average bits per expert weight, scales and zero points counted")
    tokens: list[int] = Field(description="tokens in one forward step, for predicted time")
    granularity: list[Granularity] = Field(["block"], description="what shares a scheme: block, expert, layer, uniform")
    r: list[float] = Field([0.75], description="accuracy against time: minimise loss^r time^(1-r)")
    max_time_us: list[float] = Field(
        [], description="instead of r: the most accurate allocation within this predicted time of all expert layers"
    )
    max_loss: list[float] = Field([], description="instead of r: the fastest allocation within this predicted loss")
    quantizer: list[QuantizerName] = Field(["gptq"], description="quantizer of the weights")

    @model_validator(mode="before")
    @classmethod
    def _single_values(cls, values: Any) -> Any:
        """``budget_bits: 3`` means ``budget_bits: [3]``."""
        if not isinstance(values, dict):
            return values
        return {key: value if isinstance(value, list) else [value] for key, value in values.items()}

    @model_validator(mode="after")
    def _ranges(self) -> "Sweep":
        goals = self.model_fields_set & {"r", "max_time_us", "max_loss"}
        if len(goals) > 1:
            raise ValueError(f"{' and '.join(sorted(goals))} exclude each other; use one of them in a grid")
        for name in {"budget_bits", "tokens", "granularity", "quantizer"} | (goals or {"r"}):
            if not getattr(self, name):
                raise ValueError(f"{name} is empty; list at least one value")
        if min([1.0, *self.max_time_us, *self.max_loss]) <= 0:
            raise ValueError("max_time_us and max_loss must be positive")
        if min(self.budget_bits) <= 0 or max(self.budget_bits) > 16:
            raise ValueError(f"budget_bits must lie in (0, 16]; found {self.budget_bits}")
        if min(self.tokens) < 1 or max(self.tokens) > _LARGEST:
            raise ValueError(f"tokens must lie between 1 and {_LARGEST:,}; found {self.tokens}")
        if min(self.r) < 0 or max(self.r) > 1:
            raise ValueError(f"r must lie in [0, 1]; found {self.r}")
        return self


class Evaluate(Section):
    """Held-out evaluation."""

    texts: Names = Field(description="text sources to evaluate on", min_length=1)
    sequences: int = Field(32, description="sequences per text", gt=0, le=_LARGEST)
    length: int = Field(512, description="tokens per sequence", gt=1, le=_LARGEST)


class Runtime(Section):
    """Where and how to compute; every value but `layers_per_job` is part of a result's identity."""

    device: str = Field("auto", description="cpu, cuda or auto", pattern=r"^(cpu|auto|cuda(:\d+)?)$")
    threads: int = Field(1, description="CPU threads of one job", gt=0, le=1024)
    batch: int = Field(8, description="sequences per forward pass", gt=0, le=_LARGEST)
    seed: int = Field(0, description="seed of text order, sampled steps and sampled labels", ge=0, lt=1 << 63)
    layers_per_job: int | None = Field(
        None,
        gt=0,
        description="decoder layers per job of trace, capture and calibrate, null for one job each; results do not"
        " depend on it",
    )


class Config(Section):
    """A whole configuration."""

    model: Model
    texts: dict[str, dict[str, Any]] = Field(
        description="named text sources: {files: [a.txt]}, {files: [a.jsonl], column: text}, {hub: wikitext, ...},"
        " {package: wiki-en} or {mix: [a, b]} (docs/texts.md)"
    )
    trace: Trace
    calibrate: Calibrate
    profile: Profile = Field(default_factory=lambda: Profile())
    solve: Solve
    sweep: list[Sweep] = Field(description="grids of allocations to compute", min_length=1)
    baselines: list[QuantizerName] = Field(
        ["rtn", "gptq"], description="quantizers of the uniform baselines: the best single scheme within each budget"
    )
    evaluate: Evaluate
    runtime: Runtime = Field(default_factory=lambda: Runtime())

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
        sources = {}
        for name, value in self.texts.items():
            try:
                sources[name] = parse_source(name, value)
            except UserError as error:
                raise ValueError(str(error)) from None
        used = {
            "trace.texts": self.trace.texts,
            "calibrate.text": [self.calibrate.text],
            "evaluate.texts": self.evaluate.texts,
        }
        for name, source in sources.items():
            if isinstance(source, MixText):
                used[f"texts.{name}.mix"] = list(source.mix)
            if isinstance(source, FileText):
                missing = [file for file in (*source.files, *source.test_files) if not Path(file).is_file()]
                if missing:
                    raise ValueError(f"texts.{name}.files: no such file {missing[0]}")
        for key, names in used.items():
            _known(key, names, list(sources), "a text source")
        _known("solve.traffic", [self.solve.traffic], self.trace.texts, "one of trace.texts")
        wanted = {quantizer for grid in self.sweep for quantizer in grid.quantizer} | set(self.baselines)
        _known("sweep and baselines: quantizer", sorted(wanted), self.calibrate.quantizers, "in calibrate.quantizers")
        if self.solve.metric == "fisher" and not self.calibrate.gradient:
            raise ValueError("solve.metric fisher needs calibrate.gradient: true; or set solve.metric: out_sq")
        try:
            check_constraints(self)
            check_kernels(self)
        except UserError as error:
            raise ValueError(str(error)) from None
        self._budgets_reachable()
        if self.runtime.layers_per_job is not None and not is_local(self.model.path):
            raise ValueError("runtime.layers_per_job needs a local model: download it and set model.path to its folder")
        return self

    def _budgets_reachable(self) -> None:
        """No candidate can go below its codes and group overhead; `frontier` knows the exact figure."""
        wide = 1 << 20  # input features: per-channel overhead vanishes, so this is a lower bound
        least = min(self.calibrate.schemes, key=lambda name: parse_scheme(name).bits(wide))
        bits = parse_scheme(least).bits(wide)
        for grid in self.sweep:
            if min(grid.budget_bits) < bits:
                raise ValueError(
                    f"sweep: budget_bits {min(grid.budget_bits):g} is below {bits:g}, what the smallest candidate"
                    f" {least} takes; raise the budget or add a smaller scheme to calibrate.schemes"
                )


def _known(key: str, names: list[str], known: list[str] | list[QuantizerName], what: str) -> None:
    for name in names:
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"known: {', '.join(known)}"
            raise ValueError(f"{key}: {name!r} is not {what}; {hint}")


def load_config(values: dict[str, Any], origin: str) -> Config:
    """Validate ``values``; `UserError` lists every mistake with its key. ``origin`` names the file(s)."""
    try:
        config = Config.model_validate(values)
    except ValidationError as error:
        lines = [f"  {_where(item['loc'])}{_message(item)}" for item in error.errors()]
        raise UserError(f"{origin} is not a valid configuration:\n" + "\n".join(lines)) from None
    if is_local(config.model.path):
        check_selectors(config.solve, open_original(config.model.path))
    return config


def _where(location: tuple[int | str, ...]) -> str:
    return ".".join(map(str, location)) + ": " if location else ""


def _message(item: Any) -> str:
    if item["type"] == "missing":
        return "this key is required"
    if item["type"] == "value_error":
        return str(item["ctx"]["error"])
    value = item["input"]
    advice = ""
    if isinstance(value, str) and item["type"] in ("int_type", "float_type"):
        advice = " (in YAML write numbers without quotes, and 1.0e-3 rather than 1e-3)"
    return f"{item['msg']}; found {value!r}{advice}"


def decoder_layers(model: Model) -> int:
    """Number of decoder layers of a local model."""
    return int(open_original(model.path).config["num_hidden_layers"])


class Point(BaseModel):
    """One allocation of the sweep; its `name` is the wildcard in result paths."""

    model_config = ConfigDict(frozen=True)

    budget_bits: float
    tokens: int
    granularity: Granularity
    quantizer: QuantizerName
    goal: Goal
    value: float

    @property
    def frontier(self) -> str:
        """Name of the frontier the point lies on: everything but the goal."""
        return f"b{exact(self.budget_bits)}_t{self.tokens}_{self.granularity}_{self.quantizer}"

    @property
    def name(self) -> str:
        """For example ``b2.25_t64_block_gptq_r0.75`` or ``b3_t64_block_gptq_us120``."""
        return f"{self.frontier}_{_GOAL_TAGS[self.goal]}{exact(self.value)}"


def points(config: Config) -> list[Point]:
    """Every point of the sweep, then the uniform baselines of every budget; sorted, without repeats.

    A baseline is the single scheme of least loss within the budget (granularity uniform, r = 1).
    """
    found = set()
    least_tokens = min(tokens for grid in config.sweep for tokens in grid.tokens)
    for grid in config.sweep:
        goal: Goal = "max_time_us" if grid.max_time_us else "max_loss" if grid.max_loss else "r"
        axes = (grid.budget_bits, grid.tokens, grid.granularity, grid.quantizer, getattr(grid, goal))
        for budget, tokens, granularity, quantizer, value in itertools.product(*axes):
            found.add(_point(budget, tokens, granularity, quantizer, goal, value))
        for budget, quantizer in itertools.product(grid.budget_bits, config.baselines):
            found.add(_point(budget, least_tokens, "uniform", quantizer, "r", 1.0))
    return sorted(found, key=lambda point: (point.budget_bits, point.name))


def _point(
    budget_bits: float, tokens: int, granularity: Granularity, quantizer: QuantizerName, goal: Goal, value: float
) -> Point:
    return Point(
        budget_bits=budget_bits, tokens=tokens, granularity=granularity, quantizer=quantizer, goal=goal, value=value
    )


def reference() -> str:
    """The configuration reference in Markdown."""
    lines = [
        "# Configuration reference",
        "",
        "`config.yaml` beside this file is the demo. Copy it, edit it, and run"
        " `snakemake --cores N --configfile my.yaml`. Keys that it leaves out take the defaults below. To change a few"
        " values of a configuration and keep the rest, name both files:"
        " `snakemake --cores N --configfile config/config.yaml changes.yaml`.",
        "",
        "This page is generated: `python -m mxmoe_steps.config > config/README.md`.",
        "",
        "| key | type | default | meaning |",
        "|---|---|---|---|",
    ]
    for name, field in Config.model_fields.items():
        section = next((kind for kind in (field.annotation, *get_args(field.annotation)) if _is_section(kind)), None)
        if section is None:
            lines.append(_row(name, field))
            continue
        lines.append(f"| **{name}** | | | {section.__doc__.splitlines()[0]} |")
        prefix = f"{name}[]" if get_args(field.annotation) else name
        lines += [_row(f"{prefix}.{key}", inner) for key, inner in section.model_fields.items()]
    return "\n".join(lines) + "\n"


def _is_section(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, Section)


def _row(name: str, field: Any) -> str:
    kind = field.annotation
    text = kind.__name__ if isinstance(kind, type) and not get_args(kind) else str(kind).replace("typing.", "")
    default = "required" if field.is_required() else f"`{field.default!r}`".replace("'", "")
    return f"| `{name}` | {text.replace('|', ' or ')} | {default} | {field.description} |"


if __name__ == "__main__":
    print(reference(), end="")
