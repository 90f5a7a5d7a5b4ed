"""The producer warps: they fill rings, tile after tile (CuTe DSL)."""

from typing import Any

import cutlass
from cutlass import Boolean, Int16, Int32, Int64, const_expr, cute
from cutlass.cute.nvgpu import cpasync

from mxmoe_steps.kernels.codes.format import GROUP, TILE_ROWS
from mxmoe_steps.kernels.sm90.config import UNIT, Tile, block_features
from mxmoe_steps.kernels.sm90.ring import Ring, ceil_div
from mxmoe_steps.kernels.sm90.schedule import Place, Queue, Schedule

WEIGHTS, TOKENS = "weights", "tokens"
DRAW_SLOTS = 3  # the next tile is drawn with a tile's third slot from the end: the last take longer than the answer

# The next slot's number, the unit where the slot before it ends, the oldest slot in use and the parity of its barrier,
# slots in use, free units, and the units that each slot in use takes: a byte each, the oldest slot's lowest
Used = tuple[Int32, Int32, Int32, Int32, Int32, Int32, Int64]


def draw(counters: cute.Tensor) -> Int32:
    """Take a number from the counter. Of an addition the assembler makes one for all lanes, and waits for its answer at
    once; an increment with an upper limit it leaves alone."""
    return cute.arch.inline_ptx(
        "atom.relaxed.gpu.global.inc.u32 {$w0}, [{$r0}], 0x7FFFFFFF;",
        write_only_types=[Int32],
        read_only_args=[counters.iterator.toint()],
    )


