"""The grouped GEMM: one persistent kernel whose main loop is picked per tile (CuTe DSL).

``Y_e = X_e W_e^T`` for every expert e, computed as ``Y_e^T [N, tokens] = W_e [N, K] . X_e^T``: weights on the
64-row side of ``wgmma`` (from registers, if they must be decoded), tokens on its 8..256-wide side. Split tiles of
weights decoded to bfloat16 or int8 take ``mma.sync`` instead.

Warps of a block, one or two blocks per SM
    warps 0-3   producers, with TMA (rows) and bulk copies (chunks): one fetches weights, another one tokens; or each
                fetches both for a part of a split tile; few registers. The others do nothing
    warps 4-    consumer warpgroups, with the rest of the registers: two for weight rows 0-63 and 64-127 of every tile;
                or four for the parts of a split tile of 64 rows

Ring: `KernelConfig.ring_units` KiB, in at most `KernelConfig.stages` slots at a time, ``weights | tokens`` in
each, as large as the tile's format and tokens ask for. A slot begins where the one before it ends, or at 0 where
the ring ends too early. ``full[s]`` counts the bytes of slot s; ``empty[s]`` counts its readers. Producers and
consumers walk the same list of tiles, so the producers are ahead by up to a ring, across tiles and formats, and all
know where each slot begins.

    producers   | fill 0 | fill 1 | fill 2 | fill 3 | (tile 2) fill 0 ...
    consumers     wait 0 | decode 0 | wgmma 0, decode 1 | free 0 | wgmma 1, decode 2 | free 1 | ... | epilogue 1
                                                                               the producers go on here ^

Splits: every part is a producer and a warpgroup with a ring of their own, and takes every ``split``-th slot of a tile.
Parts leave their sums in shared memory. They take turns, a tile each, to add them, in order, so that a launch gives the
same bits every time, and to store them.

Clusters: with ``config.cluster == 2``, two blocks take neighbouring row tiles of one token tile. Each fetches
half of the tokens and multicasts it to both, which halves what the tokens cost in L2 traffic; a slot is
free when the readers of both blocks say so.

Problems: every block first derives the tile table from the experts' row offsets, in shared memory: tiles per
problem, then a prefix sum. Tile -> problem is a warp vote per 32 problems. Rows of an expert are cut into
the format's largest token tile, and the rest takes the smallest tile that holds it; experts without rows
have no tiles.

Schedule: tiles differ in cost, so clusters draw them, in order, from a counter in global memory. The producer of
tokens of a cluster's first block draws shortly before it has filled a tile (what it holds, others cannot take), finds
out where the next tile lies, and hands that on to all warps of the cluster, in a queue of two; the last cluster to
finish sets the counters back, so a launch leaves them at zero.

Launches overlap: a launch may start when all blocks of the one before have (programmatic dependent launch). It reads
problems, row offsets and weights at once, as far as its ring takes them (or the first slot of each part), and tokens
after the wait for that launch. So between what writes row offsets and this kernel there must be a launch that waits
before it lets the next one start (`tokens.DispatchTokens` does). One warp that fetched a ring of weights and then
tokens would make the first tokens queue up: a launch on its own would lose what one behind another gains.

Epilogue: accumulators (x token scale x channel scale) -> bf16 -> transposed `stmatrix` to a padded tile of up
to 64 tokens -> 16-byte row stores, predicated by the expert's rows and by N; sums of parts: float32 -> 8-byte row
stores. Loads are not predicated: a token tile that runs past its expert reads the next expert's rows, whose results
are not stored, and TMA fills rows and features outside a tensor with zeros.
"""

from typing import Any

import cutlass
from cutlass import BFloat16, Boolean, Float32, Int32, Int64, Uint8, const_expr, cute
from cutlass.cute.nvgpu import cpasync
from cutlass.memory import SmemAllocator

