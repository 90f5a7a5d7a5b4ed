"""compile: the GPU kernels that `measure` launches, for the candidate schemes; needs no GPU.

Writes a folder that is complete by itself: a library per kernel, named by the hash of its configuration and of the
generator's source, and the run-time library they load. Compiled code is kept in the kernel cache as well, so a
change of the candidates compiles only what is new.
"""

import argparse
import shutil
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

from mxmoe_steps.arguments import folder_to_write, parser_for, positive
from mxmoe_steps.atomic import atomic_folder
from mxmoe_steps.errors import run_cli
from mxmoe_steps.made_from import recorded
from mxmoe_steps.schemes import parse_scheme


def compile_kernels(args: argparse.Namespace) -> None:
    """Compile whatever is not in the cache and copy it all to ``args.out``."""
    from mxmoe_steps.kernels.build import build, runtime_library
    from mxmoe_steps.timing.launches import formats_of, kernel_configs

    configs = kernel_configs(formats_of([parse_scheme(text) for text in args.schemes]))
    runtime = runtime_library()
    with ProcessPoolExecutor(args.threads, get_context("spawn")) as pool:
        libraries = list(pool.map(build, configs))
    with atomic_folder(args.out) as folder:
        for file in (runtime, *libraries):
            shutil.copy(file, folder)


def main() -> None:
    """Command line."""
    parser = parser_for(__doc__)
    parser.add_argument("--schemes", nargs="+", required=True, metavar="SCHEME")
    parser.add_argument("--threads", type=positive, default=1, help="kernels compiled at a time (default 1)")
    parser.add_argument("--out", type=folder_to_write, required=True, help="folder to write")
    args = parser.parse_args()
    with recorded(args.made_from, [args.out]):
        compile_kernels(args)


if __name__ == "__main__":
    run_cli(main)
