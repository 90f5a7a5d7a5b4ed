"""The checked configuration, its points, and the params that decide when a job runs again.

Each rule has two kinds of params. `flags` holds the step's options as one canonical text: the command
line and the record that Snakemake compares are the same thing. `stamps` name the code the step uses.
Nothing else of the configuration reaches a step.
"""

import re
import shlex
from pathlib import Path

from snakemake.exceptions import WorkflowError
from snakemake.utils import update_config

from mxmoe_steps.atomic import canonical_json
from mxmoe_steps.config import decoder_layers, load_config, points
from mxmoe_steps.errors import UserError
from mxmoe_steps.existence import timed_as
from mxmoe_steps.provenance import stamps
from mxmoe_steps.timing.launches import kernel_hashes
from mxmoe_steps.values import exact, typed
from mxmoe_steps.quantizers.method import QUANTIZERS

update_config(config, typed(workflow.config_settings.config))
try:
    CONFIG = load_config(config, "the configuration")
except UserError as error:
    raise WorkflowError(str(error))

MODEL = CONFIG.model.name
POINTS = {point.name: point for point in points(CONFIG)}
FRONTIERS = {point.frontier: point for point in POINTS.values()}
OUT = f"results/{MODEL}"
PROFILED = sorted(
    {
        *(timed_as(CONFIG).get(scheme, scheme) for scheme in CONFIG.calibrate.schemes),
        "w16a16",
    }
)


wildcard_constraints:
    quantizer="|".join(map(re.escape, QUANTIZERS)),
    scheme=r"w\d+a\d+[a-z0-9_-]*",
    frontier="|".join(map(re.escape, sorted(FRONTIERS))),
    point="|".join(map(re.escape, sorted(POINTS))),
    border=r"\d+",


def model_files():
    """What a local model is made of; nothing for a model of the hub."""
    folder = Path(CONFIG.model.path)
    return [
        str(file)
        for pattern in ("*.json", "*.safetensors")
        for file in sorted(folder.glob(pattern))
    ]


def measurements_of(hardware):
    """Shipped measurements of a named GPU; nothing where only its data sheet is known."""
    return [
        str(file)
        for file in sorted(Path("resources/profiles").glob(f"{hardware}.parquet"))
    ]


def require_gpu():
    """Stop before any job if this machine is to be measured and has no GPU; cluster jobs find theirs."""
    if not list(Path("/dev").glob("nvidia[0-9]*")) and workflow.local_exec:
        raise WorkflowError(
            "profile.hardware: local measures this machine's GPU, and it has none:"
            " name a GPU of resources/profiles instead, e.g. h100"
        )


def text_files(names):
    """Local files among the text sources that ``names`` need."""
    sources = [CONFIG.texts[name] for name in sources_of(names)]
    return [
        file
        for source in sources
        for key in ("files", "test_files")
        for file in source.get(key, [])
    ]


def sources_of(names):
    """Names of text sources with the parts of mixes."""
    return sorted(
        {
            *names,
            *(part for name in names for part in CONFIG.texts[name].get("mix", [])),
        }
    )


def part_borders():
    """Layers at which a job of `trace` or `capture` hands over to the next; none when one job does it all."""
    step = CONFIG.runtime.layers_per_job
    return [] if step is None else list(range(step, decoder_layers(CONFIG.model), step))


def flags(**options):
    """Command-line options in a fixed order.

    A list becomes several words after its option, a tuple repeats the option, True is the option alone;
    None, False and empty values become nothing.
    """
    words = []
    for name, value in sorted(options.items()):
        if value is None or value is False or value == []:
            continue
        for one in value if isinstance(value, tuple) else (value,):
            words.append("--" + name.replace("_", "-"))
            if one is not True:
                words += [
                    str(word) for word in (one if isinstance(one, list) else [one])
                ]
    return shlex.join(words)


def model_flags():
    """Which model and how to run it."""
    runtime = CONFIG.runtime
    return {
        "model": CONFIG.model.path,
        "dtype": CONFIG.model.dtype,
        "trust_remote_code": CONFIG.model.trust_remote_code,
        "device": runtime.device,
        "threads": runtime.threads,
        "batch": runtime.batch,
        "seed": runtime.seed,
    }


def text_flags(names, section):
    """The text sources that ``names`` need, and how much of each."""
    sources = {name: CONFIG.texts[name] for name in sources_of(names)}
    return {
        "sources": canonical_json(sources),
        "sequences": section.sequences,
        "length": section.length,
    }


def allocation_flags():
    """What every allocation may choose from."""
    solve = CONFIG.solve
    return {
        "candidates": [
            *CONFIG.calibrate.schemes,
            *(["w16a16"] if solve.keep_original else []),
        ],
        "scope": solve.scope,
        "fix": tuple(solve.fix),
        "min_bits": tuple(solve.min_bits),
        "max_schemes": solve.max_schemes,
        "tie_gate_up": solve.tie_gate_up,
    }


def frontier_flags(point):
    """The allocation problem of one frontier."""
    solve = CONFIG.solve
    return flags(
        **allocation_flags(),
        budget_bits=exact(point.budget_bits),
        tokens=point.tokens,
        granularity=point.granularity,
        metric=solve.metric,
        traffic_text=solve.traffic,
        time_as=tuple(solve.time_as),
        seed=CONFIG.runtime.seed,
    )
