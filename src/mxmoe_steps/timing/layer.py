"""A model's blocks as the kernels run them: slices of shared experts, phases of a layer's two launches."""

from collections.abc import Collection

import numpy as np
from numpy.typing import NDArray

from mxmoe_steps.allocation.blocks import Blocks
from mxmoe_steps.allocation.times import LAUNCHES
from mxmoe_steps.kernels.architecture import Architecture
from mxmoe_steps.kernels.codes.format import EDGE
from mxmoe_steps.kernels.shared import shared_slices
from mxmoe_steps.schemes import SHARED, Scheme
from mxmoe_steps.timing.shapes import LaunchShape
from mxmoe_steps.timing.traffic import Traffic


def cut_shared(blocks: Blocks) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Slices that every block runs as, 1 for routed experts, and output and input features of a slice, filled up as the
    kernels do, int64 [B]."""
    routed = blocks.expert != SHARED
    slices = np.ones(len(blocks), np.int64)
    out, inner = blocks.out_features.copy(), blocks.in_features.copy()
    for kind in np.unique(blocks.kind[blocks.params > 0]):  # experts without a gate have nothing to cut there
        for layer in np.unique(blocks.layer[~routed & (blocks.kind == kind)]):
            here = (blocks.layer == layer) & (blocks.kind == kind)
            shapes = {(int(n), int(k)) for n, k in zip(out[here & routed], inner[here & routed], strict=True)}
            shared = here & ~routed
            if len(shapes) == 1:
                n, k = shapes.pop()
                count = shared_slices(int(out[shared][0] * inner[shared][0]), n * k)
                if count > 1:
                    slices[shared], out[shared], inner[shared] = count, n, k
    return slices, -(-out // EDGE) * EDGE, -(-inner // EDGE) * EDGE


def launch_shapes(blocks: Blocks, experts: int) -> tuple[LaunchShape, ...]:
    """The gate+up and the down launch of a layer with ``experts`` routed experts; shapes are the first layer's."""
    blocks = blocks[blocks.layer == blocks.layer[0]]
    cut, out, _ = cut_shared(blocks)
    slices = int(cut[blocks.expert == SHARED].max(initial=0))
    one = blocks.expert == blocks.expert.max()
    return tuple(
        LaunchShape(experts, slices, tuple(out[one & (blocks.launch == launch)].tolist())) for launch in range(LAUNCHES)
    )


def step_phases(
    blocks: Blocks, traffic: Traffic, carried: Collection[Scheme], sms: int, architecture: Architecture
) -> tuple[str, ...]:
    """Phases of the kernels that run the gate+up and the down launches of a median step and carry ``carried``."""
    rows, experts = int(np.median(traffic.rows.sum(2))), traffic.rows.shape[2]
    return tuple(shape.phase(rows, sms, carried, architecture) for shape in launch_shapes(blocks, experts))
