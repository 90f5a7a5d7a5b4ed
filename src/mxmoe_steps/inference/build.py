"""Compile the GPU kernels that a quantized checkpoint runs; needs no GPU.

Writes a folder that is complete by itself: where ``MXMOE_KERNEL_CACHE`` names it, the checkpoint loads onto a Hopper
GPU without a compiler. Layers whose experts have no kernels are left out.
"""

import argparse
import shutil
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

from mxmoe_steps.arguments import folder_to_write, parser_for, positive
from mxmoe_steps.errors import UserError, run_cli
from mxmoe_steps.kernels.architecture import Configuration
from mxmoe_steps.kernels.architectures import DEFAULT
from mxmoe_steps.kernels.build import TOKEN_KERNELS, TokenKernel, build, runtime_library


def checkpoint_kernels(path: str) -> list[Configuration]:
    """The grouped GEMMs of a checkpoint's layers, each once."""
    from mxmoe_steps.inference.gpu import expert_modules, plan_of
    from mxmoe_steps.models.families import moe_path
    from mxmoe_steps.models.streaming import StreamedModel

    model = StreamedModel(path, "bfloat16", "cpu")
    configs: dict[str, Configuration] = {}
    for layer in model.folder.moe_layers:
        try:
            experts = expert_modules(model.model.get_submodule(moe_path(layer)), model.folder.family)
            plan = plan_of(experts, model.folder.family, model.folder.activation)
        except UserError as error:
            print(f"layer {layer}: {error}")
            continue
        for launch in (plan.gate_up, plan.down):
            configs |= {config.name: config for config in launch.kernels(DEFAULT).values()}
    return list(configs.values())


def build_checkpoint(args: argparse.Namespace) -> None:
    """Compile what is not in the cache and copy it all to ``args.out``."""
    with ProcessPoolExecutor(args.threads, get_context("spawn")) as pool:
        libraries = list(pool.map(build, [*checkpoint_kernels(args.checkpoint), *map(TokenKernel, TOKEN_KERNELS)]))
    folder = Path(args.out)
    folder.mkdir(parents=True, exist_ok=True)
    for file in (runtime_library(), *libraries):
        shutil.copy(file, folder)


def main() -> None:
    """Command line."""
    parser = parser_for(__doc__)
    parser.add_argument("--checkpoint", required=True, help="folder that the quantize step wrote")
    parser.add_argument("--threads", type=positive, default=1, help="kernels compiled at a time (default 1)")
    parser.add_argument("--out", type=folder_to_write, required=True, help="folder to write")
    build_checkpoint(parser.parse_args())


if __name__ == "__main__":
    run_cli(main)
