"""check: whether model and texts are what the steps need, before the first of them runs.

Compares the checkpoint with its model class by the headers of its files, and reads every text as the steps will:
their tokenizer, their sequences. Text to evaluate on must not be text to calibrate on, every budget must be one that
some allocation meets, and tasks must exist, with their data. Writes nothing; exit status 2 and one line say what is
wrong and what to do about it. A model of the hub is downloaded.
"""

import sys
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from mxmoe_steps.errors import UserError, run_cli
from mxmoe_steps.extensions import load
from mxmoe_steps.options.base import Flag, InFolder, Names, Schemes, StepOptions, description_of
from mxmoe_steps.options.command_line import parse
from mxmoe_steps.options.shared import Compute, Extended, Limits, OfModel, Precision, Texts
from mxmoe_steps.tasks import TasksOptions

if TYPE_CHECKING:
    from mxmoe_steps.data.sources import TextSource
    from mxmoe_steps.models.families import ModelFolder

Reading = Annotated[list[str], Field(min_length=3), Flag("SEQUENCES LENGTH NAME")]

_MOST_SHARED = 0.1  # of the characters of a text; short documents, such as headings, may well come twice


class CheckOptions(OfModel, Precision, Extended, Texts, Limits, Compute, StepOptions):
    """Options of the step."""

    trace: Reading = Field(description="what trace reads: sequences, length and names of texts")
    calibrate: Reading = Field(description="what calibrate reads")
    evaluate: Reading = Field(description="what evaluate reads")
    candidates: Schemes = Field(description="schemes that blocks may take")
    tasks: Names = Field([], description="tasks that models are to be scored on")
    task_folder: InFolder | None = Field(None, description=description_of(TasksOptions, "task_folder"))
    few_shot: Annotated[list[str], Flag("TASK=EXAMPLES")] = Field(
        [], description="worked examples before each question of a task"
    )
    problems: Annotated[list[str], Flag("GRANULARITY=BITS")] = Field(description="of the sweep")


def check(options: CheckOptions) -> None:
    """Raise `UserError` for the first thing that is wrong."""
    from mxmoe_steps.data.reading import TextReader
    from mxmoe_steps.models.families import resolve_model
    from mxmoe_steps.models.loading import resolve_device
    from mxmoe_steps.models.streaming import StreamedModel

    resolve_device(options.device)
    check_tasks(options)
    path = resolve_model(options.model, code=options.trust_remote_code)
    model = StreamedModel(path, options.dtype, "cpu", options.trust_remote_code)
    load(options.extensions)
    reader = TextReader(path, options.sources, options.seed, options.trust_remote_code)
    for option, reading, split in (
        ("trace", options.trace, "calibration"),
        ("calibrate", options.calibrate, "calibration"),
        ("evaluate", options.evaluate, "test"),
    ):
        sequences, length, *texts = reading
        if int(length) > (longest := getattr(model.config, "max_position_embeddings", None) or int(length)):
            raise UserError(f"{option}.length: {length}, but {path} knows positions of {longest} tokens; lower it")
        for text in texts:
            reader.read(text, split, int(sequences), int(length))
    check_apart(reader.sources, options.calibrate[2:], options.evaluate[2:])
    check_budgets(options, model.folder)
    for line in (
        *of_published(options, model.folder),
        *of_source(options, model.folder),
        *without_kernels(options, model.folder),
    ):
        print(f"check: {line}", file=sys.stderr)
    print(f"check: {options.model} and its texts are fit for use", file=sys.stderr)


def check_tasks(options: CheckOptions) -> None:
    """`UserError` for a task that is unknown, or whose data is neither here nor can be downloaded."""
    from mxmoe_steps.harness.finding import find_task
    from mxmoe_steps.harness.names import shots_of

    shots = shots_of(options.few_shot)
    for name in options.tasks:
        find_task(name, options.task_folder, shots.get(name), options.seed)


