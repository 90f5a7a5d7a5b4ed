"""Packed blocks on their way to a device: from wherever their parts lie to stacks of weights there.

Parts lie in mapped files as a rule, whose pages come when they are touched. Threads copy them into pinned memory, a
batch of blocks ahead of the GPU, which fetches it in one piece and unpacks it while the next one is read.
"""

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch

from mxmoe_steps.kernels.stacks import Blocks, Place, Read
from mxmoe_steps.models.packed import StoredBlock, check_of_part
from mxmoe_steps.quantizers.grid import from_tensors

THREADS = min(8, os.cpu_count() or 1)
_AHEAD = 2  # batches that are being read while one is used

Parts = Mapping[str, Sequence[torch.Tensor]]  # of the blocks of a batch


def reader(blocks: Mapping[Place, StoredBlock], device: torch.device) -> Read:
    """Reads ``blocks`` for `MoeLayer`; `BadNumbersError` names one with a part that means no numbers."""

    def read(batches: Sequence[Sequence[Place]]) -> Iterator[Blocks]:
        stored = [[blocks[place] for place in batch] for batch in batches]
        for batch, stacks in zip(stored, stacked(map(_parts, stored), device), strict=True):
            _check(batch, stacks)
            scheme, features = batch[0].scheme, batch[0].in_features
            yield stacks["weight"] if "weight" in stacks else from_tensors(scheme, features, stacks)

    return read


def _parts(blocks: Sequence[StoredBlock]) -> Parts:
    """What their weights are made of; those that are not packed, in the precision of the first."""
    parts = {name: part.dtype for name, part in blocks[0].parts.items() if name != "bias"}
    return {name: [block.parts[name].to(dtype) for block in blocks] for name, dtype in parts.items()}


def _check(batch: Sequence[StoredBlock], stacks: Mapping[str, torch.Tensor]) -> None:
    """All parts where their stacks are: the device is waited for once."""
    checks = [(stack, check_of_part(batch[0].scheme, part, stack)) for part, stack in stacks.items()]
    bad = [check(stack).any() for stack, check in checks if check is not None]
    if bool(torch.stack(bad).any()):
        for block in batch:
            block.check()


def stacked(batches: Iterable[Parts], device: torch.device) -> Iterator[dict[str, torch.Tensor]]:
    """Every part's tensors, of one shape and type, as one tensor [count, ...] on ``device``, batch after batch."""
    with ThreadPoolExecutor(THREADS) as pool:
        ahead: deque[Callable[[], dict[str, torch.Tensor]]] = deque()
        for batch in batches:
            ahead.append(_fetched(batch, device, pool))
            if len(ahead) > _AHEAD:
                yield ahead.popleft()()
        while ahead:
            yield ahead.popleft()()


def _fetched(batch: Parts, device: torch.device, pool: ThreadPoolExecutor) -> Callable[[], dict[str, torch.Tensor]]:
    """Starts to read a batch; the result waits for it and has it on ``device``."""
    if next(iter(batch.values()))[0].device.type != "cpu":
        return lambda: {part: torch.stack(list(tensors)).to(device) for part, tensors in batch.items()}
    pinned = device.type == "cuda"
    staged = {
        part: torch.empty(len(tensors), *tensors[0].shape, dtype=tensors[0].dtype, device="cpu", pin_memory=pinned)
        for part, tensors in batch.items()
    }
    copies = [
        copy for part, tensors in batch.items() for copy in zip(_bytes(staged[part]), map(_bytes, tensors), strict=True)
    ]
    started = [pool.submit(_copy, copies[first::THREADS]) for first in range(THREADS)]

    def on_device() -> dict[str, torch.Tensor]:
        for copying in started:
            copying.result()
        return {part: stack.to(device, non_blocking=True) for part, stack in staged.items()}

    return on_device


def _bytes(tensor: torch.Tensor) -> "np.ndarray[tuple[int, ...], np.dtype[np.uint8]]":
    return tensor.view(torch.uint8).numpy()


def _copy(copies: Iterable[tuple[np.ndarray, np.ndarray]]) -> None:
    """Not by PyTorch, each of whose calls would start threads of its own."""
    for target, source in copies:
        np.copyto(target, source)
