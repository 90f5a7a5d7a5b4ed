"""The checked configuration, its points, and what decides whether a job runs again.

Everything that decides a result's bytes stands in the params of its job: `stamps` name the code that the step uses,
`flags` is the step's options as one canonical text (the command line and the record are the same thing), `model` and
`texts` are hashes of contents, and `made_from` is a digest of all that and of the results that the step reads.
Nothing else of the configuration reaches a step.

Times of files decide nothing. Whether a result that Snakemake does not remember, or that was replaced or damaged, is
what is asked for is told by the record beside it (`mxmoe_steps.made_from`).
"""

import re
import shlex
import sys
import time
from functools import cache
from pathlib import Path

from snakemake.exceptions import WorkflowError
from snakemake.utils import update_config

from mxmoe_steps.config.existence import check_shape
from mxmoe_steps.config.loading import load_config
from mxmoe_steps.config.points import points
from mxmoe_steps.errors import UserError
from mxmoe_steps.extensions import modules_of
from mxmoe_steps.made_from import Hashes, Results
from mxmoe_steps.models.families import PACKED_MODULES
from mxmoe_steps.options.command_line import flags
from mxmoe_steps.provenance import stamps
from mxmoe_steps.values import typed
from mxmoe_steps.workflow import plan
from mxmoe_steps.workflow.contents import Contents
from mxmoe_steps.workflow.gpu import gpu_memory, has_gpu

update_config(config, typed(workflow.config_settings.config))
STATE = Path(".snakemake/mxmoe")
try:
    CONFIG = load_config(config, " and ".join(map(str, workflow.configfiles)))
    MODEL_PATH, MODEL = plan.pinned_model(
        CONFIG.model.path, STATE / "model.json", workflow.is_main_process
    )
    check_shape(CONFIG, MODEL)
except UserError as error:
    raise WorkflowError(str(error))

# Steps run with the interpreter that runs Snakemake, whatever the PATH of a shell or of a cluster's node.
shell.prefix(
    f'set -euo pipefail; python() {{{{ {shlex.quote(sys.executable)} "$@"; }}}}; '
)

OUT = f"results/{CONFIG.model.name}"
SCHEMES = sorted(CONFIG.calibrate.schemes)
CANDIDATES = plan.candidates(CONFIG)
TIMED = plan.timed_schemes(CONFIG)
POINTS = {point.name: point for point in points(CONFIG)}
ALLOCATIONS = {point.allocation: point for point in POINTS.values()}
FRONTIERS = {point.frontier: point for point in POINTS.values()}
CALIBRATED = sorted({point.quantizer for point in POINTS.values()})
PART_BORDERS = plan.part_borders(CONFIG, MODEL)
MEMORY = plan.memory_of_steps(CONFIG, MODEL)
USES_GPU = CONFIG.runtime.device != "cpu" or CONFIG.profile.hardware == "local"
GPU_MEMORY = gpu_memory() if USES_GPU and workflow.local_exec and has_gpu() else 0
DOMAINS = CONFIG.domains

HASHES = Hashes(STATE / "hashes.json")
RESULTS = Results(HASHES)
CONTENTS = Contents(CONFIG, MODEL_PATH, MODEL, HASHES)


wildcard_constraints:
    domain="|".join(map(re.escape, DOMAINS)),
    quantizer="|".join(map(re.escape, CALIBRATED)),
    scheme=r"w\d+a\d+[a-z0-9_-]*",
    frontier="|".join(map(re.escape, sorted(FRONTIERS))),
    point="|".join(map(re.escape, sorted({*POINTS, *ALLOCATIONS}))),
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


def memory(step):
    """Resource function of a job: its memory, and as much again at each new attempt."""
    return lambda wildcards, attempt: attempt * MEMORY[step]


def gpu_share(step):
    """Resource function of a job: memory of this machine's GPU, of which all jobs at work have no more than it has.

    What a step needs at most it may need there. Jobs that measure time have the GPU for themselves.
    """
    if step in ("measure", "time"):
        return GPU_MEMORY
    if CONFIG.runtime.device == "cpu":
        return 0
    return lambda wildcards, attempt: min(GPU_MEMORY, attempt * MEMORY[step])


if "gpu_mb" not in workflow.global_resources:
    workflow.register_resource("gpu_mb", GPU_MEMORY)
