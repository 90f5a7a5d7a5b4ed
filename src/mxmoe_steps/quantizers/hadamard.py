"""Rotation of input features by Hadamard matrices (QuaRot, Ashkboos et al., 2024), local to a linear block.

An orthogonal symmetric R gives ``x W^T = (x R)(W R)^T`` exactly: weights are rotated once, before they are
quantized, and activations while the model runs, just before they are quantized. No norm is folded and no other
weight of the model changes, so blocks with and without rotation mix freely. Rotating spreads a feature's outliers
over all features, which per-token activation grids need most.
"""

import torch


def rotate(x: torch.Tensor) -> torch.Tensor:
    """``x`` [..., K] times a block-diagonal R of normalised Walsh-Hadamard matrices; its own inverse.

    The blocks are as large as K allows: the largest power of two that divides it (2048 for 2048, 128 for 1408). Fast
    transform: log2(block) passes of additions, in the precision of ``x``.
    """
    features = x.shape[-1]
    size, step = features & -features, 1
    while step < size:
        first, second = x.unflatten(-1, (features // (2 * step), 2, step)).unbind(-2)
        x = torch.stack((first + second, first - second), dim=-2).flatten(-3)
        step *= 2
    return x * size**-0.5
