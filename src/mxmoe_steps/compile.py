"""compile: the GPU kernels that `measure` launches, for the candidate schemes; needs no GPU.

They are for this machine's GPU, for Hopper GPUs where it has none, or for those that `--target` names.

Writes a folder that is complete by itself: a library per kernel, named by the hash of its configuration and of the
generator's source, and the run-time library they load. Compiled code is kept in the kernel cache as well, so a
change of the candidates compiles only what is new.
"""

import shutil
from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from mxmoe_steps.atomic import atomic_folder
from mxmoe_steps.errors import run_cli
from mxmoe_steps.made_from import recorded
from mxmoe_steps.options.base import Flag, OutFolder, Schemes, StepOptions, Threads
from mxmoe_steps.options.command_line import parse
from mxmoe_steps.options.target import Target
from mxmoe_steps.schemes import parse_scheme

if TYPE_CHECKING:
    from mxmoe_steps.kernels.architecture import Architecture


class CompileOptions(StepOptions):
    """Options of the step."""

    schemes: Schemes = Field(description="schemes whose kernels to compile")
    target: Target | None = Field(
        None, description="GPUs to compile for, e.g. sm_86 (default: this machine's, Hopper if it has none)"
    )
    threads: Annotated[Threads, Flag("THREADS", decides=False)] = Field(1, description="kernels compiled at a time")
    out: OutFolder = Field(description="folder to write")


def architecture_here(target: str | None) -> "Architecture | None":
    """Those of ``target``, or of this machine's GPU, which may be one without kernels; Hopper without a GPU."""
    from mxmoe_steps.kernels.architectures import DEFAULT, for_capability, for_target

    if target is not None:
        return for_target(target)
    import torch

    return for_capability(torch.cuda.get_device_capability()) if torch.cuda.is_available() else DEFAULT


def compile_kernels(options: CompileOptions) -> None:
    """Compile whatever is not in the cache and copy it all to ``options.out``."""
    from mxmoe_steps.kernels.build import runtime_library
    from mxmoe_steps.kernels.together import build_together
    from mxmoe_steps.timing.launches import formats_of, kernel_configs

    architecture = architecture_here(options.target)
    configs = []
    if architecture is not None:
        formats = formats_of([parse_scheme(text) for text in options.schemes], architecture)
        configs = kernel_configs(architecture, formats)
    runtime = runtime_library()
    libraries = build_together(configs, options.threads)
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
