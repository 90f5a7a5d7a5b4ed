"""time: microseconds of the MoE layers of checkpoints on this machine's GPU, and tokens a second of the whole models.

Every layer of every checkpoint is timed on traced routing, whole and stage by stage, beside the original's experts in
transformers (bfloat16, the fastest of its implementations), in one process and interleaved. The router is left out on
both sides. With ``--throughput`` the whole models generate and prefill, too, as a user calls them. By hand:

    python -m mxmoe_steps.time --model MODEL --checkpoint FOLDER --trace results/NAME/trace --traffic-text TEXT \\
        --layer 11 --tokens 8192 --out times.parquet
"""

import sys
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Self

from pydantic import Field, model_validator

from mxmoe_steps.errors import UserError, run_cli
from mxmoe_steps.made_from import recorded
from mxmoe_steps.options.base import (
    Count,
    Flag,
    InFile,
    InFolder,
    InFolders,
    Natural,
    Options,
    OutFile,
    Schemes,
    Sequences,
    StepOptions,
    Threads,
    Tokens,
)
from mxmoe_steps.options.command_line import parse
from mxmoe_steps.options.shared import Extended, OfModel, RemoteCode, Seeded, Sources

if TYPE_CHECKING:
    from mxmoe_steps.kernels.architecture import Architecture
    from mxmoe_steps.kernels.moe_layer import MoeLayer
    from mxmoe_steps.models.streaming import StreamedModel
    from mxmoe_steps.timing.profile import Profile
    from mxmoe_steps.timing.throughput import Workload
    from mxmoe_steps.timing.traffic import Routing


class Timed(Options):
    """What to time, and how often."""

    layers: list[Natural] = Field([], description="decoder layers to time (default: all that have experts)")
    steps: Count = Field(2, description="sampled steps of each number of tokens")
    rounds: Count = Field(5, description="times that every launch, and every step of a whole model, is visited")
    repeats: Count = Field(3, description="replays of a launch that count at each visit, by their median")
    decode: list[Sequences] = Field(
        [], description="sequences that a whole model decodes at a time (default: tokens of the steps up to 256, or 1)"
    )
    prefill: list[Tokens] = Field(
        [], description="tokens that a whole model prefills at a time (default: tokens of larger steps, or 2048)"
    )
    prompt: Tokens = Field(64, description="tokens before decode steps; at most those of a traced sequence")
    generated: Annotated[int, Field(ge=16, le=2**31 - 1), Flag("TOKENS")] = Field(
        64, description="tokens that generate makes to time decode steps, of which the first 8 do not count"
    )


class TimeOptions(Timed, Seeded, Extended, OfModel, RemoteCode, StepOptions):
    """Options of the step."""

    checkpoints: InFolders = Field(description="folders that quantize wrote")
    trace: InFolder = Field(description="folder that trace wrote")
    traffic_text: Annotated[str, Flag("NAME")] = Field(
        description="traced text whose routing is timed, and whose beginnings are prompts"
    )
    tokens: list[Tokens] = Field(description="tokens in a step")
    sources: Sources = Field({}, description="for --throughput: JSON object, name -> text source")
    throughput: OutFile | None = Field(None, description="measure whole models, too: parquet file to write")
    uniform: Schemes = Field(
        [], description="time layers under these schemes, too: of the original, all blocks rounded to nearest"
    )
    profile: InFile | None = Field(None, description="what profile wrote, to print predicted times beside measured")
    threads: Annotated[Threads, Flag("THREADS", decides=False)] = Field(1, description="kernels compiled at a time")
    out: OutFile = Field(description="parquet file to write")

    @model_validator(mode="after")
    def _prompts(self) -> Self:
        if self.throughput is not None and self.traffic_text not in self.sources:
            raise ValueError(
                f"--throughput takes prompts from --traffic-text {self.traffic_text}: name it in --sources"
            )
        return self

    @property
    def decoded(self) -> list[int]:
        """Sequences of the decode steps of whole models."""
        from mxmoe_steps.timing.traffic import DECODE_TOKENS

        return sorted(set(self.decode)) or sorted({tokens for tokens in self.tokens if tokens <= DECODE_TOKENS}) or [1]

    @property
    def prefilled(self) -> list[int]:
        """Tokens of the prefills of whole models."""
        from mxmoe_steps.timing.traffic import DECODE_TOKENS

        return (
            sorted(set(self.prefill)) or sorted({tokens for tokens in self.tokens if tokens > DECODE_TOKENS}) or [2048]
        )


