"""This machine's GPU, as jobs share it; no PyTorch, which takes seconds to start."""

import subprocess
from pathlib import Path

_ASK = ["nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits"]


def has_gpu() -> bool:
    """Whether this machine seems to have an NVIDIA GPU."""
    return any(Path("/dev").glob("nvidia[0-9]*"))


def gpu_memory() -> int:
    """MiB of this machine's GPU, of the smallest if it has several; 1 if they are not told, so that jobs take turns."""
    try:
        said = subprocess.run(_ASK, capture_output=True, text=True, timeout=30, check=True).stdout
        return min(int(line) for line in said.splitlines())
    except (OSError, ValueError, subprocess.SubprocessError):
        return 1
