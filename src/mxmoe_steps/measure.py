"""measure: times of grouped GEMM launches on this machine's GPU.

Every tile of every scheme at full occupancy, and random whole problems of one scheme and of mixtures, decode and
prefill kernels, mixtures also as one launch per scheme. `profile` fits the time model to the table. On a GPU that
the kernels do not run on, the table is empty and `profile` writes the data-sheet estimate.
"""

import os
import sys
from typing import Any

from pydantic import Field

from mxmoe_steps.errors import UserError, run_cli
from mxmoe_steps.made_from import recorded
from mxmoe_steps.options.base import Count, InFolder, OutFile, Schemes, StepOptions
from mxmoe_steps.options.command_line import parse


class MeasureOptions(StepOptions):
    """Options of the step."""

    schemes: Schemes = Field(description="schemes whose kernels to measure")
    kernels: InFolder | None = Field(None, description="folder that compile wrote (default: the kernel cache)")
    problems: Count = Field(200, description="random problems of one scheme, and as many mixed")
    rounds: Count = Field(5, description="times that every launch is visited")
    repeats: Count = Field(3, description="replays that count at each visit, by their median")
    out: OutFile = Field(description="parquet file to write")


def environment(step: str = "measure") -> dict[str, Any]:
    """The GPU and the versions; `UserError`, for that step, if there is no GPU."""
    import subprocess
    from datetime import date

    import torch

    from mxmoe_steps.kernels.build import COMPILER

    if not torch.cuda.is_available():
        raise UserError(
            f"{step} needs a CUDA GPU and this machine has none: run it on a machine with one, or set"
            " profile.hardware to a known GPU, e.g. h100"
        )
    properties = torch.cuda.get_device_properties(0)
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0"]
    try:
        driver = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    except OSError:
        driver = ""
    return {
        "capability": [properties.major, properties.minor],
        "compiler": f"nvidia-cutlass-dsl {COMPILER}",
        "cuda": torch.version.cuda,
        "date": date.today().isoformat(),
        "device": properties.name,
        "driver": driver,
        "sms": properties.multi_processor_count,
        "torch": torch.__version__,
    }


def measure(options: MeasureOptions) -> None:
    """Measure and write the table."""
    from mxmoe_steps.kernels.architectures import CAPABILITIES, for_capability
    from mxmoe_steps.schemes import parse_scheme
    from mxmoe_steps.tables import MEASUREMENTS, write_table
    from mxmoe_steps.timing.launches import formats_of, problem_launches, tile_launches
    from mxmoe_steps.timing.sources import kernel_hashes

    facts = environment()
    columns: dict[str, list[Any]] = {name: [] for name in MEASUREMENTS.schema.names}
    architecture = for_capability((facts["capability"][0], facts["capability"][1]))
    if architecture is None:
        print(
            f"measure: no kernels for {facts['device']} (compute capability {'.'.join(map(str, facts['capability']))};"
            f" they are for {CAPABILITIES}), so its times will be the estimate from its data sheet",
            file=sys.stderr,
        )
        write_table(MEASUREMENTS, options.out, columns, facts)
        return
    if options.kernels:
        os.environ["MXMOE_KERNEL_CACHE"] = str(options.kernels)
    import torch

    from mxmoe_steps.timing.gpu import Bench, Job

    torch.manual_seed(0)
    formats = formats_of([parse_scheme(text) for text in options.schemes], architecture)
    jobs = [Job(launch, phase) for launch, phase in tile_launches(architecture, formats, facts["sms"])]
    for launch in problem_launches(formats, options.problems):
        for phase in architecture.phases:
            jobs.append(Job(launch, phase))
            if launch.mixed:
                jobs.append(Job(launch, phase, apart=True))
    times, clocks = Bench(jobs, architecture).measure(options.rounds, options.repeats)
    for number, (job, us) in enumerate(zip(jobs, times, strict=True)):
        launch = job.launch
        row = {
            "number": number, "kind": launch.kind, "model": launch.model, "block": launch.block,
            "tokens": launch.tokens, "out_features": launch.n, "in_features": launch.k, "phase": job.phase,
            "apart": job.apart, "carried": [format_.name for format_ in launch.carried],
            "experts": len(launch.expert_rows), "rows": launch.rows, "schemes": launch.schemes, "us": us,
        }  # fmt: skip
        for name, values in columns.items():
            values.append(row[name])
    facts |= {
        "clocks": clocks,
        "kernels": kernel_hashes(architecture, formats),
        "repeats": options.repeats,
        "rounds": options.rounds,
    }
    write_table(MEASUREMENTS, options.out, columns, facts)


def main() -> None:
    """Command line."""
    options = parse(MeasureOptions, __doc__)
    with recorded(options.made_from, [options.out]):
        measure(options)


if __name__ == "__main__":
    run_cli(main)
