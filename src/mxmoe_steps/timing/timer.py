"""Times of CUDA graphs between device events, each replay after the L2 cache was flushed.

No time of the host is in them. A GPU that passes the first event before the host has enqueued the graph would wait for
the host in the measured time. So a replay counts only if the first event was still ahead of the GPU when the host had
enqueued all of it, the last event too. The flush keeps the GPU busy for about 60 us. Where the host takes longer, the
replay is repeated behind a spin, each time of twice the length, until it counts.
"""

import random
import statistics
from collections.abc import Callable, Hashable, Iterator, Mapping
from typing import TypeVar

import torch

from mxmoe_steps.errors import UserError

FLUSH_BYTES = 192 << 20
_SHORTEST, _LONGEST = 1 << 18, 1 << 31  # cycles of a spin: a tenth of a millisecond, a second

Key = TypeVar("Key", bound=Hashable)


class Timer:
    """Flushes by reading: lines that a write left would be written back in the measured time.

    Graphs share the memory of what they write: one of them runs at a time, and nobody reads it.
    """

    def __init__(self) -> None:
        self._pool = torch.cuda.MemPool()  # outlives its graphs
        self._flush = torch.ones(FLUSH_BYTES // 4, dtype=torch.int32, device="cuda")
        self._start, self._end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)

    def capture(self, run: Callable[[], object]) -> torch.cuda.CUDAGraph:
        """Run once, then capture the kernels of ``run``."""
        run()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool.id):  # type: ignore[arg-type]
            run()
        return graph

    def replays(self, graph: torch.cuda.CUDAGraph, count: int) -> list[float]:
        """Microseconds of ``count`` replays; `UserError` where the host cannot enqueue one in a second."""
        times: list[float] = []
        spin = 0
        while len(times) < count:
            if spin:
                torch.cuda._sleep(spin)
            self._flush.sum()
            self._start.record()
            graph.replay()
            self._end.record()
            in_time = not self._start.query()
            self._end.synchronize()
            if in_time:
                times.append(self._start.elapsed_time(self._end) * 1e3)
            elif spin < _LONGEST:
                spin = max(2 * spin, _SHORTEST)
            else:
                raise UserError(
                    "the GPU has finished before the host has enqueued a second's work: unset CUDA_LAUNCH_BLOCKING, and"
                    " measure without a profiler or debugger"
                )
        return times

    def rounds(
        self, graphs: Mapping[Key, torch.cuda.CUDAGraph], count: int, repeats: int, seed: int = 0
    ) -> Iterator[dict[Key, float]]:
        """Median microseconds of ``repeats`` replays of every graph, for ``count`` rounds after one that warms up.

        Rounds visit the graphs in random order, so that whatever drifts meets all alike; the first replay of a visit,
        which follows another graph's kernels, does not count.
        """
        shuffle = random.Random(seed)
        for number in range(-1, count):
            order = shuffle.sample(list(graphs), len(graphs))
            times = {key: statistics.median(self.replays(graphs[key], 1 + repeats)[1:]) for key in order}
            if number >= 0:
                yield times

    def __call__(self, run: Callable[[], object], warmup: int = 3, repeats: int = 15) -> float:
        """Median time of the kernels of ``run``, microseconds."""
        return statistics.median(self.replays(self.capture(run), warmup + repeats)[warmup:])
