"""The producer warp: it fills the ring, tile after tile, with asynchronous copies of 16 bytes (CuTe DSL)."""

from dataclasses import dataclass

import cutlass
from cutlass import Boolean, Int32, Int64, const_expr, cute

from mxmoe_steps.kernels.codes.format import GROUP, HALF_ROWS, OPERAND_BITS, TILE_ROWS
from mxmoe_steps.kernels.mma.asynchronous import arrive_when_copied, copy, wait
from mxmoe_steps.kernels.mma.config import MmaConfig
from mxmoe_steps.kernels.mma.fragments import CHUNK_BYTES, ROWS_AT_ONCE, copied, copied_offset
from mxmoe_steps.kernels.mma.queue import TileQueue
from mxmoe_steps.kernels.mma.ring import Ring
from mxmoe_steps.kernels.sm90.config import ROW_BYTES, Tile
from mxmoe_steps.kernels.sm90.producer import DRAW_SLOTS, Filled, draw
from mxmoe_steps.kernels.sm90.ring import ceil_div
from mxmoe_steps.kernels.sm90.scheduler import Place, TileTable, runs_before


@dataclass(frozen=True)
class Sources:
    """What is read: activations by operand, weights by format; ``features`` of a row, ``out_features`` of an entry,
    ``row_tiles`` of `TILE_ROWS` weight rows."""

    tokens: tuple
    weights: tuple
    features: Int32
    out_features: Int32
    row_tiles: Int32


@dataclass(frozen=True)
class Rows:
    """Rows of features in global memory: address of this lane's chunk of the first block of its first row; bytes of a
    row, and of the features that are left from that chunk on."""

    start: Int64
    pitch: Int32
    left: Int32