from mxmoe_steps.kernels.codes.format import HALF_ROWS, TILE_ROWS, Format
from mxmoe_steps.kernels.limits import MAX_EXPERTS
from mxmoe_steps.kernels.sm90.config import ROW_BYTES, UNIT, KernelConfig
from mxmoe_steps.kernels.sm90.consumer import Consumer
from mxmoe_steps.kernels.sm90.producer import TOKENS, WEIGHTS, Producer
from mxmoe_steps.kernels.sm90.ring import OPERAND_TYPES, Partials, ceil_div
from mxmoe_steps.kernels.sm90.schedule import PLACE_WORDS, TABLE_FIELDS, Queue


class GroupGemm(Producer, Consumer):
    """Kernel generator for one `KernelConfig`; compile an instance with `build`.

    Arguments of the compiled function, all on one device:

    ``tensors``: for every operand of ``config.operands`` the activations [rows, K] (bfloat16, or uint8 bits
    of 8-bit types) and the token scales float32 [rows]; then for every format of ``config.formats`` the weights
    (`layouts.KernelWeights.data`) and the channel scales float32 [entries, N rounded up to 128]; what a format
    does not have is any tensor of the right type and rank.
    ``problems``: int32 [P, 4], P <= max_problems: expert, format number, entry, output column.
    ``offsets``: int32 [experts + 1], first row of each expert's tokens; rows are sorted by expert.
    ``out``: bfloat16 [rows, columns]; ``out_features``: N, the same for all problems.
    ``counters``: int32 [2], zero; launches that share it must follow one another.
    ``grid``: blocks, a multiple of the cluster.
    """

    def __init__(self, config: KernelConfig) -> None:
        super().__init__(config)
        self.producer_registers, self.consumer_registers = config.registers

    @cute.jit
    def __call__(
        self,
        tensors: tuple,
        problems: cute.Tensor,
        offsets: cute.Tensor,
        out: cute.Tensor,
        counters: cute.Tensor,
        out_features: Int32,
        grid: Int32,
        stream: Any,
    ) -> None:
        pairs = [(tensors[i], tensors[i + 1]) for i in range(0, len(tensors), 2)]
        activations, stacks = pairs[: len(self.operands)], pairs[len(self.operands) :]
        tokens = [self._typed(x, operand) for operand, (x, _) in zip(self.operands, activations, strict=True)]
        weight_maps = [self._weight_map(format_, w) for format_, (w, _) in zip(self.formats, stacks, strict=True)]
        token_maps = [
            self._tensor_map(
                tokens[self.operands.index(tile.format.operand)], tile.format.operand, tile.tokens, self.cluster
            )
            for tile in self.tiles
        ]
        mmas = [self.mma_of(tile.format, tile.tokens) for tile in self.tiles]

        stages, split, max_problems, config = self.stages, self.split, self.max_problems, self.config

        @cute.struct
        class Shared:
            barriers: cute.struct.MemRange[Int64, 2 * stages * split + 6]
            queue: cute.struct.Align[cute.struct.MemRange[Int32, 2 * PLACE_WORDS], 16]
            ends: cute.struct.MemRange[Int32, max_problems + 1]
            table: cute.struct.MemRange[Int32, max_problems * TABLE_FIELDS]
            token_scales: cute.struct.Align[cute.struct.MemRange[Float32, 2 * config.max_tokens], 16]
            staging: cute.struct.Align[cute.struct.MemRange[BFloat16, config.staging_bytes // 2], 128]
            ring: cute.struct.Align[cute.struct.MemRange[Uint8, config.ring_units * split * UNIT], UNIT]

        self.Shared = Shared
        self.kernel(
            tuple(weight_maps),
            tuple(token_maps),
            tuple(mmas),
            tuple(scales for _, scales in activations),
            tuple(scales for _, scales in stacks),
            problems,
            offsets,
            out,
            counters,
            out_features,
            tokens[0].shape[1],
        ).launch(
            grid=(grid, 1, 1),
            block=(self.threads, 1, 1),
            cluster=(self.cluster, 1, 1),
            min_blocks_per_mp=self.config.blocks_per_sm,
            preferred_smem_carveout=100,  # percent: all of it
            use_pdl=True,
            stream=stream,
        )

    @staticmethod
    def _typed(tensor: cute.Tensor, operand: str) -> cute.Tensor:
        """8-bit types cross the boundary as uint8."""
        return tensor if operand == "bf16" else cute.recast_tensor(tensor, OPERAND_TYPES[operand])

    def _weight_map(self, format_: Format, weight: cute.Tensor) -> tuple:
        """What the producer reads weights through: a TMA atom and its tensor (N, K, entries), or the chunks."""
        if format_.decoded:
            return (weight,)
        rows = self._typed(weight, format_.operand)
        rows = cute.make_tensor(rows.iterator, cute.select(rows.layout, mode=[1, 2, 0]))
        return self._tensor_map(rows, format_.operand, self.rows, 1)

    @classmethod
    def _tensor_map(cls, tensor: cute.Tensor, operand: str, rows: int, multicast: int) -> tuple:
        """TMA descriptor for boxes of ``rows`` x 128 bytes, fetched in ``multicast`` parts by as many blocks for
        all of them, and the tensor of its coordinates."""
        layout = cute.slice_(cls.block_layout(operand, rows), (None, None, 0))
        box = (rows, ROW_BYTES * 8 // OPERAND_TYPES[operand].width)
        copy = cpasync.CopyBulkTensorTileG2SOp() if multicast == 1 else cpasync.CopyBulkTensorTileG2SMulticastOp()
        return cpasync.make_tiled_tma_atom(copy, tensor, layout, box, num_multicast=multicast)

    @cute.jit
    def make_barriers(self, barriers: Any, warp_number: Int32) -> None:
        """Initialize the barriers of the rings, of the queue and of parts' sums, each by a warp: lanes of one warp that
        initialize theirs take turns."""
        slots, warps = self.stages * self.split, 4 * self.groups
        readers = (warps + self.producers) * self.split * self.cluster - 1  # all that take tiles but who sends them
        counts = [self.producers] * slots + [warps * self.cluster] * slots + [1, 1, readers, readers]
        counts += [warps * self.split, warps]
        changes = [i for i in range(1, len(counts)) if counts[i] != counts[i - 1]]
        for i in cutlass.range_constexpr(0, len(counts), self.threads // 32):
            barrier = warp_number + i
            count = Int32(counts[0])
            for change in cutlass.range_constexpr(len(changes)):
                count = cutlass.select_(barrier >= changes[change], Int32(counts[changes[change]]), count)
            if barrier < len(counts):
                with cute.arch.elect_one():
                    cute.arch.mbarrier_init(barriers + barrier, count)
        cute.arch.mbarrier_init_fence()

    @cute.kernel
    def kernel(
        self,
        weight_maps: tuple,
        token_maps: tuple,
        mmas: tuple,
        token_scales: tuple,
        channel_scales: tuple,
        problems: cute.Tensor,
        offsets: cute.Tensor,
        out: cute.Tensor,
        counters: cute.Tensor,
        out_features: Int32,
        features: Int32,
    ) -> None:
        thread, _, _ = cute.arch.thread_idx()
        block, _, _ = cute.arch.block_idx()
        blocks, _, _ = cute.arch.grid_dim()
        warp_number = cute.arch.make_warp_uniform(cute.arch.warp_idx())
        lane = cute.arch.lane_idx()
        shared = SmemAllocator().allocate(self.Shared)
        barriers = shared.barriers.data_ptr()
        queue_full = barriers + 2 * self.stages * self.split
        queue = Queue(shared.queue.get_tensor(cute.make_layout((PLACE_WORDS, 2))), queue_full, queue_full + 2)
        partials_full = queue_full + 4
        ends = shared.ends.get_tensor(cute.make_layout(self.max_problems + 1))
        table = shared.table.get_tensor(cute.make_layout((self.max_problems, TABLE_FIELDS), stride=(TABLE_FIELDS, 1)))
        given, edges = self.fetch_problems(problems, offsets, thread)
        self.make_barriers(barriers, warp_number)
        if warp_number == 1:  # descriptors on their way while the table is made
            for maps in (weight_maps, token_maps):
                for tensor_map in maps:
                    if const_expr(len(tensor_map) == 2):
                        cpasync.prefetch_descriptor(tensor_map[0])
        if const_expr(self.cluster > 1):
            cute.arch.cluster_arrive_relaxed()
        starts = cute.make_tensor(
            cute.recast_ptr(shared.staging.data_ptr(), dtype=Int32), cute.make_layout(MAX_EXPERTS + 1)
        )
        self.fill_table(given, edges, problems.shape[0], out_features, thread, starts, ends, table)
        cute.arch.griddepcontrol_launch_dependents()
        if const_expr(self.cluster > 1):
            cute.arch.cluster_wait()  # both blocks' barriers exist

        row_tiles = ceil_div(out_features, TILE_ROWS)
        rank = block & (self.cluster - 1)
        place = self.locate(block >> (self.cluster - 1), lane, ends, table)
        clusters = blocks >> (self.cluster - 1)
        common = weight_maps, token_maps, place, rank, row_tiles, features, counters, queue, clusters, ends, table
        if warp_number < 4:
            cute.arch.setmaxregister_decrease(self.producer_registers)
            if warp_number < self.producers * self.split:
                part = warp_number if const_expr(self.split > 1) else Int32(0)
                ring = self.ring_of(part, shared.ring.data_ptr(), barriers)
                if const_expr(self.producers == 1):
                    self.produce((WEIGHTS, TOKENS), *common, part, ring)
                elif warp_number == 0:
                    self.produce((WEIGHTS,), *common, part, ring)
                else:
                    self.produce((TOKENS,), *common, part, ring)
        else:
            cute.arch.setmaxregister_increase(self.consumer_registers)
            cute.arch.griddepcontrol_wait()
            consumer = thread - 128
            warpgroup = cute.arch.make_warp_uniform(consumer >> 7)
            group = warpgroup & (self.groups - 1)
            part = warpgroup >> (self.groups - 1) if const_expr(self.split > 1) else Int32(0)
            ring = self.ring_of(part, shared.ring.data_ptr(), barriers)
            consumer = group * 128 + (consumer & 127)  # in its part
            staging = shared.staging.data_ptr()
            scales = shared.token_scales.get_tensor(cute.make_layout((self.config.max_tokens, 2)))
            position = Int32(0)  # ring slot, its parity, tiles taken from the queue (modulo 4), end of the slot before
            while place.number >= 0:
                stored = (place.row_tile + rank) * self.rows + group * HALF_ROWS < out_features
                mine = self.readable(place, rank, row_tiles)
                stage, phase, turn, end = position & 15, position >> 4 & 1, position >> 5 & 3, position >> 8
                partials = Partials(staging, partials_full, partials_full + 1, part, turn)
                stage, phase, end = self.consume_one_of(
                    0, len(self.tiles), mmas, ring, partials, staging, scales, token_scales, channel_scales,
                    consumer, group, mine, stored, features, out, stage, phase, end,
                )  # fmt: skip
                place = self.take(queue, turn, Boolean(True))
                # In one register, and all lanes agree: the compiler loses sight of that where configurations join
                position = cute.arch.make_warp_uniform(stage | phase << 4 | (turn + 1 & 3) << 5 | end << 8)
        if const_expr(self.cluster > 1):  # neither leaves while the other may still write to it
            cute.arch.cluster_arrive()
            cute.arch.cluster_wait()
