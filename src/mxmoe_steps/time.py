"""time: microseconds of the MoE layers of checkpoints on this machine's GPU, measured on traced routing.

Every layer of every checkpoint, whole and stage by stage, beside the original's experts in transformers (bfloat16, the
fastest of its implementations), in one process and interleaved. The router is left out on both sides. By hand:

    python -m mxmoe_steps.time --model MODEL --checkpoint FOLDER --trace results/NAME/trace --traffic-text TEXT \\
        --layer 11 --tokens 8192 --out times.parquet
"""

import sys
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field

from mxmoe_steps.errors import UserError, run_cli
from mxmoe_steps.made_from import recorded
from mxmoe_steps.options.base import Count, Flag, InFolder, InFolders, Natural, OutFile, StepOptions, Threads, Tokens
from mxmoe_steps.options.command_line import parse
from mxmoe_steps.options.shared import OfModel, RemoteCode, Seeded

if TYPE_CHECKING:
    from mxmoe_steps.kernels.architecture import Architecture
    from mxmoe_steps.models.streaming import StreamedModel


class TimeOptions(Seeded, OfModel, RemoteCode, StepOptions):
    """Options of the step."""

    checkpoints: InFolders = Field(description="folders that quantize wrote")
    trace: InFolder = Field(description="folder that trace wrote")
    traffic_text: Annotated[str, Flag("NAME")] = Field(description="traced text whose routing is timed")
    tokens: list[Tokens] = Field(description="tokens in a step")
    layers: list[Natural] = Field([], description="decoder layers to time (default: all that have experts)")
    steps: Count = Field(2, description="sampled steps of each number of tokens")
    rounds: Count = Field(5, description="times that every launch is visited")
    repeats: Count = Field(3, description="replays that count at each visit, by their median")
    threads: Annotated[Threads, Flag("THREADS", decides=False)] = Field(1, description="kernels compiled at a time")
    out: OutFile = Field(description="parquet file to write")


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
        if name in models or name == ORIGINAL:
            raise UserError(f"{folder}: another checkpoint has the name {name}; rename the folder")
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
    from mxmoe_steps.kernels.build import build

    found = (kernel for folder in options.checkpoints for kernel in checkpoint_kernels(folder, architecture))
    kernels = {kernel.name: kernel for kernel in found}
    with ProcessPoolExecutor(options.threads, get_context("spawn")) as pool:
        for _ in pool.map(build, kernels.values()):
            pass


def time(options: TimeOptions) -> None:
    """Measure and write the table."""
    from mxmoe_steps.kernels.architectures import for_capability
    from mxmoe_steps.measure import environment
    from mxmoe_steps.models.families import resolve_model
    from mxmoe_steps.models.identity import fingerprint
    from mxmoe_steps.models.streaming import StreamedModel
    from mxmoe_steps.tables import TIMES, write_table
    from mxmoe_steps.timing.checkpoints import Steps, layer_times, usable_layers
    from mxmoe_steps.timing.timer import Timer
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
    layers = timed_layers(options, original.folder.moe_layers)
    architecture = for_capability((gpu["capability"][0], gpu["capability"][1]))
    if architecture is not None:
        compile_kernels(options, architecture)
    timer, hidden = Timer(), original.config.hidden_size
    columns: dict[str, list[Any]] = {name: [] for name in TIMES.schema.names}
    said: set[str] = set()
    for done, number in enumerate(layers, 1):
        packed = usable_layers(models, number, said)
        if not packed:
            continue
        with original.loaded(original.layer_path(number)):
            for tokens in sorted(set(options.tokens)):
                steps = Steps(routing, options.traffic_text, tokens, options.steps, hidden, options.seed)
                for index, step in enumerate(steps.of(number)):
                    asked = (options.rounds, options.repeats, options.seed)
                    found = layer_times(timer, original, packed, number, step, *asked)
                    for (checkpoint, stage), us in found.items():
                        row = (checkpoint, number, tokens, index, stage, us)
                        for name, value in zip(TIMES.schema.names, row, strict=True):
                            columns[name].append(value)
        print(f"time: layer {number} ({done} of {len(layers)})", file=sys.stderr, flush=True)
    facts = {name: gpu[name] for name in ("compiler", "cuda", "date", "device", "driver", "torch")}
    facts |= {"model": of_model, "text": options.traffic_text, "rounds": options.rounds}
    write_table(TIMES, options.out, columns, facts | {"repeats": options.repeats, "steps": options.steps})
    print_times(columns)


def print_times(columns: dict[str, list[Any]]) -> None:
    """Microseconds of a layer by checkpoint and tokens, the mean over layers."""
    from mxmoe_steps.timing.times import ORIGINAL, WHOLE, summary

    rows = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
    found = summary(rows)
    counts = sorted({row["tokens"] for row in rows})
    print(f"{'MoE layer, us':<40}" + "".join(f"{tokens:>10}" for tokens in counts), file=sys.stderr)
    for checkpoint in sorted(found, key=lambda name: (name != ORIGINAL, name)):
        cells = (found[checkpoint].get(tokens, {}).get(WHOLE, float("nan")) for tokens in counts)
        print(f"{checkpoint:<40}" + "".join(f"{us:>10.1f}" for us in cells), file=sys.stderr)


def main() -> None:
    """Command line."""
    options = parse(TimeOptions, __doc__)
    with recorded(options.made_from, [options.out]):
        time(options)


if __name__ == "__main__":
    run_cli(main)
