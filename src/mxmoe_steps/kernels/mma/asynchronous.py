"""Barriers and asynchronous copies that all GPUs from sm_80 on have (CuTe DSL)."""

from typing import Any

from cutlass import Int32, Int64, cute
from cutlass._mlir.dialects import llvm

from mxmoe_steps.kernels.mma.config import MmaConfig

# Each in the shape of a loop with which ptxas keeps the main loops free of spills; with the other's it does not
_SUSPEND = "{ .reg .pred p; A: mbarrier.try_wait.parity.shared.b64 p, [$0], $1; @p bra B; bra A; B: }"
_POLL = "{ .reg .pred p; A: mbarrier.test_wait.parity.shared.b64 p, [$0], $1; @!p nanosleep.u32 20; @!p bra A; }"


def _ordered(text: str, *arguments: Int32) -> None:
    """``text`` with arguments $0, $1, ...; memory is neither read nor written across it."""
    constraints = ",".join(["r"] * len(arguments) + ["~{memory}"])
    llvm.inline_asm(None, [argument.ir_value() for argument in arguments], text, constraints, has_side_effects=True)


def initialize(barrier: Any, count: Int32) -> None:
    """A barrier that ``count`` arrivals complete; one thread's work."""
    _ordered("mbarrier.init.shared.b64 [$0], $1;", barrier.toint(), count)


def arrive(barrier: Any) -> None:
    """Of one thread: what it read and wrote before is done."""
    _ordered("{ .reg .b64 state; mbarrier.arrive.shared.b64 state, [$0]; }", barrier.toint())


def arrive_when_copied(barrier: Any) -> None:
    """Of one thread, when all its copies that were started before have arrived."""
    _ordered("cp.async.mbarrier.arrive.noinc.shared.b64 [$0];", barrier.toint())


def wait(config: MmaConfig, barrier: Any, parity: Int32) -> None:
    """Until the phase of ``parity`` is complete. Where it polls, it naps, or those that wait take turns from those that
    multiply."""
    _ordered(_SUSPEND if config.suspends else _POLL, barrier.toint(), parity)


def copy(target: Int32, source: Int64, size: Int32) -> None:
    """Start to copy ``size`` of 16 bytes, 16 or 0, from global to shared memory, and zeros for the others."""
    cute.arch.inline_ptx(
        "cp.async.cg.shared.global.L2::128B [{$r0}], [{$r1}], 16, {$r2};", read_only_args=[target, source, size]
    )


def meet(number: int, threads: int) -> None:
    """All of ``threads`` threads; what they wrote to shared memory is seen after it."""
    cute.arch.barrier(barrier_id=number, number_of_threads=threads)
