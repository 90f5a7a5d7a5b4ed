"""Times as the allocation receives them: plain numbers, whatever kernel and GPU they are of (`timing` makes them)."""

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from mxmoe_steps.allocation.blocks import Blocks
from mxmoe_steps.schemes import BLOCKS

LAUNCHES = 2  # of a layer: gate+up, down
DOWN = 1


@dataclass(frozen=True)
class Sides:
    """What B blocks under S schemes add to their launch, in the kernels of one phase; microseconds, float64 [B, S].

    ``compute``, ``longest`` and ``memory``: in the kernel of that scheme alone. ``more_compute``, ``more_longest`` and
    ``more_memory``: what each main loop of other schemes adds to them. ``loops`` int64 [LAUNCHES, S]: main loops of a
    scheme.
    """

    compute: NDArray[np.float64]
    longest: NDArray[np.float64]
    memory: NDArray[np.float64]
    more_compute: NDArray[np.float64]
    more_longest: NDArray[np.float64]
    more_memory: NDArray[np.float64]
    loops: NDArray[np.int64]

    def of(self, blocks: NDArray[np.bool_]) -> "Sides":
        """Those of some of the blocks."""
        return replace(self, **{name: part[blocks] for name, part in vars(self).items() if name != "loops"})

    @classmethod
    def zeros(cls, blocks: int, schemes: int) -> "Sides":
        """Of kernels that take no time."""
        parts = [np.zeros((blocks, schemes)) for _ in range(6)]
        return cls(parts[0], parts[1], parts[2], parts[3], parts[4], parts[5], np.zeros((LAUNCHES, schemes), np.int64))


@dataclass(frozen=True)
class Times:
    """Expected times of B blocks under S schemes, microseconds.

    The kernel of a launch carries the schemes that its blocks take, and F main loops: those of their different
    ``kernel`` numbers (int64 [S]). The launch takes ``launch_us`` + ``loop_us`` F + max(sum of compute + largest
    longest, sum of memory) over its blocks; ``sides``: those of a launch whose schemes are all ``by_warp`` (bool [S]),
    and of any other, the same object if their phases are the same.

    Between the launches lies SwiGLU. It is a launch of its own, of ``between_us`` + ``swiglu_us`` of the down blocks,
    float64 [B, S], unless gate and up of every expert take one scheme. Then it is part of the first launch, and what
    lies between is ``between_us`` + ``quantize_us`` [B, S] of the down blocks, or nothing if none takes a ``quantized``
    scheme (bool [S]; ``quantize_us`` of the others is 0). Where experts are no plain SwiGLU, it always is one
    (all schemes are ``quantized`` then, and the two costs are the same).
    """

    sides: tuple[Sides, Sides]
    by_warp: NDArray[np.bool_]
    kernel: NDArray[np.int64]
    launch_us: float
    loop_us: float
    between_us: float
    swiglu_us: NDArray[np.float64]
    quantize_us: NDArray[np.float64]
    quantized: NDArray[np.bool_]

    def of(self, blocks: NDArray[np.bool_]) -> "Times":
        """Times of some of the blocks."""
        first, second = self.sides
        own = first.of(blocks)
        return replace(
            self,
            sides=(own, own if second is first else second.of(blocks)),
            swiglu_us=self.swiglu_us[blocks],
            quantize_us=self.quantize_us[blocks],
        )

    @property
    def slower(self) -> bool:
        """Whether main loops of other schemes take time in any block."""
        return any(each.more_compute.any() or each.more_longest.any() for each in self.sides)

    def phase(self, carried: NDArray[np.bool_]) -> int:
        """Which of ``sides`` a launch has whose kernel carries the schemes ``carried`` (bool [S])."""
        return int(self.sides[0] is not self.sides[1] and not self.by_warp[carried].all())

    def loops(self, launch: int, carried: NDArray[np.bool_]) -> int:
        """Main loops F of that kernel."""
        first = np.unique(self.kernel[carried], return_index=True)[1]
        return int(self.sides[self.phase(carried)].loops[launch, carried][first].sum())

    @classmethod
    def zeros(cls, blocks: int, schemes: int) -> "Times":
        """Of launches that cost nothing."""
        nothing, none, sides = np.zeros((blocks, schemes)), np.zeros(schemes, bool), Sides.zeros(blocks, schemes)
        return cls((sides, sides), none, np.zeros(schemes, np.int64), 0.0, 0.0, 0.0, nothing, nothing, none)


def layer_times(blocks: Blocks, times: Times, choice: NDArray[np.int64]) -> dict[int, float]:
    """Time of every layer, microseconds, when block b takes scheme ``choice[b]`` (int64 [B])."""
    result = {}
    for layer in np.unique(blocks.layer).tolist():
        here = np.flatnonzero(blocks.layer == layer)
        total = between_us(blocks[here], times, here, choice[here])
        for launch in range(LAUNCHES):
            of = here[blocks.launch[here] == launch]
            at, carried = (of, choice[of]), np.isin(np.arange(len(times.kernel)), choice[of])
            sides, loops = times.sides[times.phase(carried)], times.loops(launch, carried)
            other = loops - sides.loops[launch, choice[of]]
            compute = (sides.compute[at] + other * sides.more_compute[at]).sum()
            longest = (sides.longest[at] + other * sides.more_longest[at]).max()
            memory = (sides.memory[at] + other * sides.more_memory[at]).sum()
            total += times.launch_us + times.loop_us * loops + max(compute + longest, memory)
        result[layer] = float(total)
    return result


def between_us(blocks: Blocks, times: Times, index: NDArray[np.int64], choice: NDArray[np.int64]) -> float:
    """Microseconds of what lies between the launches of a layer; its ``blocks`` are those ``index`` of ``times``."""
    gate, up, down = (blocks.kind == BLOCKS.index(name) for name in ("gate", "up", "down"))
    at = (index[down], choice[down])
    if gate.any() and (choice[gate] != choice[up]).any():
        return times.between_us + float(times.swiglu_us[at].sum())
    return times.between_us + float(times.quantize_us[at].sum()) if times.quantized[choice[down]].any() else 0.0