def open_checkpoints(options: TimeOptions, path: Path, of_model: str) -> "dict[str, StreamedModel]":
    """The checkpoints by the names of their folders; `UserError` where they were not packed from ``path``, whose
    fingerprint is ``of_model``."""
    from mxmoe_steps.evaluations import check_packed_from
    from mxmoe_steps.models.families import open_model
    from mxmoe_steps.models.streaming import StreamedModel
    from mxmoe_steps.timing.times import ORIGINAL

    models: dict[str, StreamedModel] = {}
    for folder in options.checkpoints:
        name = folder.resolve().name
        if name in {*models, ORIGINAL, *options.uniform}:
            raise UserError(f"{folder}: another checkpoint or scheme has the name {name}; rename the folder")
        check_packed_from(open_model(folder), of_model, str(path))
        models[name] = StreamedModel(folder, "bfloat16", "cuda", options.trust_remote_code)
    return models


def timed_layers(options: TimeOptions, known: list[int]) -> list[int]:
    """The layers that are asked for; `UserError` for one that has no experts."""
    unknown = sorted(set(options.layers) - set(known))
    if unknown:
        raise UserError(f"--layers: layer {unknown[0]} has no experts; those of {options.model} are {known}")
    return sorted(set(options.layers)) or known


def compile_kernels(options: TimeOptions, architecture: "Architecture") -> None:
    """Whatever the checkpoints' layers will launch, several kernels at a time."""
    from mxmoe_steps.inference.build import checkpoint_kernels
    from mxmoe_steps.kernels.together import build_together

    found = (kernel for folder in options.checkpoints for kernel in checkpoint_kernels(folder, architecture))
    build_together(found, options.threads)


def time_layers(
    options: TimeOptions, original: "StreamedModel", models: "dict[str, StreamedModel]", routing: "Routing"
) -> dict[str, list[Any]]:
    """Columns of `tables.TIMES`."""
    from mxmoe_steps.schemes import parse_scheme
    from mxmoe_steps.tables import TIMES
    from mxmoe_steps.timing.checkpoints import Steps, layer_times, on_kernels, under_one_scheme, usable_layers
    from mxmoe_steps.timing.timer import Timer

    layers = timed_layers(options, original.folder.moe_layers)
    makers: dict[str, Callable[[int], MoeLayer]] = {name: partial(on_kernels, model) for name, model in models.items()}
    makers |= {name: partial(under_one_scheme, original, parse_scheme(name)) for name in options.uniform}
    timer, hidden = Timer(), original.config.hidden_size
    columns: dict[str, list[Any]] = {name: [] for name in TIMES.schema.names}
    said: set[str] = set()
    for done, number in enumerate(layers, 1):
        with original.loaded(original.layer_path(number)):
            ours = usable_layers(makers, number, said)
            for tokens in sorted(set(options.tokens)) if ours else []:
                steps = Steps(routing, options.traffic_text, tokens, options.steps, hidden, options.seed)
                for index, step in enumerate(steps.of(number)):
                    asked = (options.rounds, options.repeats, options.seed)
                    found = layer_times(timer, original, ours, number, step, *asked)
                    for (checkpoint, stage), us in found.items():
                        _add(columns, checkpoint, number, tokens, index, stage, us)
        print(f"time: layer {number} ({done} of {len(layers)})", file=sys.stderr, flush=True)
    return columns


def workloads_of(options: TimeOptions, path: Path, traced: Mapping[str, Any]) -> "list[Workload]":
    """What whole models do, on the traced text; ``path``: folder of the original, ``traced``: facts of the trace."""
    import torch

    from mxmoe_steps.data.reading import TextReader
    from mxmoe_steps.extensions import load
    from mxmoe_steps.timing.throughput import workloads

    load(options.extensions)
    reader = TextReader(path, options.sources, options.seed, options.trust_remote_code)
    text = reader.read(options.traffic_text, "calibration", traced["sequences"], traced["length"])
    return workloads(torch.from_numpy(text), options.decoded, options.prefilled, options.prompt)


def time_whole(
    options: TimeOptions, path: Path, works: "list[Workload]", device: str
) -> tuple[dict[str, list[Any]], dict[str, Any]]:
    """Columns of `tables.THROUGHPUT`, and facts that go with them; ``path``: folder of the original."""
    import transformers

    from mxmoe_steps.evaluations import read_manifest
    from mxmoe_steps.inference.whole import whole_model
    from mxmoe_steps.models.families import open_model
    from mxmoe_steps.models.inventory import published
    from mxmoe_steps.tables import THROUGHPUT
    from mxmoe_steps.timing.throughput import Rounds
    from mxmoe_steps.timing.times import ORIGINAL

    sizes = {ORIGINAL: (path, published(open_model(path))["bytes_16_bit"])}
    sizes |= {folder.resolve().name: (folder, read_manifest(folder)["weights_bytes"]) for folder in options.checkpoints}
    rounds = Rounds(works, options.generated, options.rounds, options.seed)
    rounds.of(
        {
            name: (size, partial(whole_model, folder, "bfloat16", device, options.trust_remote_code))
            for name, (folder, size) in sizes.items()
        }
    )
    columns: dict[str, list[Any]] = {name: [] for name in THROUGHPUT.schema.names}
    for (name, number), ms in rounds.ms.items():
        work = works[number]
        _add(columns, name, work.phase, work.tokens, work.made, work.prompts.shape[1], ms)
    facts = {"generated": options.generated, "left_out": rounds.left_out, "together": rounds.together}
    return columns, facts | {"transformers": transformers.__version__}


