"""The persistent tile scheduler: the tile table from the experts' row offsets, where a tile lies, and who gets it
(CuTe DSL)."""

from dataclasses import dataclass
from typing import Any

import cutlass
from cutlass import Boolean, Int32, Uint32, const_expr, cute

from mxmoe_steps.kernels.limits import MAX_EXPERTS
from mxmoe_steps.kernels.sm90.config import KernelConfig
from mxmoe_steps.kernels.sm90.ring import ceil_div

TABLE_FIELDS = 6  # first row, rows, format, entry, output column, token tiles
PLACE_WORDS = 8  # of a `Place` in the queue: two loads of 16 bytes


@dataclass(frozen=True)
class Place:
    """Of a tile: format number, negative past the last tile; row tile of the weights, first token row, tokens, entry in
    the stack, output column."""

    number: Int32
    row_tile: Int32
    first: Int32
    rows: Int32
    entry: Int32
    column: Int32


def send(words: tuple[Int32, Int32, Int32, Int32], target: Any, barrier: Any, rank: Int32) -> None:
    """Write ``words`` to ``target``, and 16 bytes to ``barrier``, in shared memory of block ``rank`` of the cluster."""
    cute.arch.inline_ptx(
        "{ .reg .b32 a, b; mapa.shared::cluster.u32 a, {$r0}, {$r2}; mapa.shared::cluster.u32 b, {$r1}, {$r2}; "
        "st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.b32 [a], {{$r3}, {$r4}, {$r5}, {$r6}}, [b]; }",
        read_only_args=[target.toint(), barrier.toint(), rank, *words],
    )


@dataclass(frozen=True)
class Problems:
    """What `TileTable.fill` needs, a part for each thread of the block, on its way to registers: problems (field, turn)
    and row offsets (turn)."""

    fields: cute.Tensor
    edges: cute.Tensor


