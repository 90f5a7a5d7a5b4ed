"""The grouped GEMM: one persistent sm_90a kernel whose main loop is picked per tile (CuTe DSL).

``Y_e = X_e W_e^T`` for every expert e, computed as ``Y_e^T [N, tokens] = W_e [N, K] . X_e^T``: weights on the
64-row side of ``wgmma`` (from registers, if they must be decoded), tokens on its 16..256-wide side.

Warps of a block, 384 threads, one or two blocks per SM
    warp 0      producer: fills the ring with TMA (rows) and bulk copies (chunks); few registers
    warps 1-3   nothing
    warps 4-11  two consumer warpgroups, weight rows 0-63 and 64-127 of every tile; the rest of the registers

Ring: `KernelConfig.stages` slots of one size for all formats, ``weights | tokens`` in each. ``full[s]`` counts
the bytes of slot s; ``empty[s]`` counts its readers. Producer and consumers walk the same list of tiles,
so the producer is ahead by up to a ring, across tiles and formats.

    producer    | fill 0 | fill 1 | fill 2 | fill 3 | (tile 2) fill 0 ...
    consumers     wait 0 | decode 0 | wgmma 0, decode 1 | free 0 | wgmma 1, decode 2 | free 1 | ... | epilogue 1
                                                                               the producer goes on here ^

Clusters: with ``config.cluster == 2``, two blocks take neighbouring row tiles of one token tile. Each fetches
half of the tokens and multicasts it to both, which halves what the tokens cost in L2 traffic; a slot is
free when the readers of both blocks say so.

Problems: every block first derives the tile table from the experts' row offsets, in shared memory: tiles per
problem, then a prefix sum. Tile -> problem is a warp vote per 32 problems. Rows of an expert are cut into
the format's largest token tile, and the rest takes the smallest tile that holds it; experts without rows
have no tiles.

Schedule: tiles differ in cost, so clusters draw them, in order, from a counter in global memory. The producer of
a cluster's first block draws one tile ahead and sends the number to every block of the cluster (``st.async``
into a queue of two); the last cluster to finish sets the counters back, so a launch leaves them at zero.

Epilogue: accumulators (x token scale x channel scale) -> bf16 -> transposed `stmatrix` to a padded tile of up
to 64 tokens -> 16-byte row stores, predicated by the expert's rows and by N. Loads never are: a token tile
that runs past its expert reads the next expert's rows, whose results are not stored, and TMA fills rows and
features outside a tensor with zeros.
"""

from dataclasses import dataclass
from typing import Any

import cutlass
import cutlass.utils.hopper_helpers as hopper
from cutlass import BFloat16, Boolean, Float8E4M3FN, Float32, Int8, Int16, Int32, Int64, Uint8, Uint16, const_expr, cute
from cutlass._mlir.dialects import llvm
from cutlass.cute.nvgpu import OperandMajorMode, cpasync, warp, warpgroup
from cutlass.cutlass_dsl import T
from cutlass.memory import SmemAllocator
from cutlass.utils import LayoutEnum

from mxmoe_steps.kernels import decode
from mxmoe_steps.kernels.formats import EPILOGUE_TOKENS, GROUP, ROW_BYTES, TILE_ROWS, Format, KernelConfig, Tile

THREADS = 384
REGISTERS = {1: (40, 232), 2: (32, 104)}  # of producer and consumer threads, by blocks per SM
CONSUMER_WARPS = 8
STAGING_PITCH = TILE_ROWS + 8  # one 16-byte step of padding: no bank conflicts
TABLE_FIELDS = 5  # first row, rows, format, entry, output column
CODE_WORDS = 4  # 32-bit words of a 16-byte load

OPERAND_TYPES = {"bf16": BFloat16, "fp8": Float8E4M3FN, "int8": Int8}


def pin(accumulators: cute.Tensor) -> None:
    """Tie every accumulator to this point, after ``wait_group(0)``; emits no instruction.

    The wait does not name the registers that asynchronous ``wgmma`` writes, so the compiler may move their
    first read above it. `lint` looks for that in the machine code.
    """
    for i in range(cute.size(accumulators)):
        kind, constraint = (T.f32(), "=f,0") if accumulators.element_type is Float32 else (T.i32(), "=r,0")
        value = llvm.inline_asm(kind, [accumulators[i].ir_value()], "", constraint, has_side_effects=True)
        accumulators[i] = accumulators.element_type(value)


def opaque(value: Int32) -> Int32:
    """The same value, unknown to the compiler: what is derived from it is computed here, not kept in registers
    across tiles for every configuration. Emits no instruction."""
    return Int32(llvm.inline_asm(T.i32(), [value.ir_value()], "", "=r,0", has_side_effects=True))


@dataclass(frozen=True)
class Ring:
    """The slots in shared memory: first byte, and the barriers of slot 0."""

    base: Any
    full: Any
    empty: Any


@dataclass(frozen=True)
class Chunks:
    """Views of the weight chunks in the ring, see `layouts`; the last two modes are (chunk, stage).

    ``codes``: words (4, thread, load); ``third_bits``: words (2, thread), of 3-bit codes; ``scales``: bfloat16 bits
    (row, 0 scale or 1 zero point).
    """

    codes: cute.Tensor
    third_bits: cute.Tensor
    scales: cute.Tensor