def check_apart(sources: Mapping[str, "TextSource"], calibrate: list[str], evaluate: list[str]) -> None:
    """`UserError` where documents to evaluate on are among those to calibrate on."""
    from mxmoe_steps.data.sources import documents, key_of

    seen = {key_of(found) for part in parts(sources, calibrate) for found in documents(sources[part], "calibration")}
    for part in parts(sources, evaluate):
        keys = [key_of(found) for found in documents(sources[part], "test")]
        shared = sum(len(key) for key in keys if key in seen) / sum(map(len, keys))
        if shared > _MOST_SHARED:
            raise UserError(
                f"texts.{part}: {shared:.0%} of what it has to evaluate on is calibration text of"
                f" {', '.join(calibrate)} as well; name other `test_files` or another test_split"
            )


def check_budgets(options: CheckOptions, folder: "ModelFolder") -> None:
    """`UserError` for a budget that no allocation of the candidates meets, given what is fixed."""
    from mxmoe_steps.allocation.constraints import parse_constraints, split_setting
    from mxmoe_steps.allocation.reachable import check_reachable
    from mxmoe_steps.schemes import parse_scheme
    from mxmoe_steps.timing.blocks import blocks_of

    constraints = parse_constraints(options.fix, options.min_bits, [], options.max_schemes, options.tie_gate_up)
    candidates = sorted(map(parse_scheme, options.candidates))
    problems = [split_setting(text, "--problems") for text in options.problems]
    check_reachable(blocks_of(folder, sizes=True), candidates, constraints, options.scope, problems)


def of_source(options: CheckOptions, folder: "ModelFolder") -> Iterator[str]:
    """What is known of weights that their publisher quantized, and budgets that say less than they seem to."""
    from mxmoe_steps.allocation.constraints import split_setting
    from mxmoe_steps.models.inventory import published

    original = published(folder)
    if not original["formats"]:
        return
    bits, formats = original["expert_bits"], ", ".join(original["formats"])
    yield (
        f"{options.model} is published in {formats}, {bits:.2f} bits an expert weight, dequantized to {folder.dtype}"
        " as they are read"
    )
    for text in options.problems:
        granularity, budget = split_setting(text, "--problems")
        if float(budget) >= bits:
            yield f"a budget of {budget} bits per {granularity} is no less than the {bits:.2f} bits of the original"


def of_published(options: CheckOptions, folder: "ModelFolder") -> Iterator[str]:
    """What stays as its publisher quantized it; `UserError` for what cannot, though a candidate says so."""
    from mxmoe_steps.models.published import unpublished
    from mxmoe_steps.schemes import parse_scheme

    for scheme in (one for one in map(parse_scheme, options.candidates) if one.published):
        others = list(unpublished(folder, scheme))
        line = f"blocks under {scheme} keep the codes and scales of {options.model}, and lose nothing"
        if others:
            counted = sum(map(len, (experts for _, experts in others)))
            layers = len({layer for layer, _ in others})
            line += (
                f", but for {counted} experts in {layers} layers that it has in 16 bits, quantized to the same codes"
            )
        yield line


def without_kernels(options: CheckOptions, folder: "ModelFolder") -> Iterator[str]:
    """Layers for which the GPU kernels lack a candidate in their sizes, and why."""
    from mxmoe_steps.kernels.plan import plan_layer
    from mxmoe_steps.schemes import SHARED, parse_scheme

    reasons: dict[str, dict[int, None]] = {}
    for layer in folder.moe_layers:
        hidden, inner = folder.raw_block(layer, 0, "down").shape
        shared = folder.raw_block(layer, SHARED, "down").shape[1] if folder.family.shared is not None else 0
        for scheme in map(parse_scheme, options.candidates):
            experts = dict.fromkeys([0, SHARED] if shared else [0], (scheme, scheme, scheme))
            try:
                plan_layer(experts, hidden, inner, shared)
            except UserError as error:
                reasons.setdefault(str(error), {})[layer] = None
    for why, layers in reasons.items():
        yield (
            f"{len(layers)} layers, the first one {min(layers)}, will run reference arithmetic on GPUs, and predicted"
            f" times are what kernels would take: {why}"
        )


def parts(sources: Mapping[str, "TextSource"], names: Iterable[str]) -> Iterator[str]:
    """Names of sources, those of its members instead of a mix."""
    from mxmoe_steps.data.sources import MixText

    for name in names:
        source = sources[name]
        yield from source.mix if isinstance(source, MixText) else [name]


def main() -> None:
    """Command line."""
    check(parse(CheckOptions, __doc__))


if __name__ == "__main__":
    run_cli(main)
