"""The producer warps: they fill rings, tile after tile (CuTe DSL)."""

from dataclasses import dataclass
from typing import Any

import cutlass
from cutlass import Boolean, Int16, Int32, Int64, const_expr, cute
from cutlass.cute.nvgpu import cpasync

from mxmoe_steps.kernels.codes.format import GROUP, TILE_ROWS
from mxmoe_steps.kernels.sm90.config import UNIT, KernelConfig, Tile, block_features
from mxmoe_steps.kernels.sm90.ring import Ring, ceil_div
from mxmoe_steps.kernels.sm90.scheduler import Place, TileQueue, TileTable, runs_before

WEIGHTS, TOKENS = "weights", "tokens"
DRAW_SLOTS = 3  # the next tile is drawn with a tile's third slot from the end: the last take longer than the answer


@dataclass(frozen=True)
class Filled:
    """How far a producer has filled its ring.

    The next slot's number and the unit where the slot before it ends; the oldest slot in use and the parity of its
    barrier; slots in use, free units, and the units that each slot in use takes: a byte each, the oldest slot's lowest.
    """

    stage: Int32
    end: Int32
    oldest: Int32
    phase: Int32
    slots: Int32
    room: Int32
    sizes: Int64


@dataclass(frozen=True)
class Sources:
    """What producers read: TMA atoms and tensors, or chunks, by format and by tile; ``features``: of a weight row;
    ``row_tiles``: tiles of `TILE_ROWS` weight rows."""

    weights: tuple
    tokens: tuple
    features: Int32
    row_tiles: Int32


def draw(counters: cute.Tensor) -> Int32:
    """Take a number from the counter. Of an addition the assembler makes one for all lanes, and waits for its answer at
    once; an increment with an upper limit it leaves alone."""
    return cute.arch.inline_ptx(
        "atom.relaxed.gpu.global.inc.u32 {$w0}, [{$r0}], 0x7FFFFFFF;",
        write_only_types=[Int32],
        read_only_args=[counters.iterator.toint()],
    )


def producers_of(config: KernelConfig) -> int:
    """Warps that fill a ring."""
    return 2 if config.split == 1 else 1


