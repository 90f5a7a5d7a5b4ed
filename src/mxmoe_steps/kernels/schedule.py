"""From the experts' row offsets to tiles: the tile table, and where a tile lies (CuTe DSL)."""

from dataclasses import dataclass

import cutlass
from cutlass import Boolean, Int32, Uint32, cute

from mxmoe_steps.kernels.formats import MAX_EXPERTS
from mxmoe_steps.kernels.ring import RingUser, ceil_div

TABLE_FIELDS = 6  # first row, rows, format, entry, output column, token tiles


@dataclass(frozen=True)
class Place:
    """Where a tile lies: row tile of the weights, first token row, tokens, entry in the stack, output column."""

    row_tile: Int32
    first: Int32
    rows: Int32
    entry: Int32
    column: Int32


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
    def locate(self, tile: Int32, lane: Int32, ends: cute.Tensor, table: cute.Tensor) -> tuple[Int32, Place]:
        """Tile number to (format number, place); the row tile is that of the cluster's first block."""
        p = Int32(0)
        for i in cutlass.range_constexpr(self.max_problems // 32):
            p += cute.arch.popc(cute.arch.vote_ballot_sync(ends[32 * i + lane + 1] <= tile))
        first, rows, number, entry, column = table[p, 0], table[p, 1], table[p, 2], table[p, 3], table[p, 4]
        tokens = self.largest_tokens(number)
        token_tiles = table[p, 5]
        local = tile - ends[p]
        row_step, done = local, Int32(0)
        if token_tiles > 1:
            row_step = Int32(Uint32(local) // Uint32(token_tiles))
            done = (local - row_step * token_tiles) * tokens
        return number, Place(row_step * self.cluster, first + done, cutlass.min(rows - done, tokens), entry, column)

    def before(self, i: int, number: Int32, rows: Int32) -> Boolean:
        """Whether a tile of ``rows`` tokens of format ``number`` runs with a configuration before ``i``."""
        tile = self.tiles[i]
        of = self.formats.index(tile.format)
        earlier = number < of
        if self.tiles[i - 1].format == tile.format:
            earlier = earlier | ((number == of) & (rows <= self.tiles[i - 1].tokens))
        return earlier

    def readable(self, at: Place, rank: Int32, row_tiles: Int32) -> Place:
        """The place of this block of a cluster; past the last row tile it reads the last one, and stores nothing."""
        row_tile = at.row_tile if self.cluster == 1 else cutlass.min(at.row_tile + rank, row_tiles - 1)
        return Place(row_tile, at.first, at.rows, at.entry, at.column)
