"""Times of CUDA graphs between device events, each replay after the L2 cache was flushed."""

import random
import statistics
from collections.abc import Callable, Hashable, Iterator, Mapping
from typing import TypeVar

import torch

FLUSH_BYTES = 192 << 20

Key = TypeVar("Key", bound=Hashable)


class Timer:
    """Flushes by reading: lines that a write left would be written back in the measured time.

    Graphs share the memory of what they write: one of them runs at a time, and nobody reads it.
    """

    def __init__(self) -> None:
        self._pool = torch.cuda.MemPool()  # outlives its graphs
        self._flush = torch.ones(FLUSH_BYTES // 4, dtype=torch.int32, device="cuda")

    def capture(self, run: Callable[[], object]) -> torch.cuda.CUDAGraph:
        """Run once, then capture the kernels of ``run``."""
        run()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool.id):  # type: ignore[arg-type]
            run()
        return graph

    def replays(self, graph: torch.cuda.CUDAGraph, count: int) -> list[float]:
        """Microseconds of ``count`` replays."""
        events = []
        for _ in range(count):
            self._flush.sum()
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            graph.replay()
            end.record()
            events.append((start, end))
        torch.cuda.synchronize()
        return [start.elapsed_time(end) * 1e3 for start, end in events]

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
