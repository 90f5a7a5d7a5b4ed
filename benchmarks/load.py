"""Time to load a packed checkpoint in transformers beside the time that its bytes take.

    python benchmarks/generate.py --build                       # compile the kernels; needs no GPU
    python benchmarks/load.py --device cuda --out load.json     # w4a16 of generate.py, written first
    python benchmarks/load.py --checkpoint FOLDER --device cpu
    python benchmarks/load.py --show load.json                  # the table again

read       every byte of the files into memory, by as many threads as the loader has
tensors    all tensors onto the device as they are, by safetensors, one file after another
load       load_quantized(FOLDER, device, bfloat16), until every weight is in its place

Cold: the files are dropped from the page cache before (posix_fadvise, which tmpfs ignores). Warm: they have been
read just before. Each figure is taken in a process of its own, imports and the start of CUDA left out, and is the
median over rounds. vLLM's loader is timed by ``benchmarks/serving.py --parts load``.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

MEASURES = ("read", "tensors", "load")
STATES = ("cold", "warm")
PIECE = 1 << 24  # bytes of a read


def files_of(checkpoint: Path) -> list[Path]:
    return sorted(checkpoint.glob("*.safetensors"))


def drop(checkpoint: Path) -> None:
    """The files from the page cache."""
    for file in files_of(checkpoint):
        with file.open("rb") as stream:
            os.fsync(stream.fileno())
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def read(checkpoint: Path, device: str = "") -> None:
    """All bytes, a piece at a time."""
    from mxmoe_steps.inference.reading import THREADS

    def pieces(file: Path, first: int) -> None:
        buffer = bytearray(PIECE)
        with file.open("rb", buffering=0) as stream:
            size = file.stat().st_size
            for start in range(first * PIECE, size, THREADS * PIECE):
                stream.seek(start)
                stream.readinto(buffer)

    with ThreadPoolExecutor(THREADS) as pool:
        for file in files_of(checkpoint):
            list(pool.map(pieces, [file] * THREADS, range(THREADS)))


def tensors(checkpoint: Path, device: str) -> None:
    """Each is touched, since files are mapped."""
    from safetensors.torch import load_file

    for file in files_of(checkpoint):
        loaded = load_file(file, device)
        if device == "cpu":
            loaded = {name: tensor.clone() for name, tensor in loaded.items()}
        del loaded


def load(checkpoint: Path, device: str) -> None:
    import mxmoe_steps

    mxmoe_steps.load_quantized(checkpoint, device, "bfloat16")


def measure_one(measure: str, state: str, checkpoint: Path, device: str) -> dict[str, float]:
    """Seconds, and GB at the peak on a GPU."""
    import torch

    import mxmoe_steps.inference.plugin  # noqa: F401

    gpu = device.startswith("cuda")
    if gpu:
        torch.zeros(1, device=device)
        torch.cuda.reset_peak_memory_stats()
    if state == "cold":
        drop(checkpoint)
    else:
        read(checkpoint)
    start = time.perf_counter()
    {"read": read, "tensors": tensors, "load": load}[measure](checkpoint, device)
    if gpu:
        torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    return {"s": seconds} | ({"GB": torch.cuda.max_memory_allocated() / 1e9} if gpu else {})


def show(results: dict[str, Any]) -> None:
    """Seconds, GB/s, and load as a multiple of the others."""
    size = results["bytes"] / 1e9
    print(f"{results['device']}, {results['threads']} threads, {size:.2f} GB of files")
    medians = {cell: statistics.median(one["s"] for one in rounds) for cell, rounds in results["rounds"].items()}
    for state in STATES:
        whole = medians[f"load {state}"]
        for measure in MEASURES:
            seconds = medians[f"{measure} {state}"]
            ratio = "" if measure == "load" else f"   load is {whole / seconds:.2f} times it"
            print(f"{measure:<8} {state:<5} {seconds:7.2f} s {size / seconds:7.2f} GB/s{ratio}")
    peaks = [one["GB"] for one in results["rounds"]["load warm"] if "GB" in one]
    if peaks:
        print(f"load: {max(peaks):.2f} GB of GPU memory at the peak")


def measure(checkpoint: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """All figures, in rounds."""
    import torch

    from mxmoe_steps.inference.reading import THREADS

    name = torch.cuda.get_device_name(arguments.device) if arguments.device.startswith("cuda") else "cpu"
    size = sum(file.stat().st_size for file in files_of(checkpoint))
    rounds: dict[str, list[dict[str, float]]] = {}
    for _ in range(arguments.rounds):
        for state in STATES:
            for one in MEASURES:
                command = [sys.executable, __file__, "--one", one, state, "--checkpoint", checkpoint]
                command += ["--device", arguments.device]
                done = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True)
                figures = json.loads(done.stdout.splitlines()[-1])
                rounds.setdefault(f"{one} {state}", []).append(figures)
                print(one, state, figures, flush=True)
    return {"device": name, "threads": THREADS, "bytes": size, "rounds": rounds}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, help="a packed one, by default w4a16 of generate.py")
    parser.add_argument("--layers", type=int, default=24, help="of that one")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, help="write the figures as JSON")
    parser.add_argument("--show", type=Path, metavar="JSON", help="print what --out has written and stop")
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)  # what a process of its own does
    arguments = parser.parse_args()
    if arguments.show:
        show(json.loads(arguments.show.read_text()))
        return
    if arguments.one:
        print(json.dumps(measure_one(*arguments.one, arguments.checkpoint, arguments.device)))
        return
    with tempfile.TemporaryDirectory() as temporary:
        checkpoint = arguments.checkpoint
        if checkpoint is None:
            from generate import write_checkpoint

            checkpoint = Path(temporary)
            write_checkpoint("w4a16", checkpoint, arguments.layers)
        results = measure(checkpoint, arguments)
    if arguments.out:
        arguments.out.write_text(json.dumps(results, indent=1))
    show(results)


if __name__ == "__main__":
    main()