@dataclass(frozen=True)
class Scratch:
    """Registers a thread decodes from: words of two loads, third bits, and (`decode.Affine` register, row)."""

    words: cute.Tensor
    third: cute.Tensor
    affine: cute.Tensor

    @staticmethod
    def make() -> "Scratch":
        return Scratch(*(cute.make_rmem_tensor(shape, Int32) for shape in ((CODE_WORDS, 2), (2,), (3, 2))))


@dataclass(frozen=True)
class Queue:
    """Tile numbers on their way from the cluster's first producer: two slots, and their barriers."""

    tiles: cute.Tensor
    full: Any
    empty: Any


@dataclass(frozen=True)
class Place:
    """Where a tile lies: row tile of the weights, first token row, tokens, entry in the stack, output column."""

    row_tile: Int32
    first: Int32
    rows: Int32
    entry: Int32
    column: Int32


def send(value: Int32, target: Any, barrier: Any, rank: Int32) -> None:
    """Write ``value`` to ``target``, and 4 bytes to ``barrier``, in shared memory of block ``rank`` of the cluster."""
    cute.arch.inline_ptx(
        "{ .reg .b32 a, b; mapa.shared::cluster.u32 a, {$r0}, {$r2}; mapa.shared::cluster.u32 b, {$r1}, {$r2}; "
        "st.async.shared::cluster.mbarrier::complete_tx::bytes.b32 [a], {$r3}, [b]; }",
        read_only_args=[target.toint(), barrier.toint(), rank, value],
    )


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
        self.tiles, self.formats, self.operands = config.tiles, config.formats, config.operands
        self.stages, self.slot_bytes, self.max_problems = config.stages, config.slot_bytes, config.max_problems
        self.cluster = config.cluster
        self.producer_registers, self.consumer_registers = REGISTERS[config.blocks_per_sm]

    # ------------------------------------------------------------------------------------------- host side

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
        mmas = [self._mma(tile.format, tile.tokens) for tile in self.tiles]

        stages, max_problems, config = self.stages, self.max_problems, self.config

        @cute.struct
        class Shared:
            barriers: cute.struct.MemRange[Int64, 2 * stages + 4]
            queue: cute.struct.MemRange[Int32, 2]
            ends: cute.struct.MemRange[Int32, max_problems + 1]
            table: cute.struct.MemRange[Int32, max_problems * TABLE_FIELDS]
            token_scales: cute.struct.Align[cute.struct.MemRange[Float32, 2 * config.max_tokens], 16]
            staging: cute.struct.Align[cute.struct.MemRange[BFloat16, config.staged_tokens * STAGING_PITCH], 128]
            ring: cute.struct.Align[cute.struct.MemRange[Uint8, stages * self.slot_bytes], 1024]

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
            block=(THREADS, 1, 1),
            cluster=(self.cluster, 1, 1),
            min_blocks_per_mp=self.config.blocks_per_sm,
            preferred_smem_carveout=100,  # percent: all of it
            stream=stream,
        )

    @staticmethod
    def _typed(tensor: cute.Tensor, operand: str) -> cute.Tensor:
        """8-bit types cross the boundary as uint8."""
        return tensor if operand == "bf16" else cute.recast_tensor(tensor, OPERAND_TYPES[operand])

    @staticmethod
    def _mma(format_: Format, tokens: int) -> cute.TiledMma:
        operand = OPERAND_TYPES[format_.operand]
        source = warpgroup.OperandSource.RMEM if format_.decoded else warpgroup.OperandSource.SMEM
        major = OperandMajorMode.K
        accumulator = Int32 if operand is Int8 else Float32
        return hopper.make_trivial_tiled_mma(
            operand, operand, major, major, accumulator, (2, 1, 1), (64, tokens), source
        )

    @classmethod
    def _weight_map(cls, format_: Format, weight: cute.Tensor) -> tuple:
        """What the producer reads weights through: a TMA atom and its tensor (N, K, entries), or the chunks."""
        if format_.decoded:
            return (weight,)
        rows = cls._typed(weight, format_.operand)
        rows = cute.make_tensor(rows.iterator, cute.select(rows.layout, mode=[1, 2, 0]))
        return cls._tensor_map(rows, format_.operand, TILE_ROWS, 1)

    @staticmethod
    def _tensor_map(tensor: cute.Tensor, operand: str, rows: int, multicast: int) -> tuple:
        """TMA descriptor for boxes of ``rows`` x 128 bytes, fetched in ``multicast`` parts by as many blocks for
        all of them, and the tensor of its coordinates."""
        layout = cute.slice_(GroupGemm._block_layout(operand, rows), (None, None, 0))
        box = (rows, ROW_BYTES * 8 // OPERAND_TYPES[operand].width)
        copy = cpasync.CopyBulkTensorTileG2SOp() if multicast == 1 else cpasync.CopyBulkTensorTileG2SMulticastOp()
        return cpasync.make_tiled_tma_atom(copy, tensor, layout, box, num_multicast=multicast)

    @staticmethod
    def _block_layout(operand: str, rows: int) -> cute.ComposedLayout:
        """Swizzled shared memory layout (rows, columns, 1) of a block of 128-byte rows."""
        kind = OPERAND_TYPES[operand]
        columns = ROW_BYTES * 8 // kind.width
        atom = hopper.get_smem_layout_atom(LayoutEnum.ROW_MAJOR, kind, columns)
        return cute.tile_to_shape(warpgroup.make_smem_layout_atom(atom, kind), (rows, columns, 1), order=(0, 1, 2))

    # ------------------------------------------------------------------------------------------ small parts

    @cute.jit
    def advance(self, stage: Int32, phase: Int32) -> tuple[Int32, Int32]:
        """The next ring slot, and the parity its barriers turn to."""
        stage += 1
        if stage == self.stages:
            stage = Int32(0)
            phase ^= 1
        return stage, phase

    @cute.jit
    def release(self, ring: Ring, stage: Int32, wanted: Boolean) -> None:
        """This warp has read the slot: tell the producer of every block that writes it."""
        lane = cute.arch.lane_idx()
        if const_expr(self.cluster == 1):
            if (lane == 0) & wanted:
                cute.arch.mbarrier_arrive(ring.empty + stage)
        elif (lane < self.cluster) & wanted:
            cute.arch.mbarrier_arrive(ring.empty + stage, peer_cta_rank_in_cluster=lane)

    @cute.jit
    def announce(self, queue: Queue, turn: Int32, drawn: Int32, rank: Int32) -> None:
        """Producers: expect a tile number; the first block's sends lane 0's ``drawn`` to every block."""
        slot = turn % 2
        lane = cute.arch.lane_idx()
        if lane == 0:
            cute.arch.mbarrier_arrive_and_expect_tx(queue.full + slot, 4)
        if rank == 0:
            cute.arch.mbarrier_wait(queue.empty + slot, turn // 2 % 2 ^ 1)
            number = cute.arch.shuffle_sync(drawn, 0)
            if lane < self.cluster:
                send(number, queue.tiles.iterator + slot, queue.full + slot, lane)

    @cute.jit
    def take(self, queue: Queue, turn: Int32, acknowledged: Boolean) -> Int32:
        """The next tile number; ``acknowledged`` by all but the producer that sends it."""
        slot = turn % 2
        cute.arch.mbarrier_wait(queue.full + slot, turn // 2 % 2)
        tile = queue.tiles[slot]
        cute.arch.sync_warp()
        if (cute.arch.lane_idx() == 0) & acknowledged:
            if const_expr(self.cluster == 1):
                cute.arch.mbarrier_arrive(queue.empty + slot)
            else:
                cute.arch.mbarrier_arrive(queue.empty + slot, peer_cta_rank_in_cluster=0)
        return tile

    def row_steps(self, out_features: Int32) -> Int32:
        """Row tiles, or pairs of them in a cluster."""
        rows = TILE_ROWS * self.cluster
        return (out_features + (rows - 1)) // rows

    @cute.jit
    def fill_table(
        self,
        problems: cute.Tensor,
        offsets: cute.Tensor,
        out_features: Int32,
        thread: Int32,
        ends: cute.Tensor,
        table: cute.Tensor,
    ) -> None:
        """Write each problem's row of the table and the running sum of tiles; the whole block takes part."""
        row_steps = self.row_steps(out_features)
        for i in cutlass.range_constexpr((self.max_problems + THREADS - 1) // THREADS):
            p = thread + i * THREADS
            if p < self.max_problems:
                tiles = Int32(0)
                if p < problems.shape[0]:
                    expert, number = problems[p, 0], problems[p, 1]
                    first = offsets[expert]
                    rows = offsets[expert + 1] - first
                    table[p, 0] = first
                    table[p, 1] = rows
                    table[p, 2] = number
                    table[p, 3] = problems[p, 2]
                    table[p, 4] = problems[p, 3]
                    largest = self.largest_tokens(number)
                    tiles = (rows + largest - 1) // largest * row_steps
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
        token_tiles = (rows + tokens - 1) // tokens
        local = tile - ends[p]
        row_step = local // token_tiles
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

    @cute.jit
    def load_one_of(
        self,
        first: cutlass.Constexpr,
        last: cutlass.Constexpr,
        weight_maps: tuple,
        token_maps: tuple,
        ring: Ring,
        number: Int32,
        place: Place,
        rank: Int32,
        row_tiles: Int32,
        features: Int32,
        stage: Int32,
        phase: Int32,
    ) -> tuple[Int32, Int32]:
        """`load` with the one of the configurations ``first .. last - 1`` that the tile takes."""
        if const_expr(last - first == 1):
            weight_map = weight_maps[self.formats.index(self.tiles[first].format)]
            stage, phase = self.load(
                first, weight_map, token_maps[first], ring, place, rank, row_tiles, features, stage, phase
            )
        else:
            middle = (first + last) // 2
            if self.before(middle, number, place.rows):
                stage, phase = self.load_one_of(
                    first, middle, weight_maps, token_maps, ring, number, place, rank, row_tiles, features, stage, phase
                )
            else:
                stage, phase = self.load_one_of(
                    middle, last, weight_maps, token_maps, ring, number, place, rank, row_tiles, features, stage, phase
                )
        return stage, phase

    @cute.jit
    def consume_one_of(
        self,
        first: cutlass.Constexpr,
        last: cutlass.Constexpr,
        mmas: tuple,
        ring: Ring,
        staging: Any,
        shared_scales: cute.Tensor,
        token_scales: tuple,
        channel_scales: tuple,
        number: Int32,
        thread: Int32,
        group: Int32,
        place: Place,
        stored: Boolean,
        features: Int32,
        out: cute.Tensor,
        stage: Int32,
        phase: Int32,
    ) -> tuple[Int32, Int32]:
        """`consume` with the one of the configurations ``first .. last - 1`` that the tile takes."""
        if const_expr(last - first == 1):
            format_ = self.tiles[first].format
            stage, phase = self.consume(
                first, mmas[first], ring, staging, shared_scales, token_scales[self.operands.index(format_.operand)],
                channel_scales[self.formats.index(format_)], thread, group, place, stored, features, out, stage, phase,
            )  # fmt: skip
        else:
            middle = (first + last) // 2
            if self.before(middle, number, place.rows):
                stage, phase = self.consume_one_of(
                    first, middle, mmas, ring, staging, shared_scales, token_scales, channel_scales, number, thread,
                    group, place, stored, features, out, stage, phase,
                )  # fmt: skip
            else:
                stage, phase = self.consume_one_of(
                    middle, last, mmas, ring, staging, shared_scales, token_scales, channel_scales, number, thread,
                    group, place, stored, features, out, stage, phase,
                )  # fmt: skip
        return stage, phase

    def slots(self, tile: Tile, features: Int32) -> Int32:
        """Ring slots of one tile."""
        return (features + (tile.slot_features - 1)) // tile.slot_features

    def blocks(self, ring: Ring, operand: str, rows: int, offset: int, depth: int) -> cute.Tensor:
        """(rows, columns, (depth, stages)) view of the swizzled 128-byte blocks at ``offset`` of every slot."""
        kind = OPERAND_TYPES[operand]
        layout = self._block_layout(operand, rows)
        size = kind.width // 8
        outer = cute.make_layout(
            (layout.outer.shape[0], layout.outer.shape[1], (depth, self.stages)),
            stride=(
                layout.outer.stride[0],
                layout.outer.stride[1],
                (rows * ROW_BYTES // size, self.slot_bytes // size),
            ),
        )
        return cute.make_tensor(cute.recast_ptr(ring.base + offset, layout.inner, dtype=kind), outer)

    def chunk_parts(self, ring: Ring, tile: Tile) -> Chunks:
        """Views of what every weight chunk of every slot holds."""
        format_ = tile.format
        code_bytes = TILE_ROWS * GROUP * format_.bits // 8
        loads = max(1, format_.bits // 2)
        return Chunks(
            self.chunk_view(ring, tile, 0, Int32, (CODE_WORDS, 256, loads), (1, CODE_WORDS, CODE_WORDS * 256)),
            self.chunk_view(ring, tile, CODE_WORDS * 256 * 4, Int32, (2, 256), (1, 2)),
            self.chunk_view(ring, tile, code_bytes, Uint16, (TILE_ROWS, 2), (1, TILE_ROWS)),
        )

    def chunk_view(self, ring: Ring, tile: Tile, offset: int, kind: Any, shape: tuple, stride: tuple) -> cute.Tensor:
        """View of ``shape`` + (chunks, stages) of the bytes at ``offset`` of every weight chunk of every slot."""
        size = kind.width // 8
        layout = cute.make_layout(
            (*shape, tile.slot_features // GROUP, self.stages),
            stride=(*stride, tile.format.chunk_bytes // size, self.slot_bytes // size),
        )
        return cute.make_tensor(cute.recast_ptr(ring.base + offset, dtype=kind), layout)

    # -------------------------------------------------------------------------------------------- producer

    @cute.jit
    def load(
        self,
        i: cutlass.Constexpr,
        weight_map: tuple,
        token_map: tuple,
        ring: Ring,
        place: Place,
        rank: Int32,
        row_tiles: Int32,
        features: Int32,
        stage: Int32,
        phase: Int32,
    ) -> tuple[Int32, Int32]:
        """Fill the slots of one tile with configuration ``i``."""
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
            words = tile.weight_bytes // 4
            row_bytes = (features + (GROUP - 1)) // GROUP * tile.format.chunk_bytes
            row_start = Int64(place.entry * row_tiles + place.row_tile) * row_bytes
            bulk = cute.make_copy_atom(cpasync.CopyBulkG2SOp(), Int32)
        else:
            rows = cute.local_tile(weight_map[1], (TILE_ROWS, columns), (place.row_tile, None, place.entry))
            weight_ring = self.blocks(ring, operand, TILE_ROWS, 0, tile.depth)
            weight_slots, weight_blocks = cpasync.tma_partition(
                weight_map[0],
                0,
                cute.make_layout(1),
                cute.group_modes(weight_ring, 0, 2),
                cute.group_modes(rows, 0, 2),
            )
        for slot in cutlass.range(self.slots(tile, features), unroll=1):
            cute.arch.mbarrier_wait(ring.empty + stage, phase ^ 1)
            full = ring.full + stage
            with cute.arch.elect_one():
                cute.arch.mbarrier_arrive_and_expect_tx(full, tile.weight_bytes + tile.token_bytes)
                if const_expr(tile.format.decoded):
                    start = cute.assume(row_start + slot * tile.weight_bytes, divby=128)
                    at = cute.assume(stage * self.slot_bytes, divby=1024)
                    source = cute.recast_ptr(weight_map[0].iterator + start, dtype=Int32)
                    target = cute.recast_ptr(ring.base + at, dtype=Int32)
                    line = cute.make_layout(words)
                    cute.copy(bulk, cute.make_tensor(source, line), cute.make_tensor(target, line), mbar_ptr=full)
            for d in cutlass.range_constexpr(tile.depth):
                block, at_slot = (None, slot * tile.depth + d), (None, (d, stage))
                if const_expr(not tile.format.decoded):
                    cute.copy(weight_map[0], weight_blocks[block], weight_slots[at_slot], tma_bar_ptr=full)
                cute.copy(token_map[0], token_blocks[block], token_slots[at_slot], tma_bar_ptr=full, **multicast)
            stage, phase = self.advance(stage, phase)
        return stage, phase

    # ------------------------------------------------------------------------------------------- consumers

    @cute.jit
    def multiply_rows(
        self,
        tile: cutlass.Constexpr,
        mma: cute.TiledMma,
        acc: cute.Tensor,
        ring: Ring,
        weights: cute.Tensor,
        tokens: cute.Tensor,
        features: Int32,
        stage: Int32,
        phase: Int32,
    ) -> tuple[Int32, Int32]:
        """Main loop of formats that ``wgmma`` reads from shared memory."""
        previous = stage
        for slot in cutlass.range(self.slots(tile, features), unroll=1):
            cute.arch.mbarrier_wait(ring.full + stage, phase)
            warpgroup.fence()
            for d in cutlass.range_constexpr(tile.depth):
                for k in cutlass.range_constexpr(4):
                    at = (None, None, k, (d, stage))
                    cute.gemm(mma, acc, weights[at], tokens[at], acc)
            warpgroup.commit_group()
            warpgroup.wait_group(1)
            self.release(ring, previous, slot > 0)
            previous = stage
            stage, phase = self.advance(stage, phase)
        warpgroup.wait_group(0)
        pin(acc)
        self.release(ring, previous, Boolean(True))
        return stage, phase

    @cute.jit
    def multiply_bf16(
        self,
        tile: cutlass.Constexpr,
        mma: cute.TiledMma,
        acc: cute.Tensor,
        ring: Ring,
        tokens: cute.Tensor,
        thread: Int32,
        row: Int32,
        features: Int32,
        stage: Int32,
        phase: Int32,
    ) -> tuple[Int32, Int32]:
        """Main loop of formats decoded to bfloat16: half a chunk (64 features) is decoded while ``wgmma`` runs
        on the half before.

        Nothing is in flight where the loop turns: the assembler takes the fragment of such a ``wgmma`` from every
        other configuration of the kernel, and serializes all of them when registers run out.
        """
        chunks = self.chunk_parts(ring, tile)
        fragments = [cute.make_rmem_tensor(mma.partition_shape_A((TILE_ROWS, 64)), BFloat16) for _ in range(2)]
        registers = [self.as_registers(fragment) for fragment in fragments]
        scratch = Scratch.make()
        steps = 2 * tile.slot_features // GROUP
        slots = self.slots(tile, features)
        cute.arch.mbarrier_wait(ring.full + stage, phase)
        self.decode_bf16(tile, chunks, scratch, registers[0], thread, row, 0, stage)
        for slot in cutlass.range(slots, unroll=1):
            after, after_phase = self.advance(stage, phase)
            for step in cutlass.range_constexpr(steps):
                warpgroup.fence()
                for b in cutlass.range_constexpr(4):
                    at = (None, None, b, (step, stage))
                    cute.gemm(mma, acc, fragments[step % 2][None, None, b], tokens[at], acc)
                warpgroup.commit_group()
                warpgroup.wait_group(1)  # the fragment of the step before is free
                if const_expr(step + 1 < steps):
                    self.decode_bf16(tile, chunks, scratch, registers[(step + 1) % 2], thread, row, step + 1, stage)
                elif slot + 1 < slots:
                    cute.arch.mbarrier_wait(ring.full + after, after_phase)
                    self.decode_bf16(tile, chunks, scratch, registers[0], thread, row, 0, after)
            warpgroup.wait_group(0)
            self.release(ring, stage, Boolean(True))
            stage, phase = after, after_phase
        pin(acc)
        return stage, phase

    @cute.jit
    def decode_bf16(
        self,
        tile: cutlass.Constexpr,
        chunks: Chunks,
        scratch: Scratch,
        registers: cute.Tensor,
        thread: Int32,
        row: Int32,
        step: cutlass.Constexpr,
        stage: Int32,
    ) -> None:
        """Half-chunk ``step`` of a slot to the fragment ``registers``."""
        format_ = tile.format
        c, half = step // 2, step % 2
        words, third, affine = scratch.words, scratch.third, scratch.affine
        if const_expr(format_.bits == 8):
            cute.autovec_copy(chunks.codes[None, thread, 2 * half, c, stage], words[None, 0])
            cute.autovec_copy(chunks.codes[None, thread, 2 * half + 1, c, stage], words[None, 1])
        elif const_expr(format_.bits == 4):
            cute.autovec_copy(chunks.codes[None, thread, half, c, stage], words[None, 0])
        elif const_expr(half == 0):
            cute.autovec_copy(chunks.codes[None, thread, 0, c, stage], words[None, 0])
            if const_expr(format_.bits == 3):
                cute.autovec_copy(chunks.third_bits[None, thread, c, stage], third)
        if const_expr(format_.grouped and half == 0):
            for r in cutlass.range_constexpr(2):
                zero = chunks.scales[row + 8 * r, 1, c, stage] if const_expr(format_.zeros) else None
                for j, value in enumerate(decode.affine(chunks.scales[row + 8 * r, 0, c, stage], zero).registers):
                    affine[j, r] = value
        rows = [decode.Affine(*(affine[j, r] for j in range(3 if format_.zeros else 1))) for r in range(2)]
        for b in cutlass.range_constexpr(4):
            for r in cutlass.range_constexpr(4):
                block = 4 * half + b
                if const_expr(format_.bits == 8):
                    value = decode.bf16_from_8bit(words[2 * (b % 2) + r // 2, b // 2], r)
                elif const_expr(format_.bits == 4):
                    value = decode.bf16_from_4bit(words[b, 0], r, rows[r % 2])
                elif const_expr(format_.bits == 3):
                    value = decode.bf16_from_3bit(words[block // 2, 0], third[half], block, r, rows[r % 2])
                else:
                    value = decode.bf16_from_2bit(words[block // 2, 0], block, r, rows[r % 2])
                registers[r, b] = value

    @staticmethod
    def as_registers(fragment: cute.Tensor) -> cute.Tensor:
        """(register, k block) view of an A fragment."""
        blocks = cute.size(fragment, mode=[2])
        return cute.make_tensor(cute.recast_ptr(fragment.iterator, dtype=Int32), cute.make_layout((4, blocks)))

    @cute.jit
    def multiply_fp8(
        self,
        tile: cutlass.Constexpr,
        mma: cute.TiledMma,
        acc: cute.Tensor,
        ring: Ring,
        tokens: cute.Tensor,
        thread: Int32,
        row: Int32,
        features: Int32,
        stage: Int32,
        phase: Int32,
    ) -> tuple[Int32, Int32]:
        """Main loop of 4-bit codes decoded to e4m3: each group of 128 features is summed on its own, then added
        to the total in float32 with its scale.

        A group's ``wgmma`` follow one another at once; its sums are added and the next group is decoded while the
        other warpgroup's run. Codes of the next group's first half are fetched before the wait, those of the second
        when the sums' registers are free.
        """
        chunks = self.chunk_parts(ring, tile)
        fragments = [cute.make_rmem_tensor(mma.partition_shape_A((TILE_ROWS, 64)), Float8E4M3FN) for _ in range(2)]
        registers = [self.as_registers(fragment) for fragment in fragments]
        words = cute.make_rmem_tensor((CODE_WORDS, 2), Int32)
        partial = cute.make_rmem_tensor(acc.layout, Float32)
        partial.fill(0.0)
        groups = tile.slot_features // GROUP
        slots = self.slots(tile, features)
        cute.arch.mbarrier_wait(ring.full + stage, phase)
        for half in cutlass.range_constexpr(2):
            cute.autovec_copy(chunks.codes[None, thread, half, 0, stage], words[None, half])
            self.decode_fp8(words, half, registers[half])
        for slot in cutlass.range(slots, unroll=1):
            after, after_phase = self.advance(stage, phase)
            for c in cutlass.range_constexpr(groups):
                warpgroup.fence()
                for half in cutlass.range_constexpr(2):
                    for b in cutlass.range_constexpr(2):
                        mma.set(warpgroup.Field.ACCUMULATE, half + b > 0)
                        at = (None, None, 2 * half + b, (c, stage))
                        cute.gemm(mma, partial, fragments[half][None, None, b], tokens[at], partial)
                warpgroup.commit_group()
                scale0 = decode.bf16_value(chunks.scales[row, 0, c, stage]) * 512.0  # codes are times 2**-9
                scale1 = decode.bf16_value(chunks.scales[row + 8, 0, c, stage]) * 512.0
                next_chunk, next_stage = (c + 1, stage) if c + 1 < groups else (0, after)
                if const_expr(c + 1 < groups):
                    cute.autovec_copy(chunks.codes[None, thread, 0, c + 1, stage], words[None, 0])
                elif slot + 1 < slots:
                    cute.arch.mbarrier_wait(ring.full + after, after_phase)
                    cute.autovec_copy(chunks.codes[None, thread, 0, 0, after], words[None, 0])
                warpgroup.wait_group(0)
                pin(partial)
                self.add_scaled(acc, partial, scale0, scale1)
                cute.autovec_copy(chunks.codes[None, thread, 1, next_chunk, next_stage], words[None, 1])
                for half in cutlass.range_constexpr(2):
                    self.decode_fp8(words, half, registers[half])
            self.release(ring, stage, Boolean(True))
            stage, phase = after, after_phase
        return stage, phase

    @staticmethod
    def decode_fp8(words: cute.Tensor, half: int, registers: cute.Tensor) -> None:
        """Half of a chunk, two k32 blocks, to the fragment ``registers``."""
        for b in range(2):
            for r in range(4):
                registers[r, b] = decode.fp8_from_4bit(words[2 * b + r // 2, half], r)

    @staticmethod
    def add_scaled(acc: cute.Tensor, partial: cute.Tensor, scale0: Float32, scale1: Float32) -> None:
        """acc += partial * (scale of the thread's first or second row)."""
        for e in range(cute.size(acc)):
            acc[e] = acc[e] + partial[e] * (scale0 if (e // 2) % 2 == 0 else scale1)

    @cute.jit
    def consume(
        self,
        i: cutlass.Constexpr,
        mma: cute.TiledMma,
        ring: Ring,
        staging: Any,
        shared_scales: cute.Tensor,
        token_scales: cute.Tensor,
        channel_scales: cute.Tensor,
        thread: Int32,
        group: Int32,
        place: Place,
        stored: Boolean,
        features: Int32,
        out: cute.Tensor,
        stage: Int32,
        phase: Int32,
    ) -> tuple[Int32, Int32]:
        """Multiply one tile with configuration ``i`` and, if ``stored``, store this warpgroup's 64 rows."""
        tile = self.tiles[i]
        format_ = tile.format
        thread = opaque(thread)
        lane, in_group = thread % 32, thread % 128
        row = (thread // 32) * 16 + lane // 4  # of the thread's two rows, row and row + 8, in the tile
        scale_row = place.row_tile * TILE_ROWS + row
        channel0, channel1 = Float32(1.0), Float32(1.0)
        if const_expr(format_.channel_scaled):
            channel0, channel1 = channel_scales[place.entry, scale_row], channel_scales[place.entry, scale_row + 8]
        fetched = cute.make_rmem_tensor(((tile.tokens + 127) // 128,), Float32)
        if const_expr(format_.token_scaled):
            for j in cutlass.range_constexpr(cute.size(fetched)):
                fetched[j] = Float32(0.0)
                if in_group + 128 * j < place.rows:
                    fetched[j] = token_scales[place.first + in_group + 128 * j]

        mma.set(warpgroup.Field.ACCUMULATE, True)
        part = mma.get_slice(cute.make_layout(2, stride=128)(group))
        token_blocks = self.blocks(ring, format_.operand, tile.tokens, tile.token_offset, tile.depth)
        tokens = mma.make_fragment_B(part.partition_B(token_blocks))
        kind = Int32 if format_.operand == "int8" else Float32
        acc = cute.make_rmem_tensor(mma.partition_shape_C((TILE_ROWS, tile.tokens)), kind)
        acc.fill(0)
        if const_expr(not format_.decoded):
            weight_blocks = self.blocks(ring, format_.operand, TILE_ROWS, 0, tile.depth)
            weights = mma.make_fragment_A(part.partition_A(weight_blocks))
            stage, phase = self.multiply_rows(tile, mma, acc, ring, weights, tokens, features, stage, phase)
        elif const_expr(format_.operand == "bf16"):
            stage, phase = self.multiply_bf16(tile, mma, acc, ring, tokens, thread, row, features, stage, phase)
        else:
            stage, phase = self.multiply_fp8(tile, mma, acc, ring, tokens, thread, row, features, stage, phase)

        if const_expr(format_.token_scaled):
            for j in cutlass.range_constexpr(cute.size(fetched)):
                if in_group + 128 * j < tile.tokens:
                    shared_scales[in_group + 128 * j, group] = fetched[j]
        row8 = cute.assume(group * 64 + (in_group % 8) * 8, divby=8)  # of the 8 rows this thread stores
        pair = cute.make_rmem_tensor((2,), Float32)
        eight = cute.make_rmem_tensor((8,), BFloat16)
        for start in cutlass.range_constexpr(0, tile.tokens, EPILOGUE_TOKENS):
            staged = min(tile.tokens - start, EPILOGUE_TOKENS)
            staging_tile = cute.make_tensor(staging, cute.make_layout((TILE_ROWS, staged), stride=(1, STAGING_PITCH)))
            staging_mma = self._mma(Format("bf16", 16), staged)
            store = cute.make_copy_atom(warp.StMatrix8x8x16bOp(True, 4), BFloat16)
            to_staging = cute.make_tiled_copy_C(store, staging_mma)
            values = cute.make_rmem_tensor(staging_mma.partition_shape_C((TILE_ROWS, staged)), Float32)
            rounded = cute.make_fragment_like(values, BFloat16)
            cute.arch.barrier(barrier_id=1 + group, number_of_threads=128)
            for e in cutlass.range_constexpr(cute.size(values)):
                value = Float32(acc[start // 2 + e])
                if const_expr(format_.channel_scaled):
                    value = value * (channel0 if (e // 2) % 2 == 0 else channel1)
                if const_expr(format_.token_scaled):
                    if const_expr(e % 4 == 0):
                        at = cute.assume(start + 2 * e + 2 * (lane % 4), divby=2)
                        scale_pair = cute.make_tensor(shared_scales[None, group].iterator + at, cute.make_layout(2))
                        cute.autovec_copy(scale_pair, pair)
                    value = value * pair[e % 2]
                values[e] = value
            rounded.store(values.load().to(BFloat16))
            cute.copy(to_staging, to_staging.retile(rounded), to_staging.get_slice(thread).partition_D(staging_tile))
            cute.arch.barrier(barrier_id=1 + group, number_of_threads=128)
            if stored:
                for j in cutlass.range_constexpr(staged // 16):
                    token = in_group // 8 + 16 * j
                    if start + token < place.rows:
                        source = cute.assume(token * STAGING_PITCH + row8, divby=8)
                        target = Int64(place.first + start + token) * out.shape[1] + place.column
                        target = cute.assume(target + place.row_tile * TILE_ROWS + row8, divby=8)
                        cute.autovec_copy(cute.make_tensor(staging + source, cute.make_layout(8)), eight)
                        cute.autovec_copy(eight, cute.make_tensor(out.iterator + target, cute.make_layout(8)))
        return stage, phase

    # ---------------------------------------------------------------------------------------------- kernel

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
        full = shared.barriers.data_ptr()
        ring = Ring(shared.ring.data_ptr(), full, full + self.stages)
        queue_full = full + 2 * self.stages
        queue = Queue(shared.queue.get_tensor(cute.make_layout(2)), queue_full, queue_full + 2)
        ends = shared.ends.get_tensor(cute.make_layout(self.max_problems + 1))
        table = shared.table.get_tensor(cute.make_layout((self.max_problems, TABLE_FIELDS), stride=(TABLE_FIELDS, 1)))
        if warp_number == 0:
            with cute.arch.elect_one():
                for s in cutlass.range_constexpr(self.stages):
                    cute.arch.mbarrier_init(ring.full + s, 1)
                    cute.arch.mbarrier_init(ring.empty + s, CONSUMER_WARPS * self.cluster)
                for s in cutlass.range_constexpr(2):
                    cute.arch.mbarrier_init(queue.full + s, 1)
                    cute.arch.mbarrier_init(queue.empty + s, CONSUMER_WARPS * self.cluster + self.cluster - 1)
            cute.arch.mbarrier_init_fence()
        if warp_number == 1:  # descriptors on their way while the table is made
            for maps in (weight_maps, token_maps):
                for tensor_map in maps:
                    if const_expr(len(tensor_map) == 2):
                        cpasync.prefetch_descriptor(tensor_map[0])
        if const_expr(self.cluster > 1):
            cute.arch.cluster_arrive_relaxed()
        self.fill_table(problems, offsets, out_features, thread, ends, table)
        if const_expr(self.cluster > 1):
            cute.arch.cluster_wait()  # both blocks' barriers exist

        total = ends[self.max_problems]
        row_tiles = (out_features + (TILE_ROWS - 1)) // TILE_ROWS
        rank = block % self.cluster
        tile = block // self.cluster
        clusters = blocks // self.cluster
        stage, phase = Int32(0), Int32(0)
        turn = Int32(0)  # tiles taken from the queue
        if warp_number < 4:
            cute.arch.setmaxregister_decrease(self.producer_registers)
            if warp_number == 0:
                while tile < total:
                    drawn = Int32(0)
                    if (rank == 0) & (lane == 0):
                        drawn = cute.arch.atomic_add(counters.iterator, Int32(1)) + clusters
                    number, at = self.locate(tile, lane, ends, table)
                    place = self.readable(at, rank, row_tiles)
                    stage, phase = self.load_one_of(
                        0, len(self.tiles), weight_maps, token_maps, ring, number, place, rank, row_tiles, features,
                        stage, phase,
                    )  # fmt: skip
                    self.announce(queue, turn, drawn, rank)
                    tile = self.take(queue, turn, rank != 0)
                    turn += 1
                if (rank == 0) & (lane == 0):  # every cluster draws until its number is past the end
                    finished = cute.arch.atomic_add(counters.iterator + 1, Int32(1)) + 1
                    if finished == clusters:
                        counters[0] = Int32(0)
                        counters[1] = Int32(0)
        else:
            cute.arch.setmaxregister_increase(self.consumer_registers)
            consumer = thread - 128
            group = cute.arch.make_warp_uniform(consumer // 128)
            staging = shared.staging.data_ptr()
            scales = shared.token_scales.get_tensor(cute.make_layout((self.config.max_tokens, 2)))
            while tile < total:
                number, at = self.locate(tile, lane, ends, table)
                stored = (at.row_tile + rank) * TILE_ROWS + group * 64 < out_features
                place = self.readable(at, rank, row_tiles)
                stage, phase = self.consume_one_of(
                    0, len(self.tiles), mmas, ring, staging, scales, token_scales, channel_scales, number, consumer,
                    group, place, stored, features, out, stage, phase,
                )  # fmt: skip
                tile = self.take(queue, turn, Boolean(True))
                turn += 1
        if const_expr(self.cluster > 1):  # neither leaves while the other may still write to it
            cute.arch.cluster_arrive()
            cute.arch.cluster_wait()

    def readable(self, at: Place, rank: Int32, row_tiles: Int32) -> Place:
        """The place of this block of a cluster; past the last row tile it reads the last one, and stores nothing."""
        row_tile = at.row_tile if self.cluster == 1 else cutlass.min(at.row_tile + rank, row_tiles - 1)
        return Place(row_tile, at.first, at.rows, at.entry, at.column)
