"""The producer warps: each fills a ring, tile after tile (CuTe DSL)."""

import cutlass
from cutlass import Int16, Int32, Int64, const_expr, cute
from cutlass.cute.nvgpu import cpasync

from mxmoe_steps.kernels.formats import GROUP, TILE_ROWS, UNIT
from mxmoe_steps.kernels.ring import Ring, ceil_div
from mxmoe_steps.kernels.schedule import Place, Schedule

DRAW_SLOTS = 2  # the next tile is drawn before a tile's last so many: they take longer to fill than the answer to come

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
    """TMA boxes of rows and bulk copies of chunks, per configuration."""

    @cute.jit
    def load_one_of(
        self,
        first: cutlass.Constexpr,
        last: cutlass.Constexpr,
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
                first, weight_map, token_maps[first], ring, place, rank, part, row_tiles, features, counters, used
            )
        else:
            middle = (first + last) // 2
            if self.before(middle, place):
                used, drawn = self.load_one_of(
                    first, middle, weight_maps, token_maps, ring, place, rank, part, row_tiles, features,
                    counters, used,
                )  # fmt: skip
            else:
                used, drawn = self.load_one_of(
                    middle, last, weight_maps, token_maps, ring, place, rank, part, row_tiles, features,
                    counters, used,
                )  # fmt: skip
        return used, drawn

    @cute.jit
    def load(
        self,
        i: cutlass.Constexpr,
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
        """Fill ``part``'s slots of one tile with configuration ``i``; the first part of a cluster's first block also
        draws: the counter's value, in lane 0."""
        tile = self.tiles[i]
        operand, columns = tile.format.operand, tile.format.block_features
        tokens = cute.local_tile(cute.domain_offset((place.first, 0), token_map[1]), (tile.tokens, columns), (0, None))
        token_ring = self.blocks(ring, operand, tile.tokens, tile.token_offset, tile.depth)
        token_slots, token_blocks = cpasync.tma_partition(
            token_map[0],
            rank,
            cute.make_layout(self.cluster),
            cute.group_modes(token_ring, 0, 2),
            cute.group_modes(tokens, 0, 2),
        )
        multicast = {} if self.cluster == 1 else {"mcast_mask": Int16(2**self.cluster - 1)}
        if const_expr(tile.format.decoded):
            chunk = tile.format.chunk_bytes
            halves = TILE_ROWS // self.rows  # 1 or 2, that a chunk is fetched in
            row_bytes = ceil_div(features, GROUP) * chunk
            row_start = Int64(place.entry * row_tiles + (place.row_tile >> (halves - 1))) * row_bytes
            row_start += (place.row_tile & (halves - 1)) * (chunk // halves)
            pieces = 1 if halves == 1 else tile.slot_features // GROUP
            words = tile.weight_bytes // pieces // 4
            bulk = cute.make_copy_atom(cpasync.CopyBulkG2SOp(), Int32)
        else:
            rows = cute.local_tile(weight_map[1], (self.rows, columns), (place.row_tile, None, place.entry))
            weight_ring = self.blocks(ring, operand, self.rows, 0, tile.depth)
            weight_slots, weight_blocks = cpasync.tma_partition(
                weight_map[0],
                0,
                cute.make_layout(1),
                cute.group_modes(weight_ring, 0, 2),
                cute.group_modes(rows, 0, 2),
            )
        count = cute.arch.make_warp_uniform(self.dealt(tile, features, part))  # or every slot works it out again
        draw_at = cutlass.max(count - DRAW_SLOTS, 0)
        drawn = Int32(0)
        for turn in cutlass.range(count, unroll=1):
            if (turn == draw_at) & (rank == 0) & (part == 0) & (cute.arch.lane_idx() == 0):
                drawn = draw(counters)
            slot = turn * self.split + part
            used, stage, begin = self.reserve(tile, ring, used)
            full = ring.full + stage
            with cute.arch.elect_one():
                cute.arch.mbarrier_arrive_and_expect_tx(full, tile.weight_bytes + tile.token_bytes)
                if const_expr(tile.format.decoded):
                    line = cute.make_layout(words)
                    for p in cutlass.range_constexpr(pieces):
                        start = row_start + slot * (tile.slot_features // GROUP * chunk) + p * chunk
                        source = cute.recast_ptr(weight_map[0].iterator + cute.assume(start, divby=128), dtype=Int32)
                        at = cute.assume(begin * UNIT + p * 4 * words, divby=128)
                        target = cute.recast_ptr(ring.base + at, dtype=Int32)
                        cute.copy(bulk, cute.make_tensor(source, line), cute.make_tensor(target, line), mbar_ptr=full)
            for d in cutlass.range_constexpr(tile.depth):
                block, at_slot = (None, slot * tile.depth + d), (None, (d, begin))
                if const_expr(not tile.format.decoded):
                    cute.copy(weight_map[0], weight_blocks[block], weight_slots[at_slot], tma_bar_ptr=full)
                cute.copy(token_map[0], token_blocks[block], token_slots[at_slot], tma_bar_ptr=full, **multicast)
        return used, drawn

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
