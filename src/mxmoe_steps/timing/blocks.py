"""The blocks of a checkpoint folder, as losses name them. A module of its own: what imports it runs again when families
change."""

from collections.abc import Collection

import numpy as np

from mxmoe_steps.allocation.blocks import Blocks
from mxmoe_steps.models.families import ModelFolder
from mxmoe_steps.schemes import BLOCKS


def blocks_of(folder: ModelFolder, sizes: bool = False, layers: Collection[int] | None = None) -> Blocks:
    """The linear blocks that are allocated, in the order of `allocation.blocks`, of all or some ``layers``; ``sizes``
    opens all files."""
    keys = [
        (layer, expert, block)
        for layer in folder.moe_layers
        if layers is None or layer in layers
        for expert in sorted(folder.expert_ids())
        for block in BLOCKS
    ]
    shapes = [folder.raw_block(*key).shape if sizes else (0, 0) for key in keys]
    rows = [(layer, expert, BLOCKS.index(block)) for layer, expert, block in keys]
    return Blocks(*np.array(rows, np.int64).T, *np.array(shapes, np.int64).T)  # type: ignore[call-arg]