def _add(columns: dict[str, list[Any]], *row: Any) -> None:
    for values, value in zip(columns.values(), row, strict=True):
        values.append(value)


def predicted_times(
    options: TimeOptions, profile: "Profile", original: "StreamedModel", timed: set[int]
) -> dict[str, dict[int, float]]:
    """Checkpoint or scheme -> tokens -> microseconds predicted for expert GEMMs, the mean over the layers that were
    timed."""
    from mxmoe_steps.evaluations import read_manifest
    from mxmoe_steps.models.families import open_model
    from mxmoe_steps.models.quantization import assignment_of
    from mxmoe_steps.timing.blocks import blocks_of
    from mxmoe_steps.timing.predict import mean_layer_us
    from mxmoe_steps.timing.traffic import sample_traffic

    blocks = blocks_of(original.folder, sizes=True, layers=timed)
    experts = dict.fromkeys(zip(blocks.layer.tolist(), blocks.expert.tolist(), strict=True))
    allocations = {
        name: {"assignment": [[*place, *[name] * 3] for place in experts], "timed_as": {}} for name in options.uniform
    }
    for folder in options.checkpoints:
        timed_as = read_manifest(folder)["allocation"]["timed_as"]
        allocation = {"assignment": assignment_of(open_model(folder).config), "timed_as": timed_as}
        allocations[folder.resolve().name] = allocation
    found: dict[str, dict[int, float]] = {name: {} for name in allocations}
    for tokens in sorted(set(options.tokens)):
        traffic = sample_traffic(options.trace, [options.traffic_text], tokens, "auto", options.steps, options.seed)
        for name, allocation in allocations.items():
            found[name][tokens] = mean_layer_us(allocation, blocks, traffic, profile)
    return found


def time(options: TimeOptions) -> None:
    """Measure, write the tables and print them."""
    from mxmoe_steps.kernels.architectures import for_capability
    from mxmoe_steps.measure import environment
    from mxmoe_steps.models.families import resolve_model
    from mxmoe_steps.models.identity import fingerprint
    from mxmoe_steps.models.streaming import StreamedModel
    from mxmoe_steps.tables import THROUGHPUT, TIMES, read_table, write_table
    from mxmoe_steps.timing.profile import read_profile
    from mxmoe_steps.timing.times import rate_table, rates, stage_table, summary
    from mxmoe_steps.timing.traffic import Routing

    gpu = environment("time")
    path = resolve_model(options.model, code=options.trust_remote_code)
    original = StreamedModel(path, "bfloat16", "cuda", options.trust_remote_code)
    of_model = fingerprint(original.folder)
    models = open_checkpoints(options, path, of_model)
    routing = Routing(options.trace)
    routing.check_texts([options.traffic_text])
    if routing.facts["model"] != of_model:
        raise UserError(f"{options.trace} is of another model than {options.model}; trace this one")
    timed_layers(options, original.folder.moe_layers)
    architecture = for_capability((gpu["capability"][0], gpu["capability"][1]))
    if architecture is not None:
        compile_kernels(options, architecture)
    profile = None if options.profile is None else read_profile(options.profile)
    works = [] if options.throughput is None else workloads_of(options, path, routing.facts)
    facts = {name: gpu[name] for name in ("cuda", "date", "device", "driver", "torch")}
    facts |= {"model": of_model, "text": options.traffic_text, "rounds": options.rounds}
    columns = time_layers(options, original, models, routing)
    more = {"compiler": gpu["compiler"], "repeats": options.repeats, "steps": options.steps}
    write_table(TIMES, options.out, columns, facts | more)
    predicted: dict[str, dict[int, float]] = {}
    if profile is not None and columns["layer"]:
        try:
            predicted = predicted_times(options, profile, original, set(columns["layer"]))
        except UserError as error:  # what was measured is worth as much
            print(f"time: nothing is predicted: {error}", file=sys.stderr)
    print(stage_table(summary(read_table(TIMES, options.out)[0].to_pylist()), predicted), file=sys.stderr)
    if options.throughput is not None:
        columns, more = time_whole(options, path, works, "cuda")
        write_table(THROUGHPUT, options.throughput, columns, facts | more)
        print(rate_table(rates(read_table(THROUGHPUT, options.throughput)[0].to_pylist())), file=sys.stderr)


def main() -> None:
    """Command line."""
    options = parse(TimeOptions, __doc__)
    written = [file for file in (options.out, options.throughput) if file is not None]
    with recorded(options.made_from, written):
        time(options)


if __name__ == "__main__":
    run_cli(main)
