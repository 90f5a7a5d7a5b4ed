"""The timer on a simulated GPU, whose host is slower than it: what is measured is the GPU's time, exactly."""

import random
from collections.abc import Callable
from types import SimpleNamespace

import pytest

from mxmoe_steps.errors import UserError
from mxmoe_steps.timing import timer

FLUSH_US, CYCLES = 60.0, 2000.0  # of a flush; cycles in a microsecond


class Gpu:
    """One stream that runs in order what the host enqueues, and the clock of the host, which each call costs time."""

    def __init__(self, host_us: Callable[[], float], blocking: bool = False) -> None:
        self.host_us, self.blocking = host_us, blocking
        self.now = self.free = 0.0  # when the host is; when the GPU has done all that it has

    def enqueue(self, us: float) -> float:
        self.now += self.host_us()
        self.free = max(self.free, self.now) + us
        if self.blocking:
            self.now = self.free
        return self.free

    def torch(self) -> SimpleNamespace:
        """What the timer uses of it."""
        gpu = self

        class Event:
            def __init__(self, enable_timing: bool) -> None:
                assert enable_timing

            def record(self) -> None:
                self.at = gpu.enqueue(0.0)

            def query(self) -> bool:
                return self.at <= gpu.now

            def synchronize(self) -> None:
                gpu.now = max(gpu.now, self.at)

            def elapsed_time(self, other: "Event") -> float:
                return (other.at - self.at) / 1e3

        cuda = SimpleNamespace(Event=Event, MemPool=object, _sleep=lambda cycles: self.enqueue(cycles / CYCLES))
        ones = SimpleNamespace(sum=lambda: self.enqueue(FLUSH_US))
        return SimpleNamespace(cuda=cuda, int32=None, ones=lambda *_, **__: ones)

    def graph(self, us: float) -> SimpleNamespace:
        return SimpleNamespace(replay=lambda: self.enqueue(us))


@pytest.mark.parametrize("host", ["fast", "slow", "fitful"])
def test_no_time_of_the_host_is_measured(host: str, monkeypatch: pytest.MonkeyPatch) -> None:
    chance = random.Random(0)
    costs = {"fast": lambda: 4.0, "slow": lambda: 900.0, "fitful": lambda: chance.choice([1.0, 15.0, 70.0, 3000.0])}
    gpu = Gpu(costs[host])
    monkeypatch.setattr(timer, "torch", gpu.torch())
    us = {"stage": 2.5, "layer": 15.0, "prefill": 4000.0}
    graphs = {name: gpu.graph(time) for name, time in us.items()}
    rounds = list(timer.Timer().rounds(graphs, count=20, repeats=3))
    assert len(rounds) == 20
    for found in rounds:
        assert found == pytest.approx(us, rel=1e-9)
    if host == "fast":  # 4 replays of each graph, in 20 rounds and the one that warms up; none was repeated
        assert gpu.now == pytest.approx(21 * 4 * sum(FLUSH_US + 4.0 + time for time in us.values()), rel=0.1)


def test_a_host_that_waits_for_every_launch_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = Gpu(lambda: 4.0, blocking=True)
    monkeypatch.setattr(timer, "torch", gpu.torch())
    with pytest.raises(UserError, match="unset CUDA_LAUNCH_BLOCKING"):
        timer.Timer().replays(gpu.graph(2.5), 1)
