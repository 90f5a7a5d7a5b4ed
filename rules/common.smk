"""The checked configuration, its points, and what decides whether a job runs again.

Everything that decides a result's bytes stands in the params of its job: `stamps` name the code that the step uses,
`flags` is the step's options as one canonical text (the command line and the record are the same thing), `model` and
`texts` are hashes of contents, and `made_from` is a digest of all that and of the results that the step reads.
Nothing else of the configuration reaches a step.

Times of files decide nothing. Whether a result that Snakemake does not remember, or that was replaced or damaged, is
what is asked for is told by the record beside it (`mxmoe_steps.made_from`).
"""

import json
import re
import shlex
import sys
import time
from functools import cache
from pathlib import Path

from snakemake.exceptions import WorkflowError
from snakemake.utils import update_config

from mxmoe_steps.atomic import canonical_json, write_json
from mxmoe_steps.config import decoder_layers, load_config, points
from mxmoe_steps.errors import UserError
from mxmoe_steps.existence import timed_as
from mxmoe_steps.job_memory import Sizes, job_memory
from mxmoe_steps.made_from import Hashes, Results
from mxmoe_steps.measure import has_gpu
from mxmoe_steps.models.families import PACKED_MODULES, describe_model, is_local
from mxmoe_steps.provenance import stamps
from mxmoe_steps.quantizers.method import QUANTIZERS, Method
from mxmoe_steps.timing.estimate import measured_file, read_hardware
from mxmoe_steps.timing.sources import kernel_hashes
from mxmoe_steps.values import exact, typed

update_config(config, typed(workflow.config_settings.config))
STATE = Path(".snakemake/mxmoe")
PINNED = STATE / "model.json"  # one commit of a hub model for all jobs of a run
try:
    CONFIG = load_config(config, " and ".join(map(str, workflow.configfiles)))
    asked = CONFIG.model.path
    if not workflow.is_main_process:
        asked = json.loads(PINNED.read_text(encoding="utf-8")).get(asked, asked)
    MODEL_PATH, DESCRIBED = describe_model(asked)
    if workflow.is_main_process:
        write_json(PINNED, {CONFIG.model.path: MODEL_PATH})
except UserError as error:
    raise WorkflowError(str(error))

# Steps run with the interpreter that runs Snakemake, whatever the PATH of a shell or of a cluster's node.
shell.prefix(
    f'set -euo pipefail; python() {{{{ {shlex.quote(sys.executable)} "$@"; }}}}; '
)

MODEL = CONFIG.model.name
OUT = f"results/{MODEL}"
SCHEMES = sorted(CONFIG.calibrate.schemes)
POINTS = {point.name: point for point in points(CONFIG)}
FRONTIERS = {point.frontier: point for point in POINTS.values()}
CALIBRATED = sorted({point.quantizer for point in POINTS.values()})
DRAWN = CONFIG.sweep[0].quantizer[0]
PROFILED = sorted(
    {*(timed_as(CONFIG).get(scheme, scheme) for scheme in SCHEMES), "w16a16"}
)

HASHES = Hashes(STATE / "hashes.json")
RESULTS = Results(HASHES)


wildcard_constraints:
    quantizer="|".join(map(re.escape, QUANTIZERS)),
    scheme=r"w\d+a\d+[a-z0-9_-]*",
    frontier="|".join(map(re.escape, sorted(FRONTIERS))),
    point="|".join(map(re.escape, sorted(POINTS))),
    border=r"\d+",


@cache
def reasons():
    """Two inputs of every job, which is older than neither, so that each makes it run unless it is `ancient`.

    Snakemake takes a file whose content it has seen for unchanged, so the first one acts only on results that it does
    not remember; for those that it does it compares params, and says which have changed.
    """
    other = STATE / "made_from_something_else"
    changed = STATE / "not_as_its_step_wrote_it"
    if workflow.is_main_process:
        other.write_text("touched" if workflow.touch else "made")
        changed.write_text(str(time.time_ns()))
    return {"other": str(other), "changed": str(changed)}


def remade_if_wrong(output):
    """Input function of a job: what makes it run where its result is not the one that is asked for."""
    return lambda wildcards: [
        file if RESULTS.state(output.format(**wildcards)) == state else ancient(file)
        for state, file in reasons().items()
    ]


