"""The warps that multiply: tile after tile, the main loop that the tile takes, then the epilogue (CuTe DSL)."""

from dataclasses import dataclass
from typing import Any

import cutlass
from cutlass import Boolean, Float32, Int32, const_expr, cute

from mxmoe_steps.kernels import ptx
from mxmoe_steps.kernels.mma.config import MmaConfig
from mxmoe_steps.kernels.mma.epilogue import Epilogue
from mxmoe_steps.kernels.mma.main_loops import Warp, loop_of
from mxmoe_steps.kernels.mma.queue import TileQueue
from mxmoe_steps.kernels.mma.ring import Ring
from mxmoe_steps.kernels.sm90.ring import Position, ceil_div
from mxmoe_steps.kernels.sm90.scheduler import Place, runs_before


@dataclass(frozen=True)
class Problem:
    """What all tiles share: factors by operand and by format, the output, and the size of an entry."""

    token_scales: tuple
    channel_scales: tuple
    out: cute.Tensor
    out_features: Int32
    features: Int32


@dataclass(frozen=True)
class Consumer:
    """``staging``: shared memory of the epilogue."""

    config: MmaConfig
    problem: Problem
    ring: Ring
    queue: TileQueue
    warp: Warp
    staging: Any

    @cute.jit
    def run(self, place: Place) -> None:
        """Multiply and store tiles, from the one at ``place`` on, until no tile is left."""
        packed = Int32(0)  # ring slot, its parity, tiles taken from the queue (modulo 4), end of the slot before
        while place.number >= 0:
            turn = packed >> 5 & 3
            position = Position(packed & 15, packed >> 4 & 1, packed >> 8)
            position = self.consume_one_of(0, len(self.config.tiles), place, position)
            place = self.queue.take(turn, Boolean(True))
            # In one register, and all lanes agree: the compiler loses sight of that where configurations join
            packed = position.stage | position.parity << 4 | (turn + 1 & 3) << 5 | position.end << 8
            packed = cute.arch.make_warp_uniform(packed)

    @cute.jit
    def consume_one_of(
        self, first: cutlass.Constexpr, last: cutlass.Constexpr, place: Place, position: Position
    ) -> Position:
        """`consume` with the one of the tiles ``first .. last - 1`` that takes the place."""
        if const_expr(last - first == 1):
            position = self.consume(self.config.tiles[first], place, position)
        else:
            middle = (first + last) // 2
            if runs_before(self.config, middle, place):  # type: ignore[arg-type]
                position = self.consume_one_of(first, middle, place, position)
            else:
                position = self.consume_one_of(middle, last, place, position)
        return position

    @cute.jit
    def consume(self, tile: cutlass.Constexpr, place: Place, position: Position) -> Position:
        """Multiply and store this warp's share of a tile."""
        config, problem, format_ = self.config, self.problem, tile.format
        warp = Warp(ptx.opaque(self.warp.lane), self.warp.part, self.warp.row, self.warp.column)
        epilogue = Epilogue(
            config,
            tile,
            warp,
            self.staging,
            problem.token_scales[config.operands.index(format_.operand)],
            problem.channel_scales[config.formats.index(format_)],
        )
        factors = epilogue.fetch(place)
        kind = Int32 if format_.operand == "int8" and not format_.decoded else Float32
        acc = cute.make_rmem_tensor((4, config.token_blocks(tile), config.row_blocks), kind)
        acc.fill(0)
        slots = ceil_div(problem.features, tile.slot_features)
        position = loop_of(tile)(config, tile, self.ring, warp, slots).run(acc, position)
        first_row = place.row_tile * config.rows + warp.row * config.warp_rows
        epilogue.finish(acc, factors, place, problem.out, first_row < problem.out_features)
        return position