@cute.jit
def fetch_problems(config: cutlass.Constexpr, problems: cute.Tensor, offsets: cute.Tensor, thread: Int32) -> Problems:
    """All at once, since what a launch waits for at its start is the latency of memory."""
    fields = cute.make_rmem_tensor((4, (config.max_problems + config.threads - 1) // config.threads), Int32)
    edges = cute.make_rmem_tensor(((MAX_EXPERTS + config.threads) // config.threads,), Int32)
    fields.fill(0)
    edges.fill(0)
    for i in cutlass.range_constexpr(cute.size(fields, mode=[1])):
        if thread + i * config.threads < problems.shape[0]:
            at = cute.assume((thread + i * config.threads) * 4, divby=4)
            row = cute.make_tensor(problems.iterator + at, cute.make_layout(4))
            cute.autovec_copy(row, fields[None, i])
    for i in cutlass.range_constexpr(cute.size(edges)):
        if thread + i * config.threads < offsets.shape[0]:
            edges[i] = offsets[thread + i * config.threads]
    return Problems(fields, edges)


@dataclass(frozen=True)
class TileTable:
    """Tiles in the order of the problem table, in shared memory: ``rows`` (problem, field), and ``ends``, the running
    sum of tiles."""

    config: KernelConfig
    ends: cute.Tensor
    rows: cute.Tensor

    @cute.jit
    def fill(
        self,
        problems: Problems,
        problem_count: Int32,
        out_features: Int32,
        thread: Int32,
        starts: cute.Tensor,
    ) -> None:
        """Write each problem's row of the table and the running sum of tiles; the whole block takes part.

        ``starts``: shared memory for `MAX_EXPERTS` + 1 offsets.
        """
        threads, max_problems, table, ends = self.config.threads, self.config.max_problems, self.rows, self.ends
        row_steps = ceil_div(out_features, self.config.rows * self.config.cluster)  # row tiles, or pairs in a cluster
        for i in cutlass.range_constexpr(cute.size(problems.edges)):
            if thread + i * threads < MAX_EXPERTS + 1:
                starts[thread + i * threads] = problems.edges[i]
        cute.arch.sync_threads()
        for i in cutlass.range_constexpr(cute.size(problems.fields, mode=[1])):
            p = thread + i * threads
            if p < max_problems:
                tiles = Int32(0)
                if p < problem_count:
                    expert, number = problems.fields[0, i], problems.fields[1, i]
                    first = starts[expert]
                    rows = starts[expert + 1] - first
                    table[p, 0] = first
                    table[p, 1] = rows
                    table[p, 2] = number
                    table[p, 3] = problems.fields[2, i]
                    table[p, 4] = problems.fields[3, i]
                    largest = self.largest_tokens(number)
                    token_tiles = Int32(Uint32(rows + largest - 1) // Uint32(largest))
                    table[p, 5] = token_tiles
                    tiles = token_tiles * row_steps
                ends[p + 1] = tiles
        cute.arch.sync_threads()
        if thread < 32:
            self.sum_up(thread)
        cute.arch.sync_threads()

    @cute.jit
    def sum_up(self, lane: Int32) -> None:
        """Tiles of every problem to tiles up to its end; one warp."""
        each, ends = self.config.max_problems // 32, self.ends
        total = Int32(0)
        for i in cutlass.range_constexpr(each):
            total += ends[lane * each + i + 1]
        before = total
        for step in (1, 2, 4, 8, 16):
            below = cute.arch.shuffle_sync_up(before, step)
            if lane >= step:
                before += below
        running = before - total
        if lane == 0:
            ends[0] = Int32(0)
        for i in cutlass.range_constexpr(each):
            running += ends[lane * each + i + 1]
            ends[lane * each + i + 1] = running

    @cute.jit
    def largest_tokens(self, number: Int32) -> Int32:
        """Tokens of the largest tile of format ``number``."""
        tiles, formats = self.config.tiles, self.config.formats
        tokens = Int32(tiles[-1].tokens)
        for i in cutlass.range_constexpr(len(formats)):
            if number == i:
                tokens = Int32(max(tile.tokens for tile in tiles if tile.format == formats[i]))
        return tokens

    @cute.jit
    def locate(self, tile: Int32, lane: Int32) -> Place:
        """Tile number to place; the row tile is that of the cluster's first block."""
        max_problems, table = self.config.max_problems, self.rows
        p = Int32(0)
        for i in cutlass.range_constexpr(max_problems // 32):
            p += cute.arch.popc(cute.arch.vote_ballot_sync(self.ends[32 * i + lane + 1] <= tile))
        p = cutlass.min(p, max_problems - 1)  # past the last tile
        first, rows, number, entry, column = table[p, 0], table[p, 1], table[p, 2], table[p, 3], table[p, 4]
        tokens = self.largest_tokens(number)
        token_tiles = table[p, 5]
        local = tile - self.ends[p]
        row_step, done = local, Int32(0)
        if token_tiles > 1:
            row_step = Int32(Uint32(local) // Uint32(token_tiles))
            done = (local - row_step * token_tiles) * tokens
        number = cutlass.select_(tile < self.ends[max_problems], number, Int32(-1))
        row_tile = row_step * self.config.cluster
        return Place(number, row_tile, first + done, cutlass.min(rows - done, tokens), entry, column)


@dataclass(frozen=True)
class TileQueue:
    """Tiles on their way from the cluster's first producer to all warps: ``places`` (word, slot), two slots of a
    `Place`, and their barriers. ``rank``: of this block in its cluster."""

    config: KernelConfig
    places: cute.Tensor
    full: Any
    empty: Any
    rank: Int32

    @cute.jit
    def announce(self, table: TileTable, turn: Int32, drawn: Int32) -> None:
        """Producers of first parts: hand the next tile on. The first block's does so for every block of the cluster;
        ``drawn``, in its lane 0, is the tile's number."""
        slot = turn & 1
        lane = cute.arch.lane_idx()
        if (self.config.cluster > 1) & (lane == 0):
            cute.arch.mbarrier_arrive_and_expect_tx(self.full + slot, 4 * PLACE_WORDS)
        if self.rank == 0:
            place = table.locate(cute.arch.shuffle_sync(drawn, 0), lane)
            cute.arch.mbarrier_wait(self.empty + slot, turn >> 1 & 1 ^ 1)
            words = (place.number, place.row_tile, place.first, place.rows, place.entry, place.column, 0, 0)
            words = tuple(map(Int32, words))
            if const_expr(self.config.cluster == 1):
                if lane == 0:
                    values = cute.make_rmem_tensor((PLACE_WORDS,), Int32)
                    for i in cutlass.range_constexpr(PLACE_WORDS):
                        values[i] = words[i]
                    cute.autovec_copy(values, self.places[None, slot])
                    cute.arch.mbarrier_arrive(self.full + slot)
            elif lane < 2 * self.config.cluster:
                half = lane & 1
                four = tuple(cutlass.select_(half == 0, words[i], words[i + 4]) for i in range(4))
                send(four, self.places[None, slot].iterator + 4 * half, self.full + slot, lane >> 1)

    @cute.jit
    def take(self, turn: Int32, acknowledged: Boolean) -> Place:
        """The next tile; ``acknowledged`` by all but the producer that hands it on."""
        slot = turn & 1
        cute.arch.mbarrier_wait(self.full + slot, turn >> 1 & 1)
        words = cute.make_rmem_tensor((PLACE_WORDS,), Int32)
        cute.autovec_copy(self.places[None, slot], words)
        cute.arch.sync_warp()
        if (cute.arch.lane_idx() == 0) & acknowledged:
            if const_expr(self.config.cluster == 1):
                cute.arch.mbarrier_arrive(self.empty + slot)
            else:
                cute.arch.mbarrier_arrive(self.empty + slot, peer_cta_rank_in_cluster=0)
        return Place(words[0], words[1], words[2], words[3], words[4], words[5])

    def readable(self, place: Place, row_tiles: Int32) -> Place:
        """The place of this block of a cluster; past the last row tile it reads the last one, and stores nothing."""
        row_tile = place.row_tile
        if self.config.cluster > 1:
            row_tile = cutlass.min(place.row_tile + self.rank, row_tiles - 1)
        return Place(place.number, row_tile, place.first, place.rows, place.entry, place.column)


def runs_before(config: KernelConfig, i: int, place: Place) -> Boolean:
    """Whether the tile at ``place`` runs with a main loop before the ``i``-th."""
    tile, previous = config.tiles[i], config.tiles[i - 1]
    number = config.formats.index(tile.format)
    earlier = place.number < number
    if previous.format == tile.format:
        earlier = earlier | ((place.number == number) & (place.rows <= previous.tokens))
    return earlier
