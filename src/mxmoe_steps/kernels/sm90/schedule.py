"""From the experts' row offsets to tiles: the tile table, where a tile lies, and who gets it (CuTe DSL)."""

from dataclasses import dataclass
from typing import Any

import cutlass
from cutlass import Boolean, Int32, Uint32, const_expr, cute

from mxmoe_steps.kernels.limits import MAX_EXPERTS
from mxmoe_steps.kernels.sm90.ring import RingUser, ceil_div

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


@dataclass(frozen=True)
class Queue:
    """Tiles on their way from the cluster's first producer: two slots of a `Place`, and their barriers."""

    places: cute.Tensor  # (word, slot)
    full: Any
    empty: Any


def send(words: tuple[Int32, Int32, Int32, Int32], target: Any, barrier: Any, rank: Int32) -> None:
    """Write ``words`` to ``target``, and 16 bytes to ``barrier``, in shared memory of block ``rank`` of the cluster."""
    cute.arch.inline_ptx(
        "{ .reg .b32 a, b; mapa.shared::cluster.u32 a, {$r0}, {$r2}; mapa.shared::cluster.u32 b, {$r1}, {$r2}; "
        "st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.b32 [a], {{$r3}, {$r4}, {$r5}, {$r6}}, [b]; }",
        read_only_args=[target.toint(), barrier.toint(), rank, *words],
    )


