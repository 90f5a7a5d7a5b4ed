"""The epilogue of a split tile (split-K): the sums of its parts, through shared memory (CuTe DSL)."""

from dataclasses import dataclass
from typing import Any

import cutlass
from cutlass import BFloat16, Float32, Int32, const_expr, cute

from mxmoe_steps.kernels.codes.format import HALF_ROWS
from mxmoe_steps.kernels.limits import GATE_ROWS
from mxmoe_steps.kernels.rounding import swiglu
from mxmoe_steps.kernels.sm90.config import LATENCY_TOKENS
from mxmoe_steps.kernels.sm90.epilogue import Epilogue, Factors, Output, Scales, store_if
from mxmoe_steps.kernels.sm90.registers import row_of
from mxmoe_steps.kernels.sm90.scheduler import Place


@dataclass(frozen=True)
class PartialSums:
    """Sums of the parts of a split, in the staging tile. ``full``: barrier that all parts arrive at; ``free``: that the
    one which adds them arrives at. ``part``: this warpgroup's; ``turn``: tiles before this one."""

    full: Any
    free: Any
    part: Int32
    turn: Int32


@dataclass(frozen=True)
class SplitEpilogue(Epilogue):
    """Of a part of a split tile. Parts leave their sums in shared memory. They take turns to add those of all parts, in
    order, and to scale, round and store them, while the others go on."""

    partials: PartialSums

    @property
    def quads(self) -> int:
        """Runs of four rows that a thread adds up: one, or one of gate and one of up."""
        return 2 if self.config.gated else 1

    def quad(self) -> tuple[Int32, Int32]:
        """First row, of gate if ``gated``, in the tile, and token of a thread that adds up. Gated tiles have as many
        for half of the threads; the others repeat them."""
        thread = self.thread
        if self.config.gated:
            return self.group * HALF_ROWS + (thread & 6) * GATE_ROWS + (thread & 1) * 4, thread >> 3 & 7
        return self.group * HALF_ROWS + (thread & 15) * 4, (thread & 127) >> 4

    @cute.jit
    def fetch(self, scales: Scales, place: Place) -> Factors:
        """Of the rows and the token that the thread adds up."""
        row, token = self.quad()
        by_row = cute.make_rmem_tensor((4, self.quads), Float32)
        by_token = cute.make_rmem_tensor((1,), Float32)
        by_row.fill(1.0)
        if const_expr(self.tile.format.channel_scaled):
            for q in cutlass.range_constexpr(self.quads):
                at = place.entry * scales.channels.shape[1] + place.row_tile * self.config.rows + row + q * GATE_ROWS
                four = cute.make_tensor(scales.channels.iterator + cute.assume(at, divby=4), cute.make_layout(4))
                cute.autovec_copy(four, by_row[None, q])
        by_token[0] = self.token_factor(scales, token, place)
        return Factors(by_row, by_token)

    @cute.jit
    def store(self, acc: cute.Tensor, factors: Factors, place: Place, output: Output) -> None:
        """Leave the part's sums and, when it is its turn, store those of all parts."""
        pitch, partials, lane = self.config.staging_pitch, self.partials, self.lane
        size = LATENCY_TOKENS * pitch  # of a part's sums
        sums = cute.recast_ptr(self.staging, dtype=acc.element_type)
        start = partials.part * size + 2 * (lane & 3) * pitch + (self.thread >> 5) * 16 + (lane >> 2)
        cute.arch.mbarrier_wait(partials.free, partials.turn & 1 ^ 1)
        for e in cutlass.range_constexpr(4):
            cute.make_tensor(sums + (start + e % 2 * pitch + row_of(e) * 8), cute.make_layout(1)).fill(acc[e])
        cute.arch.sync_warp()
        if lane == 0:
            cute.arch.mbarrier_arrive(partials.full)
        if partials.turn & (self.config.split - 1) == partials.part:
            self.add_and_store(sums, factors, place, output)

    @cute.jit
    def add_and_store(self, sums: Any, factors: Factors, place: Place, output: Output) -> None:
        """Add the parts' sums, scale, round and store them."""
        pitch, partials, format_ = self.config.staging_pitch, self.partials, self.tile.format
        row, token = self.quad()
        column = (row >> 4) * GATE_ROWS + (row & 4) if self.config.gated else row
        address = output.address(place, token, place.row_tile * self.stored_rows + column)
        total = cute.make_rmem_tensor((4, self.quads), sums.value_type)
        other = cute.make_rmem_tensor((4,), sums.value_type)
        total.fill(0)
        self.grow(factors)
        cute.arch.mbarrier_wait(partials.full, partials.turn & 1)
        for part in cutlass.range_constexpr(self.config.split):
            for q in cutlass.range_constexpr(self.quads):
                at = part * LATENCY_TOKENS * pitch + token * pitch + row + q * GATE_ROWS
                four = cute.make_tensor(sums + cute.assume(at, divby=4), cute.make_layout(4))
                cute.autovec_copy(four, other)
                for e in cutlass.range_constexpr(4):
                    total[e, q] = total[e, q] + other[e]
        cute.arch.sync_warp()
        if self.lane == 0:
            cute.arch.mbarrier_arrive(partials.free)
        values = cute.make_rmem_tensor((4, self.quads), Float32)
        rounded = cute.make_rmem_tensor((4, self.quads), BFloat16)
        for e in cutlass.range_constexpr(cute.size(values)):
            values[e] = Float32(total[e])
            if const_expr(self.row_scaled):
                values[e] = values[e] * factors.channels[e]
            if const_expr(format_.token_scaled):
                values[e] = values[e] * factors.tokens[0]
        rounded.store(values.load().to(BFloat16))
        condition = output.stored & (token < place.rows)
        if const_expr(self.config.gated):
            rounded = swiglu(rounded[None, 0], rounded[None, 1])
            condition = condition & ((self.thread & 64) == 0)
        words = cute.make_tensor(cute.recast_ptr(rounded.iterator, dtype=Int32), cute.make_layout(2))
        store_if(condition, words, address)
