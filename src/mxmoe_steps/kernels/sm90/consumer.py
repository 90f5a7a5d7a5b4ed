"""A consumer warpgroup: tile after tile, the main loop that the tile takes, then the epilogue (CuTe DSL)."""

from dataclasses import dataclass
from typing import Any

import cutlass
from cutlass import Boolean, Float32, Int32, const_expr, cute
from cutlass.cute.nvgpu import warpgroup

from mxmoe_steps.kernels import ptx
from mxmoe_steps.kernels.codes.format import HALF_ROWS, Format
from mxmoe_steps.kernels.sm90.config import KernelConfig, Tile, by_warp
from mxmoe_steps.kernels.sm90.epilogue import Epilogue, Output, Scales, TileEpilogue, tiled_mma
from mxmoe_steps.kernels.sm90.main_loops import Bf16Loop, Fp8Loop, Int8Loop, MainLoop, RowsLoop
from mxmoe_steps.kernels.sm90.ring import Position, Ring
from mxmoe_steps.kernels.sm90.scheduler import Place, TileQueue, runs_before
from mxmoe_steps.kernels.sm90.split_epilogue import PartialSums, SplitEpilogue
from mxmoe_steps.kernels.sm90.warp_loop import WarpLoop


def loop_of(config: KernelConfig, format_: Format) -> type[MainLoop]:
    """The main loop of a format."""
    if not format_.decoded:
        return RowsLoop
    if config.split > 1 and by_warp(format_):
        return WarpLoop
    return {"bf16": Bf16Loop, "fp8": Fp8Loop, "int8": Int8Loop}[format_.operand]


@dataclass(frozen=True)
class Problem:
    """What all tiles share: factors by operand and by format, the output, and the size of a block of weights."""

    token_scales: tuple
    channel_scales: tuple
    out: cute.Tensor
    out_features: Int32
    features: Int32
    row_tiles: Int32


@dataclass(frozen=True)
class Consumer:
    """``thread``, ``group``: in the part, and which of its warpgroups; ``staging``, ``shared_scales``: shared memory of
    the epilogue; ``partials``: barriers of a split's sums, the full one and the free one."""

    config: KernelConfig
    problem: Problem
    ring: Ring
    queue: TileQueue
    part: Int32
    thread: Int32
    group: Int32
    staging: Any
    shared_scales: cute.Tensor
    partials: Any

    @cute.jit
    def run(self, place: Place) -> None:
        """Multiply and store tiles, from the one at ``place`` on, until no tile is left."""
        packed = Int32(0)  # ring slot, its parity, tiles taken from the queue (modulo 4), end of the slot before
        while place.number >= 0:
            first_row = (place.row_tile + self.queue.rank) * self.config.rows + self.group * HALF_ROWS
            output = Output(self.problem.out, first_row < self.problem.out_features)
            readable = self.queue.readable(place, self.problem.row_tiles)
            turn = packed >> 5 & 3
            position = Position(packed & 15, packed >> 4 & 1, packed >> 8)
            position = self.consume_one_of(0, len(self.config.tiles), readable, turn, output, position)
            place = self.queue.take(turn, Boolean(True))
            # In one register, and all lanes agree: the compiler loses sight of that where configurations join
            packed = position.stage | position.phase << 4 | (turn + 1 & 3) << 5 | position.end << 8
            packed = cute.arch.make_warp_uniform(packed)

    @cute.jit
    def consume_one_of(
        self,
        first: cutlass.Constexpr,
        last: cutlass.Constexpr,
        place: Place,
        turn: Int32,
        output: Output,
        position: Position,
    ) -> Position:
        """`consume` with the one of the tiles ``first .. last - 1`` that takes the place."""
        if const_expr(last - first == 1):
            position = self.consume(self.config.tiles[first], place, turn, output, position)
        else:
            middle = (first + last) // 2
            if runs_before(self.config, middle, place):
                position = self.consume_one_of(first, middle, place, turn, output, position)
            else:
                position = self.consume_one_of(middle, last, place, turn, output, position)
        return position

    @cute.jit
    def consume(
        self, tile: cutlass.Constexpr, place: Place, turn: Int32, output: Output, position: Position
    ) -> Position:
        """Multiply one tile, and store this warpgroup's 64 rows."""
        config, ring, format_ = self.config, self.ring, tile.format
        thread = ptx.opaque(self.thread)
        scales = Scales(
            self.problem.token_scales[config.operands.index(format_.operand)],
            self.problem.channel_scales[config.formats.index(format_)],
        )
        epilogue = self.epilogue(tile, thread, turn)
        factors = epilogue.fetch(scales, place)
        mma = tiled_mma(config, format_, tile.tokens)
        mma.set(warpgroup.Field.ACCUMULATE, True)
        warpgroup_mma = mma.get_slice(cute.make_layout(config.rows // HALF_ROWS, stride=128)(self.group))
        tokens = mma.make_fragment_B(warpgroup_mma.partition_B(ring.token_blocks(tile)))
        kind = Int32 if format_.operand == "int8" and not format_.decoded else Float32
        acc = cute.make_rmem_tensor(mma.partition_shape_C((config.rows, tile.tokens)), kind)
        acc.fill(0)
        slots = ring.slots(tile, self.problem.features, self.part)
        weights = None
        if const_expr(not format_.decoded):
            weights = mma.make_fragment_A(warpgroup_mma.partition_A(ring.weight_blocks(tile)))
        loop = loop_of(config, format_)
        position = loop(config, tile, ring, mma, tokens, weights, thread, slots, self.problem.features).run(
            acc, position
        )
        epilogue.store(acc, factors, place, output)
        return position

    def epilogue(self, tile: Tile, thread: Int32, turn: Int32) -> Epilogue:
        """Of a tile."""
        if self.config.split == 1:
            return TileEpilogue(self.config, tile, self.staging, thread, self.group, self.shared_scales)
        partials = PartialSums(self.partials, self.partials + 1, self.part, turn)
        return SplitEpilogue(self.config, tile, self.staging, thread, self.group, partials)