class Schedule(RingUser):
    """Tiles in the order of the problem table."""

    def row_steps(self, out_features: Int32) -> Int32:
        """Row tiles, or pairs of them in a cluster."""
        return ceil_div(out_features, self.rows * self.cluster)

    @cute.jit
    def fetch_problems(
        self, problems: cute.Tensor, offsets: cute.Tensor, thread: Int32
    ) -> tuple[cute.Tensor, cute.Tensor]:
        """What `fill_table` needs, a part for each thread of the block, on its way to registers: problems (field, turn)
        and row offsets (turn). All at once, since what a launch waits for at its start is the latency of memory."""
        given = cute.make_rmem_tensor((4, (self.max_problems + self.threads - 1) // self.threads), Int32)
        edges = cute.make_rmem_tensor(((MAX_EXPERTS + self.threads) // self.threads,), Int32)
        given.fill(0)
        edges.fill(0)
        for i in cutlass.range_constexpr(cute.size(given, mode=[1])):
            if thread + i * self.threads < problems.shape[0]:
                at = cute.assume((thread + i * self.threads) * 4, divby=4)
                row = cute.make_tensor(problems.iterator + at, cute.make_layout(4))
                cute.autovec_copy(row, given[None, i])
        for i in cutlass.range_constexpr(cute.size(edges)):
            if thread + i * self.threads < offsets.shape[0]:
                edges[i] = offsets[thread + i * self.threads]
        return given, edges

    @cute.jit
    def fill_table(
        self,
        given: cute.Tensor,
        edges: cute.Tensor,
        problem_count: Int32,
        out_features: Int32,
        thread: Int32,
        starts: cute.Tensor,
        ends: cute.Tensor,
        table: cute.Tensor,
    ) -> None:
        """Write each problem's row of the table and the running sum of tiles; the whole block takes part.

        ``given``, ``edges``: from `fetch_problems`. ``starts``: shared memory for `MAX_EXPERTS` + 1 offsets.
        """
        row_steps = self.row_steps(out_features)
        for i in cutlass.range_constexpr(cute.size(edges)):
            if thread + i * self.threads < MAX_EXPERTS + 1:
                starts[thread + i * self.threads] = edges[i]
        cute.arch.sync_threads()
        for i in cutlass.range_constexpr(cute.size(given, mode=[1])):
            p = thread + i * self.threads
            if p < self.max_problems:
                tiles = Int32(0)
                if p < problem_count:
                    expert, number = given[0, i], given[1, i]
                    first = starts[expert]
                    rows = starts[expert + 1] - first
                    table[p, 0] = first
                    table[p, 1] = rows
                    table[p, 2] = number
                    table[p, 3] = given[2, i]
                    table[p, 4] = given[3, i]
                    largest = self.largest_tokens(number)
                    token_tiles = Int32(Uint32(rows + largest - 1) // Uint32(largest))
                    table[p, 5] = token_tiles
                    tiles = token_tiles * row_steps
                ends[p + 1] = tiles
        cute.arch.sync_threads()
        if thread < 32:
            each = self.max_problems // 32
            total = Int32(0)
            for i in cutlass.range_constexpr(each):
                total += ends[thread * each + i + 1]
            before = total
            for step in (1, 2, 4, 8, 16):
                below = cute.arch.shuffle_sync_up(before, step)
                if thread >= step:
                    before += below
            running = before - total
            if thread == 0:
                ends[0] = Int32(0)
            for i in cutlass.range_constexpr(each):
                running += ends[thread * each + i + 1]
                ends[thread * each + i + 1] = running
        cute.arch.sync_threads()

    @cute.jit
    def largest_tokens(self, number: Int32) -> Int32:
        """Tokens of the largest tile of format ``number``."""
        tokens = Int32(self.tiles[-1].tokens)
        for i in cutlass.range_constexpr(len(self.formats)):
            if number == i:
                tokens = Int32(max(tile.tokens for tile in self.tiles if tile.format == self.formats[i]))
        return tokens

    @cute.jit
    def locate(self, tile: Int32, lane: Int32, ends: cute.Tensor, table: cute.Tensor) -> Place:
        """Tile number to place; the row tile is that of the cluster's first block."""
        p = Int32(0)
        for i in cutlass.range_constexpr(self.max_problems // 32):
            p += cute.arch.popc(cute.arch.vote_ballot_sync(ends[32 * i + lane + 1] <= tile))
        p = cutlass.min(p, self.max_problems - 1)  # past the last tile
        first, rows, number, entry, column = table[p, 0], table[p, 1], table[p, 2], table[p, 3], table[p, 4]
        tokens = self.largest_tokens(number)
        token_tiles = table[p, 5]
        local = tile - ends[p]
        row_step, done = local, Int32(0)
        if token_tiles > 1:
            row_step = Int32(Uint32(local) // Uint32(token_tiles))
            done = (local - row_step * token_tiles) * tokens
        number = cutlass.select_(tile < ends[self.max_problems], number, Int32(-1))
        return Place(number, row_step * self.cluster, first + done, cutlass.min(rows - done, tokens), entry, column)

    @cute.jit
    def announce(
        self, queue: Queue, turn: Int32, drawn: Int32, rank: Int32, ends: cute.Tensor, table: cute.Tensor
    ) -> None:
        """Producers of first parts: hand the next tile on. The first block's does so for every block of the cluster;
        ``drawn``, in its lane 0, is the tile's number."""
        slot = turn & 1
        lane = cute.arch.lane_idx()
        if (self.cluster > 1) & (lane == 0):
            cute.arch.mbarrier_arrive_and_expect_tx(queue.full + slot, 4 * PLACE_WORDS)
        if rank == 0:
            place = self.locate(cute.arch.shuffle_sync(drawn, 0), lane, ends, table)
            cute.arch.mbarrier_wait(queue.empty + slot, turn >> 1 & 1 ^ 1)
            words = (place.number, place.row_tile, place.first, place.rows, place.entry, place.column, 0, 0)
            words = tuple(map(Int32, words))
            if const_expr(self.cluster == 1):
                if lane == 0:
                    values = cute.make_rmem_tensor((PLACE_WORDS,), Int32)
                    for i in cutlass.range_constexpr(PLACE_WORDS):
                        values[i] = words[i]
                    cute.autovec_copy(values, queue.places[None, slot])
                    cute.arch.mbarrier_arrive(queue.full + slot)
            elif lane < 2 * self.cluster:
                half = lane & 1
                four = tuple(cutlass.select_(half == 0, words[i], words[i + 4]) for i in range(4))
                send(four, queue.places[None, slot].iterator + 4 * half, queue.full + slot, lane >> 1)

    @cute.jit
    def take(self, queue: Queue, turn: Int32, acknowledged: Boolean) -> Place:
        """The next tile; ``acknowledged`` by all but the producer that hands it on."""
        slot = turn & 1
        cute.arch.mbarrier_wait(queue.full + slot, turn >> 1 & 1)
        words = cute.make_rmem_tensor((PLACE_WORDS,), Int32)
        cute.autovec_copy(queue.places[None, slot], words)
        cute.arch.sync_warp()
        if (cute.arch.lane_idx() == 0) & acknowledged:
            if const_expr(self.cluster == 1):
                cute.arch.mbarrier_arrive(queue.empty + slot)
            else:
                cute.arch.mbarrier_arrive(queue.empty + slot, peer_cta_rank_in_cluster=0)
        return Place(words[0], words[1], words[2], words[3], words[4], words[5])

    def before(self, i: int, place: Place) -> Boolean:
        """Whether the tile at ``place`` runs with a configuration before ``i``."""
        tile = self.tiles[i]
        of = self.formats.index(tile.format)
        earlier = place.number < of
        if self.tiles[i - 1].format == tile.format:
            earlier = earlier | ((place.number == of) & (place.rows <= self.tiles[i - 1].tokens))
        return earlier

    def readable(self, at: Place, rank: Int32, row_tiles: Int32) -> Place:
        """The place of this block of a cluster; past the last row tile it reads the last one, and stores nothing."""
        row_tile = at.row_tile if self.cluster == 1 else cutlass.min(at.row_tile + rank, row_tiles - 1)
        return Place(at.number, row_tile, at.first, at.rows, at.entry, at.column)
