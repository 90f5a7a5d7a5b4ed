"""Compile several kernels in processes of their own.

A kernel takes seconds to compile, and a layer has some fourteen. The processes start anew: a fork of a process that has
started CUDA may hang, and the other ways of multiprocessing run the user's script a second time.
"""

import logging
import os
import pickle
import subprocess
import sys
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from mxmoe_steps.kernels.build import Kernel, build, library_path

_COMPILE = """
import pickle, sys
from mxmoe_steps.kernels.build import build
for kernel in pickle.load(sys.stdin.buffer):
    build(kernel)
"""

log = logging.getLogger("mxmoe_steps")


def build_together(kernels: Iterable[Kernel], processes: int) -> list[Path]:
    """`build` of every kernel, once; of those that the cache lacks in up to so many ``processes``, of up to a
    gigabyte."""
    different = dict.fromkeys(kernels)
    missing = [kernel for kernel in different if not library_path(kernel).is_file()]
    at_once = min(len(missing) // 2, processes)  # to start takes as long as a kernel
    if at_once > 1:
        log.warning("compiling %d GPU kernels in %d processes; they are kept for the next time", len(missing), at_once)
        with ThreadPoolExecutor(at_once) as pool:
            list(pool.map(_compile_apart, (missing[first::at_once] for first in range(at_once))))
    return [build(kernel) for kernel in different]  # what failed there fails here, and says why


def _compile_apart(kernels: list[Kernel]) -> None:
    subprocess.run(
        [sys.executable, "-c", _COMPILE],
        input=pickle.dumps(kernels),
        env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        stderr=subprocess.DEVNULL,
        check=False,
    )
