"""Times as the allocation receives them: plain numbers, whatever kernel and GPU they are of (`timing` makes them)."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mxmoe_steps.allocation.blocks import Blocks

LAUNCHES = 2  # of a layer: gate+up, down


@dataclass(frozen=True)
class Times:
    """Expected times of B blocks under S schemes, microseconds, float64 [B, S].

    A launch takes ``launch_us`` + max(sum of ``compute`` + largest ``longest``, sum of ``memory``) over its blocks.
    ``launch_us`` [LAUNCHES, S] is its constant time if its blocks take this scheme; of several, the largest counts.
    """

    compute: NDArray[np.float64]
    longest: NDArray[np.float64]
    memory: NDArray[np.float64]
    launch_us: NDArray[np.float64]

    def of(self, blocks: NDArray[np.bool_]) -> "Times":
        """Times of some of the blocks."""
        return Times(self.compute[blocks], self.longest[blocks], self.memory[blocks], self.launch_us)

    @classmethod
    def zeros(cls, blocks: int, schemes: int) -> "Times":
        """Of launches that cost nothing."""
        shape = (blocks, schemes)
        return cls(np.zeros(shape), np.zeros(shape), np.zeros(shape), np.zeros((LAUNCHES, schemes)))


def layer_times(blocks: Blocks, times: Times, choice: NDArray[np.int64]) -> dict[int, float]:
    """Time of every layer, microseconds, when block b takes scheme ``choice[b]`` (int64 [B])."""
    index = np.arange(len(blocks))
    compute, longest, memory = (each[index, choice] for each in (times.compute, times.longest, times.memory))
    result = {}
    for layer in np.unique(blocks.layer).tolist():
        result[layer] = 0.0
        for launch in range(LAUNCHES):
            of = (blocks.layer == layer) & (blocks.launch == launch)
            result[layer] += times.launch_us[launch, choice[of]].max()
            result[layer] += max(compute[of].sum() + longest[of].max(), memory[of].sum())
    return result
