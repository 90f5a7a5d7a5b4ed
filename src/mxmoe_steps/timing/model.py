"""The time of one grouped GEMM launch, microseconds: the model that `fit` fits and `predict` uses.

A layer is two grouped GEMMs, gate+up of all experts and down of all experts. A launch takes

    launch_us + loop_launch_us F + max(W + tail x longest tile in use, M + exposed W)
    W = sum over tiles of (tile_us + kstep_us K / 128 + loop_tile_us (F - F of its own scheme)) / P
    M = bytes of weights / bandwidth + bytes of activations / activation bandwidth

with P multiprocessors: Graham's bound for list scheduling (1969, theorem 1; there the tail is 1 - 1/P), or the memory
floor and the part of the compute that it does not hide. Activations are tokens' rows, in and out. A kernel carries F
main loops, one per scheme and token tile.
Between the two lies SwiGLU, launch_us + its bytes / bandwidth; where it is part of the first launch, what is left is
nothing, or launch_us + bytes / bandwidth of the products that are quantized for the second.
Every term is linear in the choices or a maximum over them, so the time of a model is a sum of maxima of linear
functions. `profile` fits the constants (docs/profile.md).
"""

import numpy as np
from numpy.typing import NDArray

from mxmoe_steps.schemes import Scheme

KSTEP = 128  # input features per k-step
OUTPUT_BYTES = 2  # bfloat16
CONSTANTS = ("launch_us", "loop_launch_us", "loop_tile_us", "tail", "exposed", "bandwidth_gbs", "activation_gbs")


def tile_counts(rows: NDArray[np.int64], sizes: NDArray[np.float64]) -> NDArray[np.int64]:
    """Token tiles of each size, [..., C], that the kernels cut ``rows`` [...] of tokens into.

    As many of the largest as fit, and for the rest the smallest that holds it. ``sizes`` [C] ascend.
    """
    whole, rest = np.divmod(rows, int(sizes[-1]))
    counts = np.zeros((*rows.shape, len(sizes)), np.int64)
    counts[..., -1] = whole
    np.add.at(counts, (*np.nonzero(rest), np.searchsorted(sizes, rest[rest > 0])), 1)
    return counts


def block_work(
    rows: NDArray[np.int64],
    out_features: NDArray[np.int64],
    in_features: NDArray[np.int64],
    cells: NDArray[np.float64],
    extra_us: float,
    tile_height: int,
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Microseconds of all tiles, and of the longest one, of blocks: both [B, steps].

    ``rows`` [B, steps]: tokens; ``out_features``, ``in_features`` [B]. ``cells`` as in `Profile.tiles`; every tile
    takes ``extra_us`` more and holds ``tile_height`` output features.
    """
    counts = tile_counts(rows, cells[:, 0])  # [B, steps, C]
    one = cells[:, 1] + extra_us + cells[:, 2] * (in_features / KSTEP)[:, None]  # [B, C]
    tiles_high = -(-out_features // tile_height)
    work = (counts * one[:, None]).sum(2) * tiles_high[:, None]
    return work, np.where(counts > 0, one[:, None], 0.0).max(2)


def bytes_moved(
    out_features: NDArray[np.int64], in_features: NDArray[np.int64], scheme: Scheme
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Bytes of the weights of blocks [B], moved if there are tokens, and of one token's activations in and out [B]."""
    bits = np.array([scheme.bits(int(features)) for features in in_features])
    weights = out_features * in_features * bits / 8
    return weights, in_features * scheme.act_bits / 8 + out_features * OUTPUT_BYTES