@dataclass(frozen=True)
class Producer:
    """TMA boxes of rows and bulk copies of chunks, per tile: weights and tokens by a warp each (``takes`` says which),
    or by one warp for a part of a split. ``clusters``: of the launch."""

    config: KernelConfig
    takes: tuple[str, ...]
    sources: Sources
    ring: Ring
    part: Int32
    table: TileTable
    queue: TileQueue
    counters: cute.Tensor
    clusters: Int32

    @cute.jit
    def run(self, place: Place) -> None:
        """Fill a ring, from the tile at ``place`` on, until no tile is left; with tokens, a first part also hands tiles
        on, and in the last cluster sets the counters back."""
        queue, part = self.queue, self.part
        turn = Int32(0)  # tiles taken from the queue
        units = Int32(self.config.ring_units)
        filled = Filled(Int32(0), Int32(0), Int32(0), Int32(0), Int32(0), units, Int64(0))
        while place.number >= 0:
            readable = queue.readable(place, self.sources.row_tiles)
            filled, drawn = self.load_one_of(0, len(self.config.tiles), readable, filled)
            acknowledged = Boolean(True)
            if const_expr(TOKENS in self.takes):
                acknowledged = (queue.rank != 0) | (part != 0)
                if part == 0:
                    queue.announce(self.table, turn, drawn + self.clusters)
            place = queue.take(turn, acknowledged)
            turn += 1
        if const_expr(TOKENS in self.takes):
            cute.arch.griddepcontrol_wait()  # a block without tiles has not: the launch before may share the counters
            self.finish()

    @cute.jit
    def finish(self) -> None:
        """The last cluster sets the counters back."""
        counters = self.counters
        if (self.queue.rank == 0) & (self.part == 0) & (cute.arch.lane_idx() == 0):
            finished = cute.arch.atomic_add(counters.iterator + 1, Int32(1)) + 1
            if finished == self.clusters:  # every cluster has drawn until its number was past the end
                counters[0] = Int32(0)
                counters[1] = Int32(0)

    @cute.jit
    def load_one_of(
        self, first: cutlass.Constexpr, last: cutlass.Constexpr, place: Place, filled: Filled
    ) -> tuple[Filled, Int32]:
        """`load` with the one of the tiles ``first .. last - 1`` that takes the place."""
        drawn = Int32(0)
        if const_expr(last - first == 1):
            filled, drawn = self.load(first, place, filled)
        else:
            middle = (first + last) // 2
            if runs_before(self.config, middle, place):
                filled, drawn = self.load_one_of(first, middle, place, filled)
            else:
                filled, drawn = self.load_one_of(middle, last, place, filled)
        return filled, drawn

    @cute.jit
    def load(self, i: cutlass.Constexpr, place: Place, filled: Filled) -> tuple[Filled, Int32]:
        """Fill this part's slots of the ``i``-th tile; who takes tokens waits for the launch before, and in the first
        part of a cluster's first block also draws: the counter's value, in lane 0."""
        config, ring, part = self.config, self.ring, self.part
        tile = config.tiles[i]
        weight_map, token_map = self.sources.weights[config.formats.index(tile.format)], self.sources.tokens[i]
        if const_expr(WEIGHTS in self.takes):
            source = self.weight_source(tile, weight_map, place)
        if const_expr(TOKENS in self.takes):
            box = (tile.tokens, block_features(tile.format))
            rows = cute.local_tile(cute.domain_offset((place.first, 0), token_map[1]), box, (0, None))
            token_slots, token_blocks = cpasync.tma_partition(
                token_map[0],
                self.queue.rank,
                cute.make_layout(config.cluster),
                cute.group_modes(ring.token_blocks(tile), 0, 2),
                cute.group_modes(rows, 0, 2),
            )
        multicast = {} if config.cluster == 1 else {"mcast_mask": Int16(2**config.cluster - 1)}
        count = ring.slots(tile, self.sources.features, part)
        count = cute.arch.make_warp_uniform(count)  # or every slot works it out again
        draw_at = cutlass.max(count - DRAW_SLOTS, 0)
        drawn = Int32(0)
        expected = tile.weight_bytes * (WEIGHTS in self.takes) + tile.token_bytes * (TOKENS in self.takes)
        for turn in cutlass.range(count, unroll=1):
            slot = turn * config.split + part
            filled, stage, begin = self.reserve(tile, filled)
            full = ring.full + stage
            with cute.arch.elect_one():
                cute.arch.mbarrier_arrive_and_expect_tx(full, expected)
            if const_expr(WEIGHTS in self.takes):
                self.load_weights(tile, source, weight_map, full, slot, begin)
            if const_expr(TOKENS in self.takes):
                if turn == 0:
                    cute.arch.griddepcontrol_wait()
                if (turn == draw_at) & (self.queue.rank == 0) & (part == 0) & (cute.arch.lane_idx() == 0):
                    drawn = draw(self.counters)
                for d in cutlass.range_constexpr(tile.depth):
                    block, at_slot = (None, slot * tile.depth + d), (None, (d, begin))
                    cute.copy(token_map[0], token_blocks[block], token_slots[at_slot], tma_bar_ptr=full, **multicast)
        return filled, drawn

    def weight_source(self, tile: Tile, weight_map: tuple, place: Place) -> tuple:
        """Where a tile's weights come from: the first byte of its chunks, or (blocks of the ring, blocks of rows)."""
        if tile.format.decoded:
            chunk = tile.format.chunk_bytes
            pieces = TILE_ROWS // tile.rows  # 1 or 2, that a chunk is fetched in
            row_bytes = ceil_div(self.sources.features, GROUP) * chunk
            start = Int64(place.entry * self.sources.row_tiles + (place.row_tile >> (pieces - 1))) * row_bytes
            return (start + (place.row_tile & (pieces - 1)) * (chunk // pieces),)
        box = (tile.rows, block_features(tile.format))
        rows = cute.local_tile(weight_map[1], box, (place.row_tile, None, place.entry))
        blocks = cute.group_modes(self.ring.weight_blocks(tile), 0, 2)
        return cpasync.tma_partition(weight_map[0], 0, cute.make_layout(1), blocks, cute.group_modes(rows, 0, 2))

    @cute.jit
    def load_weights(
        self, tile: cutlass.Constexpr, source: tuple, weight_map: tuple, full: Any, slot: Int32, begin: Int32
    ) -> None:
        """Start the copies of the weights of slot ``slot`` of the tile to unit ``begin`` of the ring."""
        if const_expr(tile.format.decoded):
            chunk = tile.format.chunk_bytes
            pieces = 1 if tile.rows == TILE_ROWS else tile.slot_features // GROUP
            words = tile.weight_bytes // pieces // 4
            bulk, line = cute.make_copy_atom(cpasync.CopyBulkG2SOp(), Int32), cute.make_layout(words)
            with cute.arch.elect_one():
                for p in cutlass.range_constexpr(pieces):
                    start = source[0] + slot * (tile.slot_features // GROUP * chunk) + p * chunk
                    stored = cute.recast_ptr(weight_map[0].iterator + cute.assume(start, divby=128), dtype=Int32)
                    at = cute.assume(begin * UNIT + p * 4 * words, divby=128)
                    target = cute.recast_ptr(self.ring.base + at, dtype=Int32)
                    cute.copy(bulk, cute.make_tensor(stored, line), cute.make_tensor(target, line), mbar_ptr=full)
        else:
            for d in cutlass.range_constexpr(tile.depth):
                block, at_slot = (None, slot * tile.depth + d), (None, (d, begin))
                cute.copy(weight_map[0], source[1][block], source[0][at_slot], tma_bar_ptr=full)

    @cute.jit
    def reserve(self, tile: cutlass.Constexpr, filled: Filled) -> tuple[Filled, Int32, Int32]:
        """Take the next slot, when enough slots before it are free again; also its number and its first unit."""
        ring = self.ring
        oldest, phase, slots, room, sizes = filled.oldest, filled.phase, filled.slots, filled.room, filled.sizes
        begin = ring.begin(tile, filled.end)
        units = begin + tile.slot_units - filled.end  # with those that are left at the end of the ring
        if begin < filled.end:
            units += self.config.ring_units
        while (slots == self.config.stages) | (room < units):
            cute.arch.mbarrier_wait(ring.empty + oldest, phase)
            room += Int32(sizes) & 0xFF
            sizes >>= 8
            slots -= 1
            oldest, phase = ring.advance(oldest, phase)
        sizes |= Int64(units) << Int64(8 * slots)
        following, _ = ring.advance(filled.stage, Int32(0))
        end = begin + tile.slot_units
        return Filled(following, end, oldest, phase, slots + 1, room - units, sizes), filled.stage, begin
