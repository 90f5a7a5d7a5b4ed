"""The rotation inside kernels, emulated: lanes of warps, then threads of a block, bit for bit as `rotate`."""

import importlib.util

import pytest
import torch

from mxmoe_steps.kernels.rotation import CHUNK, span
from mxmoe_steps.quantizers.hadamard import rotate

pytestmark = pytest.mark.skipif(importlib.util.find_spec("cutlass") is None, reason="nvidia-cutlass-dsl is missing")
if importlib.util.find_spec("cutlass") is not None:
    from mxmoe_steps.kernels.hadamard import OF_WARP, PASSES, apart, butterflies
    from mxmoe_steps.kernels.rounding import VECTOR


def within_warps(row: torch.Tensor, size: int) -> torch.Tensor:
    """As `hadamard.within_warp`: ``row`` [features], eight features a lane; lanes exchange with a neighbour."""
    values = list(row.view(-1, VECTOR).unbind(1))  # register -> all lanes of all warps
    butterflies(values, VECTOR)
    lanes = torch.arange(len(row) // VECTOR)
    for step in (1, 2, 4, 8, 16):
        if step * VECTOR < size:
            sign = torch.where((lanes & step) != 0, -1.0, 1.0)
            values = [value[lanes ^ step] + sign * value for value in values]
    return torch.stack(values, 1).flatten()


def by_block(row: torch.Tensor) -> torch.Tensor:
    """A row of at most `CHUNK` features as `hadamard.ByBlock.rotate` makes it."""
    size = span(len(row))
    stored = within_warps(row, size)
    for stride, radix, least, most in PASSES:
        if least <= size <= most:
            first = torch.tensor([apart(i, stride, radix) for i in range(len(row) // radix)])
            places = first[:, None] + stride * torch.arange(radix)
            assert torch.equal(places.flatten().sort().values, torch.arange(len(row)))  # each once
            values = list(stored[places].unbind(1))
            butterflies(values, radix)
            stored = stored.scatter(0, places.flatten(), torch.stack(values, 1).flatten())
    return stored


@pytest.mark.parametrize("features", [32, 64, 96, 128, 256, 512, 1024, 1408, 2048, 2880, 4096, 5632, 8192])
def test_rows_of_a_block(features: int) -> None:
    row = torch.randn(features, generator=torch.Generator().manual_seed(features))
    assert torch.equal(by_block(row) * span(features) ** -0.5, rotate(row))


@pytest.mark.parametrize("features", [64, 512, 704, 768, 1024, 1408, 1536])
def test_rows_of_a_warp(features: int) -> None:
    """As `hadamard.between_vectors`: lane l has vectors l, l + 32, ... of the row."""
    row = torch.randn(features, generator=torch.Generator().manual_seed(features))
    values = list(within_warps(row, span(features)).split(OF_WARP))
    for step in (1, 2, 4):
        if step * OF_WARP < span(features):
            for j in range(len(values)):
                if j & step == 0 and j + step < len(values):
                    first, second = values[j], values[j + step]
                    values[j], values[j + step] = first + second, first - second
    assert torch.equal(torch.cat(values) * span(features) ** -0.5, rotate(row))


def test_rows_of_several_chunks_are_cut_between_transforms() -> None:
    for features in (8192 + 64, 14336, 3 * 8192, 5 * 1408 * 2):
        assert CHUNK % span(features) == 0
        row = torch.randn(features)
        pieces = torch.cat([by_block_of(piece, span(features)) for piece in row.split(CHUNK)])
        assert torch.equal(pieces * span(features) ** -0.5, rotate(row))


def by_block_of(piece: torch.Tensor, size: int) -> torch.Tensor:
    """A chunk, whose transforms span ``size`` features."""
    return torch.cat([by_block(part) for part in piece.split(size)])
