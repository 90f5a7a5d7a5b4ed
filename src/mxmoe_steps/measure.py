"""measure: times of grouped GEMM launches on this machine's GPU.

Every tile of every scheme at full occupancy, and random whole problems of one scheme and of mixtures, decode and
prefill kernels, mixtures also as one launch per scheme. `profile` fits the time model to the table. On a GPU that
the kernels do not run on, the table is empty and `profile` writes the data-sheet estimate.
"""

import argparse
import os
import sys
from pathlib import Path
from typing import Any

from mxmoe_steps.arguments import file_to_write, parser_for, positive
from mxmoe_steps.errors import UserError, run_cli
from mxmoe_steps.made_from import recorded


def has_gpu() -> bool:
    """Whether this machine seems to have an NVIDIA GPU; no PyTorch."""
    return any(Path("/dev").glob("nvidia[0-9]*"))


def environment() -> dict[str, Any]:
    """The GPU and the versions; `UserError` if there is no GPU."""
    import subprocess
    from datetime import date

    import torch

    from mxmoe_steps.kernels.build import COMPILER

    if not torch.cuda.is_available():
        raise UserError(
            "measure needs a CUDA GPU and this machine has none: run it on a machine with one, or set"
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


def measure(args: argparse.Namespace) -> None:
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
        write_table(MEASUREMENTS, args.out, columns, facts)
        return
    if args.kernels:
        os.environ["MXMOE_KERNEL_CACHE"] = args.kernels
    import torch

    from mxmoe_steps.timing.gpu import Bench, Job

    torch.manual_seed(0)
    formats = formats_of([parse_scheme(text) for text in args.schemes])
    jobs = [Job(launch, phase) for launch, phase in tile_launches(formats, facts["sms"])]
    for launch in problem_launches(formats, args.problems):
        for phase in architecture.phases:
            jobs.append(Job(launch, phase))
            if launch.mixed:
                jobs.append(Job(launch, phase, apart=True))
    times, clocks = Bench(jobs).measure(args.rounds, args.repeats)
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
        "repeats": args.repeats,
        "rounds": args.rounds,
    }
    write_table(MEASUREMENTS, args.out, columns, facts)


def main() -> None:
    """Command line."""
    parser = parser_for(__doc__)
    parser.add_argument("--schemes", nargs="+", required=True, metavar="SCHEME")
    parser.add_argument("--kernels", help="folder that compile wrote (default: the kernel cache)")
    parser.add_argument(
        "--problems", type=positive, default=200, help="random problems of one scheme, and as many mixed"
    )
    parser.add_argument("--rounds", type=positive, default=5, help="times that every launch is visited (default 5)")
    parser.add_argument(
        "--repeats", type=positive, default=3, help="replays that count at each visit, by their median (default 3)"
    )
    parser.add_argument("--out", type=file_to_write, required=True, help="parquet file to write")
    args = parser.parse_args()
    with recorded(args.made_from, [args.out]):
        measure(args)


if __name__ == "__main__":
    run_cli(main)