@dataclass(frozen=True)
class Producer:
    """``blocks``: of the launch."""

    config: MmaConfig
    sources: Sources
    ring: Ring
    table: TileTable
    queue: TileQueue
    counters: cute.Tensor
    blocks: Int32

    @cute.jit
    def run(self, place: Place) -> None:
        """Fill the ring, from the tile at ``place`` on, until no tile is left; hand tiles on; in the last block set the
        counters back."""
        turn = Int32(0)  # tiles taken from the queue
        units = Int32(self.config.ring_units)
        filled = Filled(Int32(0), Int32(0), Int32(0), Int32(0), Int32(0), units, Int64(0))
        while place.number >= 0:
            filled, drawn = self.load_one_of(0, len(self.config.tiles), place, filled)
            self.queue.announce(self.table, turn, drawn + self.blocks)
            place = self.queue.take(turn, Boolean(False))
            turn += 1
        counters = self.counters
        if cute.arch.lane_idx() == 0:
            finished = cute.arch.atomic_add(counters.iterator + 1, Int32(1)) + 1
            if finished == self.blocks:  # every block has drawn until its number was past the end
                counters[0] = Int32(0)
                counters[1] = Int32(0)

    @cute.jit
    def load_one_of(
        self, first: cutlass.Constexpr, last: cutlass.Constexpr, place: Place, filled: Filled
    ) -> tuple[Filled, Int32]:
        """`load` with the one of the tiles ``first .. last - 1`` that takes the place."""
        drawn = Int32(0)
        if const_expr(last - first == 1):
            filled, drawn = self.load(self.config.tiles[first], place, filled)
        else:
            middle = (first + last) // 2
            if runs_before(self.config, middle, place):  # type: ignore[arg-type]
                filled, drawn = self.load_one_of(first, middle, place, filled)
            else:
                filled, drawn = self.load_one_of(middle, last, place, filled)
        return filled, drawn

    @cute.jit
    def load(self, tile: cutlass.Constexpr, place: Place, filled: Filled) -> tuple[Filled, Int32]:
        """Fill the slots of a tile, and draw the next one: the counter's value, in lane 0."""
        config, ring = self.config, self.ring
        weights = self.weight_source(tile, place)
        tokens = self.rows_from(
            tile, self.sources.tokens[config.operands.index(tile.format.operand)], Int64(place.first)
        )
        count = cute.arch.make_warp_uniform(ceil_div(self.sources.features, tile.slot_features))
        draw_at = cutlass.max(count - DRAW_SLOTS, 0)
        drawn = Int32(0)
        for slot in cutlass.range(count, unroll=1):
            filled, stage, begin = self.reserve(tile, filled)
            weight_address, token_address = ring.address(tile, begin)
            if const_expr(tile.format.decoded):
                self.copy_chunks(tile, weights, slot, weight_address)
            else:
                beyond = place.row_tile * tile.rows + HALF_ROWS >= self.sources.out_features
                self.copy_rows(tile, tile.rows, weights, slot, weight_address, beyond, Int32(tile.rows))
            self.copy_rows(tile, tile.tokens, tokens, slot, token_address, Boolean(False), place.rows)
            arrive_when_copied(ring.full + stage)
            if (slot == draw_at) & (cute.arch.lane_idx() == 0):
                drawn = draw(self.counters)
        return filled, drawn

    def rows_from(self, tile: Tile, tensor: cute.Tensor, row: Int64) -> Rows:
        """Rows of a tensor of operands from ``row`` on."""
        first_row, chunk = copied(cute.arch.lane_idx())
        column = chunk * CHUNK_BYTES
        pitch = self.sources.features * OPERAND_BITS[tile.format.operand] >> 3
        start = tensor.iterator.toint() + (row + Int64(first_row)) * Int64(pitch) + Int64(column)
        return Rows(start, pitch, pitch - column)

    def weight_source(self, tile: Tile, place: Place) -> Rows | Int64:
        """Where a tile's weights come from: rows, or the address of this lane's part of its chunks."""
        format_, sources = tile.format, self.sources
        weights = sources.weights[self.config.formats.index(format_)]
        if not format_.decoded:
            row = Int64(place.entry) * Int64(sources.out_features) + Int64(place.row_tile * tile.rows)
            return self.rows_from(tile, weights, row)
        pieces = TILE_ROWS // tile.rows  # 1 or 2, that a chunk is fetched in
        row_bytes = ceil_div(sources.features, GROUP) * format_.chunk_bytes
        first = Int64(place.entry * sources.row_tiles + (place.row_tile >> (pieces - 1))) * Int64(row_bytes)
        piece = (place.row_tile & (pieces - 1)) * (format_.chunk_bytes // pieces)
        return weights.iterator.toint() + first + Int64(piece + cute.arch.lane_idx() * CHUNK_BYTES)

    @cute.jit
    def copy_chunks(self, tile: cutlass.Constexpr, source: Int64, slot: Int32, target: Int32) -> None:
        """Start the copies of a slot's chunks, or of their halves."""
        chunk = tile.format.chunk_bytes
        chunks = tile.slot_features // GROUP
        runs = 1 if tile.rows == TILE_ROWS else chunks
        size = tile.weight_bytes // runs  # of a run of neighbouring bytes
        at = cute.arch.lane_idx() * CHUNK_BYTES
        start = source + Int64(slot) * Int64(chunks * chunk)
        for run in cutlass.range_constexpr(runs):
            for first in cutlass.range_constexpr(0, size, 32 * CHUNK_BYTES):
                if at < size - first:
                    copy(target + (run * size + first) + at, start + Int64(run * chunk + first), Int32(CHUNK_BYTES))

    @cute.jit
    def copy_rows(
        self,
        tile: cutlass.Constexpr,
        rows: cutlass.Constexpr,
        source: Rows,
        slot: Int32,
        target: Int32,
        beyond: Boolean,
        valid: Int32,
    ) -> None:
        """Start the copies of a slot's blocks of ``rows`` rows; those from the ``valid``-th on are zero, and with
        ``beyond``, rows past the first half, which nobody stores, are those of the first half once more."""
        lane = cute.arch.lane_idx()
        first_row, _ = copied(lane)
        for d in cutlass.range_constexpr(tile.depth):
            done = (slot * tile.depth + d) * ROW_BYTES
            size = cutlass.select_(done < source.left, Int32(CHUNK_BYTES), Int32(0))
            start = source.start + Int64(done)
            address = start
            for i in cutlass.range_constexpr(rows // ROWS_AT_ONCE):
                if const_expr(i * ROWS_AT_ONCE == HALF_ROWS and rows == TILE_ROWS):
                    address = cutlass.select_(beyond, start, address)
                own = cutlass.select_(first_row + i * ROWS_AT_ONCE < valid, size, Int32(0))
                copy(target + (copied_offset(lane, i) + d * rows * ROW_BYTES), address, own)
                address = address + Int64(source.pitch * ROWS_AT_ONCE)

    @cute.jit
    def reserve(self, tile: cutlass.Constexpr, filled: Filled) -> tuple[Filled, Int32, Int32]:
        """Take the next slot, when enough slots before it are free again; also its number and its first unit."""
        ring = self.ring
        oldest, parity, slots, room, sizes = filled.oldest, filled.parity, filled.slots, filled.room, filled.sizes
        begin = ring.begin(tile, filled.end)
        units = begin + tile.slot_units - filled.end  # with those that are left at the end of the ring
        if begin < filled.end:
            units += self.config.ring_units
        while (slots == self.config.stages) | (room < units):
            wait(self.config, ring.empty + oldest, parity)
            room += Int32(sizes) & 0xFF
            sizes >>= 8
            slots -= 1
            oldest, parity = ring.advance(oldest, parity)
        sizes |= Int64(units) << Int64(8 * slots)
        following, _ = ring.advance(filled.stage, Int32(0))
        end = begin + tile.slot_units
        return Filled(following, end, oldest, parity, slots + 1, room - units, sizes), filled.stage, begin
