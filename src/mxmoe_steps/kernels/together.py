"""Compile a layer's kernels in several processes, before it loads the first of them.

A kernel takes seconds to compile, and a layer has some fourteen. The processes start anew: a fork of a process that has
started CUDA may hang, and the other ways of multiprocessing run the user's script a second time.
"""

import logging
import os
import pickle
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import cache

from mxmoe_steps.kernels.build import Kernel, library_path

MOST_AT_ONCE = 8  # processes, of up to a gigabyte
_COMPILE = """
import pickle, sys
from mxmoe_steps.kernels.build import build
for kernel in pickle.load(sys.stdin.buffer):
    build(kernel)
"""

log = logging.getLogger("mxmoe_steps")


@cache
def compile_together(kernels: tuple[Kernel, ...]) -> None:
    """Compile those of ``kernels`` that the kernel cache lacks. What fails here is left to `build`, which says why."""
    missing = [kernel for kernel in kernels if not library_path(kernel).is_file()]
    at_once = min(len(missing) // 2, MOST_AT_ONCE, os.cpu_count() or 1)  # to start takes as long as a kernel
    if at_once < 2:
        return
    log.warning("compiling %d GPU kernels in %d processes; they are kept for the next time", len(missing), at_once)
    with ThreadPoolExecutor(at_once) as pool:
        list(pool.map(_compile_apart, (missing[first::at_once] for first in range(at_once))))


def _compile_apart(kernels: list[Kernel]) -> None:
    subprocess.run(
        [sys.executable, "-c", _COMPILE],
        input=pickle.dumps(kernels),
        env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        stderr=subprocess.DEVNULL,
        check=False,
    )
