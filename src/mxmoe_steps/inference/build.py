"""Compile the GPU kernels that a quantized checkpoint runs; needs no GPU.

Writes a folder that is complete by itself: where ``MXMOE_KERNEL_CACHE`` names it, the checkpoint loads onto a GPU of
`--target` without a compiler. Layers whose experts have no kernels there are left out.
"""

import shutil
from pathlib import Path
from typing import Annotated

from pydantic import Field

from mxmoe_steps.errors import UserError, run_cli
from mxmoe_steps.kernels.architecture import Architecture
from mxmoe_steps.kernels.architectures import DEFAULT, for_target
from mxmoe_steps.kernels.build import Kernel, TokenKernel, runtime_library
from mxmoe_steps.kernels.together import build_together
from mxmoe_steps.options.base import Flag, InFolder, OutFolder, StepOptions, Threads
from mxmoe_steps.options.command_line import parse
from mxmoe_steps.options.target import Target


def checkpoint_kernels(path: Path, architecture: Architecture) -> list[Kernel]:
    """The kernels of a checkpoint's layers, each once."""
    from mxmoe_steps.inference.gpu import kernel_blocks, plan_of
    from mxmoe_steps.models.gating import kernel_gating
    from mxmoe_steps.models.streaming import StreamedModel

    model = StreamedModel(path, "bfloat16", "cpu")
    gating = kernel_gating(model.folder.family, model.folder.text)
    kernels: dict[str, Kernel] = {name: TokenKernel(name, architecture) for name in architecture.token_kernels}
    for layer in model.folder.moe_layers:
        try:
            blocks = kernel_blocks(model.moe(layer), model.folder.family, f"layer {layer}")
            plan = plan_of(blocks, model.folder.family, gating)
            plan.check(architecture)
        except UserError as error:
            print(f"layer {layer}: {error}")
            continue
        kernels |= {name: TokenKernel(name, architecture) for name in plan.token_kernels}
        for launch in (plan.gate_up, plan.down):
            kernels |= {config.name: config for config in launch.kernels(architecture).values()}
    return list(kernels.values())


class BuildOptions(StepOptions):
    """Options of the command."""

    checkpoint: InFolder = Field(description="folder that the quantize step wrote")
    target: Target = Field(DEFAULT.target, description="GPUs to compile for, e.g. sm_86")
    threads: Annotated[Threads, Flag("THREADS", decides=False)] = Field(1, description="kernels compiled at a time")
    out: OutFolder = Field(description="folder to write")


def build_checkpoint(options: BuildOptions) -> None:
    """Compile what is not in the cache and copy it all to ``options.out``."""
    architecture = for_target(options.target)
    assert architecture is not None  # the option is checked
    kernels = checkpoint_kernels(options.checkpoint, architecture)
    libraries = build_together(kernels, options.threads)
    options.out.mkdir(parents=True, exist_ok=True)
    for file in (runtime_library(), *libraries):
        shutil.copy(file, options.out)


def main() -> None:
    """Command line."""
    build_checkpoint(parse(BuildOptions, __doc__))


if __name__ == "__main__":
    run_cli(main)