def kept(*outputs):
    """Results as inputs: their times count only where they are made again, or where a run is told to make some."""
    forced = workflow.dag_settings.forcerun
    return [
        ancient(output) if RESULTS.settled(output) and not forced else output
        for output in outputs
    ]


def upstream(*outputs):
    """Input function: `kept` of the same results for every job."""
    return lambda wildcards: kept(*outputs)


def made_from(output):
    """Param function of a job: digest of all that its result is made from."""
    return lambda wildcards: RESULTS.key(output.format(**wildcards))


def just(value):
    """Param function for a text whose braces are no wildcards."""
    return lambda wildcards: value


def folder_of(name):
    """Param function: the folder of input files."""
    return lambda wildcards, input: str(Path(input[name][0]).parent)


def model_contents():
    """What the model computes with."""
    return contents_of_model(
        "weights",
        lambda folder: [
            *folder.sources,
            *(folder.code_files if CONFIG.model.trust_remote_code else []),
        ],
    )


def tokenizer_contents():
    """What makes tokens of text."""
    return contents_of_model("tokenizer", lambda folder: folder.tokenizer_files)


def copied_contents():
    """What a packed checkpoint takes over from the original besides weights."""
    return contents_of_model(
        "copied", lambda folder: folder.copied_files(CONFIG.model.trust_remote_code)
    )


def contents_of_model(name, files_of):
    """Hash of some files of a local model; a model of the hub has a revision."""
    if not is_local(MODEL_PATH):
        return MODEL_PATH
    return f"{name}@{HASHES.of_inputs(files_of(DESCRIBED))}"


def text_contents(names):
    """Hash of the local files among the text sources that ``names`` need."""
    sources = [CONFIG.texts[name] for name in sources_of(names)]
    files = [
        Path(file)
        for source in sources
        for key in ("files", "test_files")
        for file in source.get(key, [])
    ]
    return f"texts@{HASHES.of_inputs(files)}"


def sources_of(names):
    """Names of text sources with the parts of mixes."""
    return sorted(
        {
            *names,
            *(part for name in names for part in CONFIG.texts[name].get("mix", [])),
        }
    )


def hardware_contents(name):
    """What is known of a GPU: hash of its measurements, or its data sheet; nothing of this machine's."""
    if name == "local":
        return None
    file = measured_file(name)
    return (
        f"measurements@{HASHES.whole(file)}"
        if file
        else canonical_json(read_hardware(name))
    )


@cache
def memory_of_steps():
    """Step -> MiB of memory that one of its jobs needs."""
    sections = (CONFIG.trace, CONFIG.calibrate, CONFIG.evaluate)
    return job_memory(
        Sizes.of(DESCRIBED),
        element=4 if CONFIG.model.dtype == "float32" else 2,
        run_tokens=CONFIG.runtime.batch * max(section.length for section in sections),
        calibration_tokens=CONFIG.calibrate.sequences * CONFIG.calibrate.length,
    )


def memory(step):
    """Resource function of a job: its memory, and as much again at each new attempt."""
    return lambda wildcards, attempt: attempt * memory_of_steps()[step]


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
            words.append(f"--{name}".replace("_", "-"))
            if one is not True:
                words += [
                    str(word) for word in (one if isinstance(one, list) else [one])
                ]
    return shlex.join(words)


def model_flags():
    """Which model and how to run it."""
    runtime = CONFIG.runtime
    return {
        "model": MODEL_PATH,
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
            *SCHEMES,
            *(["w16a16"] if solve.keep_original else []),
        ],
        "scope": solve.scope,
        "fix": tuple(solve.fix),
        "min_bits": tuple(solve.min_bits),
        "max_schemes": solve.max_schemes,
        "tie_gate_up": solve.tie_gate_up,
    }


def calibrate_flags(quantizer):
    """How weights are quantized."""
    return flags(
        model=MODEL_PATH,
        damping=CONFIG.calibrate.damping if Method(quantizer).gptq else None,
        device=CONFIG.runtime.device,
        threads=CONFIG.runtime.threads,
        seed=CONFIG.runtime.seed,
    )


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


def solve_flags(point):
    """What one point asks of its frontier."""
    return flags(**{point.goal: point.value})


def drawn_frontiers():
    """Frontiers of the report that a solver had to find: a uniform one is a list of schemes."""
    return [
        name
        for name, point in FRONTIERS.items()
        if point.quantizer == DRAWN and point.granularity != "uniform"
    ]
