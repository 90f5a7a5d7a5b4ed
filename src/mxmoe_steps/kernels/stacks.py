"""The blocks of a layer, read a batch at a time, as the stacks in kernel order that its launches take."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import groupby
from operator import attrgetter
from typing import Any

import torch

from mxmoe_steps.kernels.layouts import PAD_CHUNKS, KernelWeights, gate_and_up, kernel_weights, original_weights
from mxmoe_steps.kernels.plan import Source
from mxmoe_steps.quantizers.grid import E4M3, QuantizedWeight, concatenate
from mxmoe_steps.quantizers.hadamard import rotate

Place = tuple[int, str]  # expert, `SHARED` for the shared one, and block kind
Blocks = QuantizedWeight | torch.Tensor  # of one scheme and shape, [count, N, K]
# Batches of blocks, those of a batch of one scheme and shape, to their weights, batch after batch. What makes these may
# be ahead of who takes them.
Read = Callable[[Sequence[Sequence[Place]]], Iterator[Blocks]]


def in_memory(weights: Mapping[Place, QuantizedWeight | torch.Tensor]) -> Read:
    """Reads blocks [N, K] that are in memory."""

    def read(batches: Sequence[Sequence[Place]]) -> Iterator[Blocks]:
        for batch in batches:
            blocks = [weights[place] for place in batch]
            packed = [block[None] for block in blocks if isinstance(block, QuantizedWeight)]  # type: ignore[index]
            yield concatenate(packed) if packed else torch.stack([b for b in blocks if isinstance(b, torch.Tensor)])

    return read


def stack(read: Read, sources: Sequence[Source], at_once: int, device: torch.device) -> KernelWeights:
    """Kernel order of ``sources``, blocks of one format, on ``device``; ``at_once`` entries of them are arranged
    together, where those are of one scheme and shape."""
    parts = list(_arranged(read, sources, at_once))
    first = parts[0]
    data = [part.data.to(device) for part in parts]
    if first.format.decoded:
        pad = PAD_CHUNKS * first.format.chunk_bytes
        data = [*(each[:-pad] for each in data), data[0].new_zeros(pad)]
    scales = None
    if first.channel_scales is not None:
        scales = torch.cat([part.channel_scales.to(device) for part in parts if part.channel_scales is not None])
    entries = sum(part.entries for part in parts)
    return KernelWeights(first.format, entries, first.out_features, first.in_features, torch.cat(data), scales)


def _arranged(read: Read, sources: Sequence[Source], at_once: int) -> Iterator[KernelWeights]:
    """`stack` in parts."""
    batches = list(_batches(sources, at_once))
    weights = read([kind for batch in batches for kind in zip(*map(_places, batch), strict=True)])
    for first, *_ in batches:
        entries = _entries([next(weights) for _ in _places(first)], first)
        if isinstance(entries, torch.Tensor):
            yield original_weights(entries.bfloat16())
        else:
            yield kernel_weights(entries)


def _batches(sources: Sequence[Source], at_once: int) -> Iterator[list[Source]]:
    """Neighbours that are cut alike, in order."""
    for (_, entries, _, _), alike in groupby(sources, attrgetter("scheme", "entries", "padding", "rotate")):
        left = list(alike)
        count = max(1, at_once // entries)
        yield from (left[first : first + count] for first in range(0, len(left), count))


def _places(source: Source) -> list[Place]:
    """The blocks that it is made of."""
    kinds = ("gate", "up") if source.block == "gate_up" else (source.block,)
    return [(source.expert, kind) for kind in kinds]


def _entries(weights: list[Blocks], source: Source) -> Blocks:
    """Blocks like ``source``, or their gates and their ups, cut into entries along their inner width: rows of gate and
    up, columns of down."""
    count = source.entries

    def cut(values: torch.Tensor) -> torch.Tensor:
        if source.block != "down":
            return values.unflatten(1, (count, -1)).flatten(0, 1)
        if values.shape[2] == 1:  # one scale for all columns
            return values.repeat_interleave(count, 0)
        return values.unflatten(2, (count, -1)).transpose(1, 2).flatten(0, 1)

    weights = [_filled(weight, source.block, source.padding) for weight in weights]
    if source.rotate:
        weights = [rotate(weight.float()).bfloat16() for weight in weights if isinstance(weight, torch.Tensor)]

    def entries(part: Callable[[Any], torch.Tensor]) -> torch.Tensor:
        parts = [cut(part(weight)) for weight in weights]
        return parts[0] if len(parts) == 1 else gate_and_up(*parts)

    first = weights[0]  # up has the same scheme
    if isinstance(first, torch.Tensor):
        return entries(lambda weight: weight)
    zeros = None if first.zeros is None else entries(attrgetter("zeros"))
    codes, scales = entries(attrgetter("codes")), entries(attrgetter("scales"))
    return QuantizedWeight(first.scheme, codes, scales, zeros)


def _filled(weight: Blocks, block: str, count: int) -> Blocks:
    """``weight`` with ``count`` features of zeros more: rows of gate and up, columns of down."""

    def fill(values: torch.Tensor, more: int = count) -> torch.Tensor:
        stored = values.view(torch.uint8) if values.dtype == E4M3 else values  # no e4m3 pad
        rows_or_columns = (0, more) if block == "down" else (0, 0, 0, more)
        return torch.nn.functional.pad(stored, rows_or_columns).view(values.dtype)

    if not count:
        return weight
    if isinstance(weight, torch.Tensor):
        return fill(weight)
    more, features = count, weight.codes.shape[-1]
    if block == "down":
        group = weight.scheme.group
        more = 0 if group == -1 else -(-(features + count) // group) - weight.scales.shape[-1]
    zeros = None if weight.zeros is None else fill(weight.zeros, more)
    return QuantizedWeight(weight.scheme, fill(weight.codes), fill(weight.scales, more), zeros)
