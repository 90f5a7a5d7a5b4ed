"""Losses of one model, spread over the blocks of a larger one, so that their sums stay."""

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from mxmoe_steps.allocation.blocks import Blocks, Losses
from mxmoe_steps.schemes import BLOCKS, SHARED


def layer_blocks(layers: list[int], experts: int, hidden: int, width: int, shared: int) -> Blocks:
    """The blocks of layers with ``experts`` experts of ``width`` and a shared one of width ``shared``, 0 for none."""
    names = ([SHARED] if shared else []) + list(range(experts))
    parts = np.meshgrid(layers, names, np.arange(len(BLOCKS)), indexing="ij")
    layer, expert, kind = (part.ravel().astype(np.int64) for part in parts)
    wide = np.where(expert == SHARED, shared, width)
    down = kind == BLOCKS.index("down")
    return Blocks(layer, expert, kind, np.where(down, hidden, wide), np.where(down, wide, hidden))


def shares(many: int, few: int) -> NDArray[np.float64]:
    """Part of each of ``few`` ranks that falls to each of ``many``, float64 [many, few]; columns add up to 1."""
    low = np.maximum.outer(np.arange(many) / many, np.arange(few) / few)
    high = np.minimum.outer(np.arange(1, many + 1) / many, np.arange(1, few + 1) / few)
    return np.clip(high - low, 0, None) * few


def enlarged(losses: Losses, blocks: Blocks) -> Losses:
    """``losses`` as those of ``blocks``, which have the same layers and a shared expert where they do.

    Routed experts of both models are in the order of their tokens, those of ``blocks`` by their numbers, and an expert
    takes the losses that fall to its part of that order. So every layer, kind and scheme loses in sum what it did, and
    every number of a loss is one that a model's blocks have.
    """
    old = losses.blocks
    loss = np.zeros((len(losses.domains), len(blocks), len(losses.schemes)))
    tokens = np.zeros(len(blocks))
    for layer in np.unique(blocks.layer):
        for kind in range(len(BLOCKS)):
            here, there = ((one.layer == layer) & (one.kind == kind) for one in (blocks, old))
            shared, of_shared = here & (blocks.expert == SHARED), there & (old.expert == SHARED)
            loss[:, shared], tokens[shared] = losses.by_domain[:, of_shared], losses.tokens[of_shared]
            routed = np.flatnonzero(there & (old.expert != SHARED))
            busiest = routed[np.argsort(-losses.tokens[routed], kind="stable")]
            to = np.flatnonzero(here & (blocks.expert != SHARED))
            part = shares(len(to), len(busiest))
            loss[:, to], tokens[to] = part @ losses.by_domain[:, busiest], part @ losses.tokens[busiest]
    widths, place = np.unique(blocks.in_features, return_inverse=True)
    per_weight = np.array([[scheme.bits(int(width)) for scheme in losses.schemes] for width in widths])[place]
    bits = np.rint(per_weight * blocks.params[:, None]).astype(np.int64)
    seen = np.rint(tokens).astype(np.int64)
    return replace(losses, blocks=blocks, loss=loss.sum(0), by_domain=loss, bits=bits, tokens=seen)
