"""compile: the GPU kernels that `measure` launches, for the candidate schemes; needs no GPU.

Writes a folder that is complete by itself: a library per kernel, named by the hash of its configuration and of the
generator's source, and the run-time library they load. Compiled code is kept in the kernel cache as well, so a
change of the candidates compiles only what is new.
"""

import shutil
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Annotated

from pydantic import Field

from mxmoe_steps.atomic import atomic_folder
from mxmoe_steps.errors import run_cli
from mxmoe_steps.made_from import recorded
from mxmoe_steps.options.base import Flag, OutFolder, Schemes, StepOptions, Threads
from mxmoe_steps.options.command_line import parse
from mxmoe_steps.schemes import parse_scheme


class CompileOptions(StepOptions):
    """Options of the step."""

    schemes: Schemes = Field(description="schemes whose kernels to compile")
    threads: Annotated[Threads, Flag("THREADS", decides=False)] = Field(1, description="kernels compiled at a time")
    out: OutFolder = Field(description="folder to write")


def compile_kernels(options: CompileOptions) -> None:
    """Compile whatever is not in the cache and copy it all to ``options.out``."""
    from mxmoe_steps.kernels.build import build, runtime_library
    from mxmoe_steps.timing.launches import formats_of, kernel_configs

    configs = kernel_configs(formats_of([parse_scheme(text) for text in options.schemes]))
    runtime = runtime_library()
    with ProcessPoolExecutor(options.threads, get_context("spawn")) as pool:
        libraries = list(pool.map(build, configs))
    with atomic_folder(options.out) as folder:
        for file in (runtime, *libraries):
            shutil.copy(file, folder)


def main() -> None:
    """Command line."""
    options = parse(CompileOptions, __doc__)
    with recorded(options.made_from, [options.out]):
        compile_kernels(options)


if __name__ == "__main__":
    run_cli(main)