class Producer(Schedule):
    """TMA boxes of rows and bulk copies of chunks, per configuration: weights and tokens by a warp each (``takes`` says
    which), or by one warp for a part of a split."""

    @property
    def producers(self) -> int:
        """Warps that fill a ring."""
        return 2 if self.split == 1 else 1

    @cute.jit
    def produce(
        self,
        takes: cutlass.Constexpr,
        weight_maps: tuple,
        token_maps: tuple,
        place: Place,
        rank: Int32,
        row_tiles: Int32,
        features: Int32,
        counters: cute.Tensor,
        queue: Queue,
        clusters: Int32,
        ends: cute.Tensor,
        table: cute.Tensor,
        part: Int32,
        ring: Ring,
    ) -> None:
        """Fill a ring, from the tile at ``place`` on, until no tile is left; with tokens, a first part also hands tiles
        on, and in the last cluster sets the counters back."""
        turn = Int32(0)  # tiles taken from the queue
        used = (Int32(0), Int32(0), Int32(0), Int32(0), Int32(0), Int32(self.units), Int64(0))
        while place.number >= 0:
            mine = self.readable(place, rank, row_tiles)
            used, drawn = self.load_one_of(
                0, len(self.tiles), takes, weight_maps, token_maps, ring, mine, rank, part, row_tiles, features,
                counters, used,
            )  # fmt: skip
            acknowledged = Boolean(True)
            if const_expr(TOKENS in takes):
                acknowledged = (rank != 0) | (part != 0)
                if part == 0:
                    self.announce(queue, turn, drawn + clusters, rank, ends, table)
            place = self.take(queue, turn, acknowledged)
            turn += 1
        if const_expr(TOKENS in takes):
            cute.arch.griddepcontrol_wait()  # a block without tiles has not: the launch before may share the counters
            if (rank == 0) & (part == 0) & (cute.arch.lane_idx() == 0):
                finished = cute.arch.atomic_add(counters.iterator + 1, Int32(1)) + 1
                if finished == clusters:  # every cluster has drawn until its number was past the end
                    counters[0] = Int32(0)
                    counters[1] = Int32(0)

    @cute.jit
    def load_one_of(
        self,
        first: cutlass.Constexpr,
        last: cutlass.Constexpr,
        takes: cutlass.Constexpr,
        weight_maps: tuple,
        token_maps: tuple,
        ring: Ring,
        place: Place,
        rank: Int32,
        part: Int32,
        row_tiles: Int32,
        features: Int32,
        counters: cute.Tensor,
        used: Used,
    ) -> tuple[Used, Int32]:
        """`load` with the one of the configurations ``first .. last - 1`` that the tile takes."""
        drawn = Int32(0)
        if const_expr(last - first == 1):
            weight_map = weight_maps[self.formats.index(self.tiles[first].format)]
            used, drawn = self.load(
                first, takes, weight_map, token_maps[first], ring, place, rank, part, row_tiles, features,
                counters, used,
            )  # fmt: skip
        else:
            middle = (first + last) // 2
            if self.before(middle, place):
                used, drawn = self.load_one_of(
                    first, middle, takes, weight_maps, token_maps, ring, place, rank, part, row_tiles, features,
                    counters, used,
                )  # fmt: skip
            else:
                used, drawn = self.load_one_of(
                    middle, last, takes, weight_maps, token_maps, ring, place, rank, part, row_tiles, features,
                    counters, used,
                )  # fmt: skip
        return used, drawn

    @cute.jit
    def load(
        self,
        i: cutlass.Constexpr,
        takes: cutlass.Constexpr,
        weight_map: tuple,
        token_map: tuple,
        ring: Ring,
        place: Place,
        rank: Int32,
        part: Int32,
        row_tiles: Int32,
        features: Int32,
        counters: cute.Tensor,
        used: Used,
    ) -> tuple[Used, Int32]:
        """Fill ``part``'s slots of one tile with configuration ``i``; who takes tokens waits for the launch before, and
        in the first part of a cluster's first block also draws: the counter's value, in lane 0."""
        tile = self.tiles[i]
        if const_expr(WEIGHTS in takes):
            source = self.weight_source(tile, weight_map, ring, place, row_tiles, features)
        if const_expr(TOKENS in takes):
            box = (tile.tokens, block_features(tile.format))
            rows = cute.local_tile(cute.domain_offset((place.first, 0), token_map[1]), box, (0, None))
            token_ring = self.blocks(ring, tile.format.operand, tile.tokens, tile.token_offset, tile.depth)
            token_slots, token_blocks = cpasync.tma_partition(
                token_map[0],
                rank,
                cute.make_layout(self.cluster),
                cute.group_modes(token_ring, 0, 2),
                cute.group_modes(rows, 0, 2),
            )
        multicast = {} if self.cluster == 1 else {"mcast_mask": Int16(2**self.cluster - 1)}
        count = cute.arch.make_warp_uniform(self.dealt(tile, features, part))  # or every slot works it out again
        draw_at = cutlass.max(count - DRAW_SLOTS, 0)
        drawn = Int32(0)
        expected = tile.weight_bytes * (WEIGHTS in takes) + tile.token_bytes * (TOKENS in takes)
        for turn in cutlass.range(count, unroll=1):
            slot = turn * self.split + part
            used, stage, begin = self.reserve(tile, ring, used)
            full = ring.full + stage
            with cute.arch.elect_one():
                cute.arch.mbarrier_arrive_and_expect_tx(full, expected)
            if const_expr(WEIGHTS in takes):
                self.load_weights(tile, source, weight_map, ring, full, slot, begin)
            if const_expr(TOKENS in takes):
                if turn == 0:
                    cute.arch.griddepcontrol_wait()
                if (turn == draw_at) & (rank == 0) & (part == 0) & (cute.arch.lane_idx() == 0):
                    drawn = draw(counters)
                for d in cutlass.range_constexpr(tile.depth):
                    block, at_slot = (None, slot * tile.depth + d), (None, (d, begin))
                    cute.copy(token_map[0], token_blocks[block], token_slots[at_slot], tma_bar_ptr=full, **multicast)
        return used, drawn

    def weight_source(
        self, tile: Tile, weight_map: tuple, ring: Ring, place: Place, row_tiles: Int32, features: Int32
    ) -> tuple:
        """Where a tile's weights come from: the first byte of its chunks, or (blocks of the ring, blocks of rows)."""
        if tile.format.decoded:
            chunk = tile.format.chunk_bytes
            halves = TILE_ROWS // self.rows  # 1 or 2, that a chunk is fetched in
            row_bytes = ceil_div(features, GROUP) * chunk
            start = Int64(place.entry * row_tiles + (place.row_tile >> (halves - 1))) * row_bytes
            return (start + (place.row_tile & (halves - 1)) * (chunk // halves),)
        box = (self.rows, block_features(tile.format))
        rows = cute.local_tile(weight_map[1], box, (place.row_tile, None, place.entry))
        blocks = self.blocks(ring, tile.format.operand, self.rows, 0, tile.depth)
        return cpasync.tma_partition(
            weight_map[0], 0, cute.make_layout(1), cute.group_modes(blocks, 0, 2), cute.group_modes(rows, 0, 2)
        )

    @cute.jit
    def load_weights(
        self,
        tile: cutlass.Constexpr,
        source: tuple,
        weight_map: tuple,
        ring: Ring,
        full: Any,
        slot: Int32,
        begin: Int32,
    ) -> None:
        """Start the copies of the weights of slot ``slot`` of the tile to unit ``begin`` of the ring."""
        if const_expr(tile.format.decoded):
            chunk = tile.format.chunk_bytes
            pieces = 1 if self.rows == TILE_ROWS else tile.slot_features // GROUP
            words = tile.weight_bytes // pieces // 4
            bulk, line = cute.make_copy_atom(cpasync.CopyBulkG2SOp(), Int32), cute.make_layout(words)
            with cute.arch.elect_one():
                for p in cutlass.range_constexpr(pieces):
                    start = source[0] + slot * (tile.slot_features // GROUP * chunk) + p * chunk
                    given = cute.recast_ptr(weight_map[0].iterator + cute.assume(start, divby=128), dtype=Int32)
                    at = cute.assume(begin * UNIT + p * 4 * words, divby=128)
                    target = cute.recast_ptr(ring.base + at, dtype=Int32)
                    cute.copy(bulk, cute.make_tensor(given, line), cute.make_tensor(target, line), mbar_ptr=full)
        else:
            for d in cutlass.range_constexpr(tile.depth):
                block, at_slot = (None, slot * tile.depth + d), (None, (d, begin))
                cute.copy(weight_map[0], source[1][block], source[0][at_slot], tma_bar_ptr=full)

    @cute.jit
    def reserve(self, tile: cutlass.Constexpr, ring: Ring, used: Used) -> tuple[Used, Int32, Int32]:
        """Take the next slot, when enough slots before it are free again; also its number and its first unit."""
        stage, end, oldest, phase, slots, room, sizes = used
        begin = self.begin(tile, end)
        units = begin + tile.slot_units - end  # with those that are left at the end of the ring
        if begin < end:
            units += self.units
        while (slots == self.stages) | (room < units):
            cute.arch.mbarrier_wait(ring.empty + oldest, phase)
            room += Int32(sizes) & 0xFF
            sizes >>= 8
            slots -= 1
            oldest, phase = self.advance(oldest, phase)
        sizes |= Int64(units) << Int64(8 * slots)
        following, _ = self.advance(stage, Int32(0))
        return (following, begin + tile.slot_units, oldest, phase, slots + 1, room - units, sizes), stage, begin
