"""The grouped GEMM of ``mma.sync`` GPUs: one persistent kernel whose main loop is picked per tile (CuTe DSL).

``Y_e^T [N, tokens] = W_e [N, K] . X_e^T`` (swap-AB), as on Hopper: weights on the 16-row side of ``mma.sync``, tokens
on its 8-wide side. Stored weights are Hopper's, too: the fragments of both instructions are the same.

Warps of a block
    warp 0    producer: asynchronous copies of 16 bytes (rows, swizzled on the way; chunks), and the tiles' numbers
    warps 1-  four along the weight rows of a tile, times ``columns`` along its tokens, times ``split`` along K

Ring, tile table and the order of tiles are those of `sm90.group_gemm`. A slot is full when the copies of all lanes of
the producer have arrived, which a barrier counts (``cp.async.mbarrier.arrive``), and empty when all warps that read it
say so. Waits poll where a GPU cannot suspend them. There are no clusters, no tensor maps, and launches do not overlap.

    producer    | copy 0 | copy 1 | copy 2 | copy 3 | (tile 2) copy 0 ...
    consumers     wait 0 | fetch or decode, multiply, step by step | free 0 | wait 1 | ... | epilogue 1
                                                                               the producer goes on here ^

Split-K: the parts of a tile take turns at its slots. At the end, all but the first leave their sums in shared memory,
and the first adds them in order, so that a launch gives the same bits every time.
"""

from typing import Any

import cutlass
from cutlass import Int32, Int64, Uint8, cute
from cutlass.memory import SmemAllocator

from mxmoe_steps.kernels.codes.format import OPERAND_BITS, TILE_ROWS
from mxmoe_steps.kernels.limits import MAX_EXPERTS
from mxmoe_steps.kernels.mma.asynchronous import initialize
from mxmoe_steps.kernels.mma.config import PRODUCERS, ROW_WARPS, MmaConfig
from mxmoe_steps.kernels.mma.consumer import Consumer, Problem
from mxmoe_steps.kernels.mma.main_loops import Warp
from mxmoe_steps.kernels.mma.producer import Producer, Sources
from mxmoe_steps.kernels.mma.queue import TileQueue
from mxmoe_steps.kernels.mma.ring import Ring
from mxmoe_steps.kernels.sm90.config import UNIT
from mxmoe_steps.kernels.sm90.ring import ceil_div
from mxmoe_steps.kernels.sm90.scheduler import PLACE_WORDS, TABLE_FIELDS, TileTable, fetch_problems


class GroupGemm:
    """Kernel generator for one `MmaConfig`; arguments of the compiled function are those of `sm90.group_gemm`."""

    def __init__(self, config: MmaConfig) -> None:
        self.config = config

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
        pairs = [(tensors[i], tensors[i + 1]) for i in range(0, len(tensors), 2)]
        activations, stacks = pairs[: len(config.operands)], pairs[len(config.operands) :]

        @cute.struct
        class Shared:
            barriers: cute.struct.MemRange[Int64, 2 * config.stages + 4]
            places: cute.struct.Align[cute.struct.MemRange[Int32, 2 * PLACE_WORDS], 16]
            ends: cute.struct.MemRange[Int32, config.max_problems + 1]
            table: cute.struct.MemRange[Int32, config.max_problems * TABLE_FIELDS]
            staging: cute.struct.Align[cute.struct.MemRange[Uint8, config.staging_bytes], 16]
            ring: cute.struct.Align[cute.struct.MemRange[Uint8, config.ring_units * UNIT], UNIT]

        self.Shared = Shared
        self.kernel(
            (tuple(x for x, _ in activations), tuple(weights for weights, _ in stacks)),
            (tuple(scales for _, scales in activations), tuple(scales for _, scales in stacks)),
            problems,
            offsets,
            out,
            counters,
            (out_features, self.features(activations[0][0])),
        ).launch(
            grid=(grid, 1, 1),
            block=(config.threads, 1, 1),
            min_blocks_per_mp=config.blocks_per_sm,
            preferred_smem_carveout=100,  # percent: all of it
            stream=stream,
        )

    def features(self, tokens: cute.Tensor) -> Int32:
        """Input features of the first operand: its columns, or as many as a byte holds times them."""
        return tokens.shape[1] * max(1, 8 // OPERAND_BITS[self.config.operands[0]])

    @cute.kernel
    def kernel(
        self,
        operands: tuple,
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
        number = cute.arch.make_warp_uniform(cute.arch.warp_idx())
        lane = cute.arch.lane_idx()
        shared = SmemAllocator().allocate(self.Shared)
        barriers = shared.barriers.data_ptr()
        queue_full = barriers + 2 * config.stages
        fetched = fetch_problems(config, problems, offsets, thread)
        if thread < 2 * config.stages + 4:
            count = Int32(32 * PRODUCERS)  # of a full slot; then of an empty one, of a full place, of an empty one
            count = cutlass.select_(thread >= config.stages, Int32(config.part_warps), count)
            count = cutlass.select_(thread >= 2 * config.stages, Int32(1), count)
            count = cutlass.select_(thread >= 2 * config.stages + 2, Int32(config.warps), count)
            initialize(barriers + thread, count)
        table_layout = cute.make_layout((config.max_problems, TABLE_FIELDS), stride=(TABLE_FIELDS, 1))
        table = TileTable(
            config,  # type: ignore[arg-type]  # it has what a table asks for
            shared.ends.get_tensor(cute.make_layout(config.max_problems + 1)),
            shared.table.get_tensor(table_layout),
        )
        starts = cute.make_tensor(
            cute.recast_ptr(shared.staging.data_ptr(), dtype=Int32), cute.make_layout(MAX_EXPERTS + 1)
        )
        table.fill(fetched, problems.shape[0], out_features, thread, starts)  # the block meets in it
        ring = Ring(config, shared.ring.data_ptr(), barriers, barriers + config.stages)
        places = shared.places.get_tensor(cute.make_layout((PLACE_WORDS, 2)))
        queue = TileQueue(config, places, queue_full, queue_full + 2)
        place = table.locate(block, lane)
        tokens, weights = operands
        token_scales, channel_scales = scales
        if number < PRODUCERS:
            sources = Sources(tokens, weights, features, out_features, ceil_div(out_features, TILE_ROWS))
            Producer(config, sources, ring, table, queue, counters, blocks).run(place)
        else:
            warp = number - PRODUCERS
            row = warp & (ROW_WARPS - 1)
            column = (warp >> (ROW_WARPS.bit_length() - 1)) & (config.columns - 1)
            part = warp >> (config.part_warps.bit_length() - 1)
            Consumer(
                config=config,
                problem=Problem(token_scales, channel_scales, out, out_features, features),
                ring=ring,
                queue=queue,
                warp=Warp(lane, part, row, column),
                staging=shared.staging.data_ptr(),
            ).run(place)
