"""The grouped GEMM: one persistent kernel whose main loop is picked per tile (CuTe DSL).

``Y_e = X_e W_e^T`` for every expert e, computed as ``Y_e^T [N, tokens] = W_e [N, K] . X_e^T`` (swap-AB): weights on the
64-row side of ``wgmma`` (from registers, if they must be decoded), tokens on its 8..256-wide side. Split tiles of
weights decoded to bfloat16 or int8 take ``mma.sync`` instead.

Warp specialization: `Producer` and `Consumer` share `Ring`, `TileTable` and `TileQueue`; a consumer's tile is a
`MainLoop` and an `Epilogue`. Warps of a block, one or two blocks per SM
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

Split-K: every part is a producer and a warpgroup with a ring of their own, and takes every ``split``-th slot of a tile.
Parts leave their sums in shared memory. They take turns, a tile each, to add them, in order, so that a launch gives the
same bits every time, and to store them.

Clusters: with ``config.cluster == 2``, two blocks take neighbouring row tiles of one token tile. Each fetches
half of the tokens and multicasts it to both, which halves what the tokens cost in L2 traffic; a slot is
free when the readers of both blocks say so.

Problems: every block first derives the tile table from the experts' row offsets, in shared memory: tiles per
problem, then a prefix sum. Tile -> problem is a warp vote per 32 problems. Rows of an expert are cut into
the format's largest token tile, and the rest takes the smallest tile that holds it; experts without rows
have no tiles.

Persistent tile scheduler: tiles differ in cost, so clusters draw them, in order, from a counter in global memory. The
producer of tokens of a cluster's first block draws shortly before it has filled a tile (what it holds, others cannot
take), finds out where the next tile lies, and hands that on to all warps of the cluster, in a queue of two; the last
cluster to finish sets the counters back, so a launch leaves them at zero.

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
from cutlass import BFloat16, Float32, Int32, Int64, Uint8, const_expr, cute
from cutlass.cute.nvgpu import cpasync
from cutlass.memory import SmemAllocator

from mxmoe_steps.kernels.codes.format import HALF_ROWS, TILE_ROWS, Format
from mxmoe_steps.kernels.limits import MAX_EXPERTS
from mxmoe_steps.kernels.sm90.config import ROW_BYTES, UNIT, KernelConfig
from mxmoe_steps.kernels.sm90.consumer import Consumer, Problem
from mxmoe_steps.kernels.sm90.producer import TOKENS, WEIGHTS, Producer, Sources, producers_of
from mxmoe_steps.kernels.sm90.ring import OPERAND_TYPES, Ring, block_layout, ceil_div
from mxmoe_steps.kernels.sm90.scheduler import (
    PLACE_WORDS,
    TABLE_FIELDS,
    TileQueue,
    TileTable,
    fetch_problems,
)


def typed(tensor: cute.Tensor, operand: str) -> cute.Tensor:
    """8-bit types cross the boundary as uint8."""
    return tensor if operand == "bf16" else cute.recast_tensor(tensor, OPERAND_TYPES[operand])


def tensor_map(tensor: cute.Tensor, operand: str, rows: int, multicast: int) -> tuple:
    """TMA descriptor for boxes of ``rows`` x 128 bytes, fetched in ``multicast`` parts by as many blocks for all of
    them, and the tensor of its coordinates."""
    layout = cute.slice_(block_layout(operand, rows), (None, None, 0))
    box = (rows, ROW_BYTES * 8 // OPERAND_TYPES[operand].width)
    copy = cpasync.CopyBulkTensorTileG2SOp() if multicast == 1 else cpasync.CopyBulkTensorTileG2SMulticastOp()
    return cpasync.make_tiled_tma_atom(copy, tensor, layout, box, num_multicast=multicast)


def weight_map(config: KernelConfig, format_: Format, weight: cute.Tensor) -> tuple:
    """What the producer reads weights through: a TMA atom and its tensor (N, K, entries), or the chunks."""
    if format_.decoded:
        return (weight,)
    rows = typed(weight, format_.operand)
    rows = cute.make_tensor(rows.iterator, cute.select(rows.layout, mode=[1, 2, 0]))
    return tensor_map(rows, format_.operand, config.rows, 1)


class GroupGemm:
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
        self.config = config
        self.warpgroups_of_part = config.rows // HALF_ROWS

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
        config = self.config
        operands, formats = config.operands, config.formats
        pairs = [(tensors[i], tensors[i + 1]) for i in range(0, len(tensors), 2)]
        activations, stacks = pairs[: len(operands)], pairs[len(operands) :]
        tokens = [typed(x, operand) for operand, (x, _) in zip(operands, activations, strict=True)]
        weight_maps = [weight_map(config, format_, w) for format_, (w, _) in zip(formats, stacks, strict=True)]
        token_maps = [
            tensor_map(tokens[operands.index(tile.format.operand)], tile.format.operand, tile.tokens, config.cluster)
            for tile in config.tiles
        ]
        barrier_count = 2 * config.stages * config.split + 6

        @cute.struct
        class Shared:
            barriers: cute.struct.MemRange[Int64, barrier_count]
            queue: cute.struct.Align[cute.struct.MemRange[Int32, 2 * PLACE_WORDS], 16]
            ends: cute.struct.MemRange[Int32, config.max_problems + 1]
            table: cute.struct.MemRange[Int32, config.max_problems * TABLE_FIELDS]
            token_scales: cute.struct.Align[cute.struct.MemRange[Float32, 2 * config.max_tokens], 16]
            staging: cute.struct.Align[cute.struct.MemRange[BFloat16, config.staging_bytes // 2], 128]
            ring: cute.struct.Align[cute.struct.MemRange[Uint8, config.ring_units * config.split * UNIT], UNIT]

        self.Shared = Shared
        self.kernel(
            (tuple(weight_maps), tuple(token_maps)),
            (tuple(scales for _, scales in activations), tuple(scales for _, scales in stacks)),
            problems,
            offsets,
            out,
            counters,
            (out_features, tokens[0].shape[1]),
        ).launch(
            grid=(grid, 1, 1),
            block=(config.threads, 1, 1),
            cluster=(config.cluster, 1, 1),
            min_blocks_per_mp=config.blocks_per_sm,
            preferred_smem_carveout=100,  # percent: all of it
            use_pdl=True,
            stream=stream,
        )

    @cute.jit
    def make_barriers(self, barriers: Any, warp_number: Int32) -> None:
        """Initialize the barriers of the rings, of the queue and of parts' sums, each by a warp: lanes of one warp that
        initialize theirs take turns."""
        config, producers = self.config, producers_of(self.config)
        slots, warps = config.stages * config.split, 4 * self.warpgroups_of_part
        takers = (warps + producers) * config.split * config.cluster - 1  # all that take tiles but who sends them
        counts = [producers] * slots + [warps * config.cluster] * slots + [1, 1, takers, takers]
        counts += [warps * config.split, warps]
        changes = [i for i in range(1, len(counts)) if counts[i] != counts[i - 1]]
        for i in cutlass.range_constexpr(0, len(counts), config.threads // 32):
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
        maps: tuple,
        scales: tuple,
        problems: cute.Tensor,
        offsets: cute.Tensor,
        out: cute.Tensor,
        counters: cute.Tensor,
        sizes: tuple,
    ) -> None:
        config, (out_features, features) = self.config, sizes
        thread, _, _ = cute.arch.thread_idx()
        block, _, _ = cute.arch.block_idx()
        blocks, _, _ = cute.arch.grid_dim()
        warp_number = cute.arch.make_warp_uniform(cute.arch.warp_idx())
        lane = cute.arch.lane_idx()
        shared = SmemAllocator().allocate(self.Shared)
        barriers = shared.barriers.data_ptr()
        queue_full = barriers + 2 * config.stages * config.split
        fetched = fetch_problems(config, problems, offsets, thread)
        self.make_barriers(barriers, warp_number)
        if warp_number == 1:  # descriptors on their way while the table is made
            self.prefetch_descriptors(maps)
        if const_expr(config.cluster > 1):
            cute.arch.cluster_arrive_relaxed()
        table_layout = cute.make_layout((config.max_problems, TABLE_FIELDS), stride=(TABLE_FIELDS, 1))
        table = TileTable(
            config,
            shared.ends.get_tensor(cute.make_layout(config.max_problems + 1)),
            shared.table.get_tensor(table_layout),
        )
        starts = cute.make_tensor(
            cute.recast_ptr(shared.staging.data_ptr(), dtype=Int32), cute.make_layout(MAX_EXPERTS + 1)
        )
        table.fill(fetched, problems.shape[0], out_features, thread, starts)
        cute.arch.griddepcontrol_launch_dependents()
        if const_expr(config.cluster > 1):
            cute.arch.cluster_wait()  # both blocks' barriers exist

        row_tiles = ceil_div(out_features, TILE_ROWS)
        rank = block & (config.cluster - 1)
        places = shared.queue.get_tensor(cute.make_layout((PLACE_WORDS, 2)))
        queue = TileQueue(config, places, queue_full, queue_full + 2, rank)
        place = table.locate(block >> (config.cluster - 1), lane)
        producer_registers, consumer_registers = config.registers
        ring_base = shared.ring.data_ptr()
        if warp_number < 4:
            cute.arch.setmaxregister_decrease(producer_registers)
            weight_maps, token_maps = maps
            sources = Sources(weight_maps, token_maps, features, row_tiles)
            clusters = blocks >> (config.cluster - 1)
            if warp_number < producers_of(config) * config.split:
                part = warp_number if const_expr(config.split > 1) else Int32(0)
                ring = Ring.of(config, part, ring_base, barriers)
                around = ring, part, table, queue, counters, clusters
                if const_expr(config.split > 1):
                    Producer(config, (WEIGHTS, TOKENS), sources, *around).run(place)
                elif warp_number == 0:
                    Producer(config, (WEIGHTS,), sources, *around).run(place)
                else:
                    Producer(config, (TOKENS,), sources, *around).run(place)
        else:
            cute.arch.setmaxregister_increase(consumer_registers)
            cute.arch.griddepcontrol_wait()
            consumer = thread - 128
            warpgroup = cute.arch.make_warp_uniform(consumer >> 7)
            group = warpgroup & (self.warpgroups_of_part - 1)
            part = warpgroup >> (self.warpgroups_of_part - 1) if const_expr(config.split > 1) else Int32(0)
            token_scales, channel_scales = scales
            Consumer(
                config=config,
                problem=Problem(token_scales, channel_scales, out, out_features, features, row_tiles),
                ring=Ring.of(config, part, ring_base, barriers),
                queue=queue,
                part=part,
                thread=group * 128 + (consumer & 127),
                group=group,
                staging=shared.staging.data_ptr(),
                shared_scales=shared.token_scales.get_tensor(cute.make_layout((config.max_tokens, 2))),
                partials=queue_full + 4,
            ).run(place)
        if const_expr(config.cluster > 1):  # neither leaves while the other may still write to it
            cute.arch.cluster_arrive()
            cute.arch.cluster_wait()

    @staticmethod
    def prefetch_descriptors(maps: tuple) -> None:
        """Of all TMA boxes."""
        for one_kind in maps:
            for one in one_kind:
                if len(one) == 2:
                    cpasync.prefetch_descriptor(one[0])
