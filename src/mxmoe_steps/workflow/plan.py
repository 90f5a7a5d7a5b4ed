"""What a configuration asks of the steps: schemes, problems, ranges of layers, memory; and one commit of its model."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from mxmoe_steps.atomic import write_json
from mxmoe_steps.calibration.loss import BUILTIN, LOSSES
from mxmoe_steps.config.existence import timed_as
from mxmoe_steps.config.points import Point
from mxmoe_steps.config.sections import Config
from mxmoe_steps.data.parsing import parse_source
from mxmoe_steps.extensions import file_of
from mxmoe_steps.harness.names import local_tasks, shots_of
from mxmoe_steps.job_memory import Sizes, job_memory, whole_model_memory
from mxmoe_steps.models.families import ModelFolder, describe_model
from mxmoe_steps.quantizers.method import Method
from mxmoe_steps.schemes import ORIGINAL
from mxmoe_steps.values import exact


def pinned_model(asked: str, pin: Path, is_first: bool) -> tuple[str, ModelFolder]:
    """How to name a model so that all jobs of a run mean the same one, and its description.

    The process that is first to ask writes a hub model's commit to the file ``pin``; the others take it from there.
    """
    if is_first:
        path, described = describe_model(asked)
        write_json(pin, {asked: path})
        return path, described
    return describe_model(json.loads(pin.read_text(encoding="utf-8")).get(asked, asked))


def told(config: Config) -> dict[str, Any]:
    """What the report tells of a configuration: all of it that results depend on, but for a user's modules, which are
    told where they are used."""
    told = config.model_dump(mode="json", exclude_none=True)
    told["runtime"].pop("layers_per_job", None)
    if config.profile.hardware != "local":
        told.pop("time")
    told.pop("extensions", None)
    for several in ("schemes", "quantizers"):
        told["calibrate"][several].sort()
    return told


def candidates(config: Config) -> list[str]:
    """Schemes that a block may take."""
    return [*sorted(config.calibrate.schemes), *([ORIGINAL.name] if config.solve.keep_original else [])]


def timed_schemes(config: Config) -> list[str]:
    """Schemes whose kernels count for the candidates, and for blocks that stay at 16 bits."""
    kernels = timed_as(config)
    return sorted({*(kernels.get(scheme, scheme) for scheme in config.calibrate.schemes), ORIGINAL.name})


def counted_domains(point: Point) -> dict[str, Any]:
    """Options of `frontier` for a uniform point: the single scheme of least loss, however domains count for others."""
    plain = {"domains": "sum", "domain_weights": [], "least_tokens": 0.0, "no_worse_than_uniform": []}
    return plain if point.granularity == "uniform" else {}


def least_budgets(points: Iterable[Point]) -> list[str]:
    """``GRANULARITY=BITS`` with the smallest budget of the sweep: whoever meets it meets the others."""
    budgets: dict[str, float] = {}
    for point in points:
        budgets[point.granularity] = min(budgets.get(point.granularity, point.budget_bits), point.budget_bits)
    return [f"{granularity}={exact(bits)}" for granularity, bits in sorted(budgets.items())]


def part_borders(config: Config, model: ModelFolder) -> list[int]:
    """Layers at which a job of `trace`, `capture` or `tune` hands over to the next; none when one job does it all."""
    step = config.runtime.layers_per_job
    return [] if step is None else list(range(step, model.layers, step))


def memory_of_steps(config: Config, model: ModelFolder) -> dict[str, int]:
    """Step -> MiB of memory that one of its jobs needs."""
    sections = (config.trace, config.calibrate, config.evaluate)
    sizes, element = Sizes.of(model), 4 if config.model.dtype == "float32" else 2
    found = job_memory(
        sizes,
        element,
        run_tokens=config.runtime.batch * max(section.length for section in sections),
        calibration_tokens=len(config.domains) * config.calibrate.sequences * config.calibrate.length,
    )
    asked = config.runtime.batch * config.evaluate.length
    found["tasks"] = whole_model_memory(sizes, model.layers, element, asked)
    if config.time.whole_model:
        found["time"] = whole_model_memory(sizes, model.layers, 2, 0)  # bfloat16; what it computes is on the GPU
    return found


def asked_tasks(config: Config) -> dict[str, dict[str, Any]]:
    """Task -> options of `tasks` that are its own. Only a task of the user's own depends on the user's folder."""
    folder, shots = config.evaluate.task_folder, shots_of(config.evaluate.few_shot)
    local = local_tasks(folder) if folder is not None else {}
    return {
        name: {"task": name, "shots": shots.get(name), "task_folder": folder if name in local else None}
        for name in sorted(config.evaluate.tasks)
    }


def extensions_of_texts(config: Config, names: Iterable[str]) -> list[str]:
    """The user's modules that the text sources of ``names`` are from."""
    return _files(type(parse_source(name, value)) for name, value in used_sources(config, names).items())


def extensions_of_calibration(config: Config, quantizer: str) -> list[str]:
    """The user's modules that a quantizer and the losses are from."""
    return _files([Method(quantizer).kind, LOSSES[config.solve.metric]])


def more_losses(config: Config) -> list[str]:
    """Losses to compute besides the built-in ones."""
    return [] if config.solve.metric in BUILTIN else [config.solve.metric]


def _files(kinds: Iterable[type]) -> list[str]:
    return sorted({file for kind in kinds if (file := file_of(kind)) is not None})


def used_sources(config: Config, names: Iterable[str]) -> dict[str, dict[str, Any]]:
    """The text sources that ``names`` need, with the members of mixes."""
    needed = {source for name in names for source in (name, *config.texts[name].get("mix", []))}
    return {name: config.texts[name] for name in sorted(needed)}
