"""The epilogue of a consumer warpgroup's tile: scales, SwiGLU, rounding and the store (CuTe DSL).

Accumulators x token scale x channel scale -> bfloat16 -> transposed ``stmatrix`` to a padded tile of up to 64 tokens ->
16-byte row stores, predicated by the expert's rows and by N. `split_epilogue` adds up the parts of a split first.
"""

from dataclasses import dataclass
from typing import Any

import cutlass
import cutlass.utils.hopper_helpers as hopper
from cutlass import BFloat16, Boolean, Float32, Int8, Int32, Int64, const_expr, cute
from cutlass.cute.nvgpu import OperandMajorMode, warp, warpgroup

from mxmoe_steps.kernels.codes.format import HALF_ROWS, Format
from mxmoe_steps.kernels.codes.w16a16 import W16A16
from mxmoe_steps.kernels.limits import GATE_ROWS
from mxmoe_steps.kernels.rounding import swiglu
from mxmoe_steps.kernels.sm90.config import EPILOGUE_TOKENS, KernelConfig, Tile
from mxmoe_steps.kernels.sm90.registers import row_of
from mxmoe_steps.kernels.sm90.ring import OPERAND_TYPES
from mxmoe_steps.kernels.sm90.scheduler import Place


def tiled_mma(config: KernelConfig, format_: Format, tokens: int) -> cute.TiledMma:
    """``wgmma`` of a tile, by all warpgroups of a part."""
    operand = OPERAND_TYPES[format_.operand]
    source = warpgroup.OperandSource.RMEM if format_.decoded else warpgroup.OperandSource.SMEM
    major = OperandMajorMode.K
    accumulator = Int32 if operand is Int8 else Float32
    groups = (config.rows // HALF_ROWS, 1, 1)
    return hopper.make_trivial_tiled_mma(operand, operand, major, major, accumulator, groups, (64, tokens), source)


def store_if(condition: Boolean, words: cute.Tensor, target: Int64) -> None:
    """Write two or four words to the global address ``target``, on ``condition``: behind a branch, every store would
    wait for its own words."""
    count = cute.size(words)
    names = ", ".join(f"{{$r{i + 1}}}" for i in range(count))
    cute.arch.inline_ptx(
        f"st.global.v{count}.b32 [{{$r0}}], {{{names}}};",
        read_only_args=[target, *(words[i] for i in range(count))],
        predicate=condition,
    )


def store_matrices(address: Int32, first: Int32, second: Int32) -> None:
    """Two 8 x 8 matrices of 16-bit elements, transposed, to shared memory: a lane has two elements of a row of each;
    lanes 8 i to 8 i + 7 have the addresses of the columns of matrix i."""
    cute.arch.inline_ptx(
        "stmatrix.sync.aligned.m8n8.x2.trans.shared.b16 [{$r0}], {{$r1}, {$r2}};",
        read_only_args=[address, first, second],
    )


@dataclass(frozen=True)
class Scales:
    """Factors of the tensors' rows and tokens, in global memory: of tokens [rows], of channels [entries, N]."""

    tokens: cute.Tensor
    channels: cute.Tensor


@dataclass(frozen=True)
class Factors:
    """What a thread multiplies the sums by: factors of rows and of tokens, on their way while its tile is multiplied.
    Nothing is done with them before: it would wait for them."""

    channels: cute.Tensor
    tokens: cute.Tensor


@dataclass(frozen=True)
class Output:
    """``tensor``: bfloat16 [rows, columns]; ``stored``: whether the tile's rows are this block's to store."""

    tensor: cute.Tensor
    stored: Boolean

    def address(self, place: Place, token: Int32, *columns: Int32) -> Int64:
        """Of a token of the tile at ``place``, and the sum of ``columns`` of its problem."""
        at = Int64(place.first + token) * self.tensor.shape[1] + place.column
        for column in columns:
            at = at + column
        return self.tensor.iterator.toint() + 2 * at

    def pitch(self, tokens: int) -> Int64:
        """Bytes between rows that are ``tokens`` apart."""
        return 2 * tokens * Int64(self.tensor.shape[1])


@dataclass(frozen=True)
class Epilogue:
    """Of one tile. ``staging``: shared memory for a tile on its way out, or for the sums of parts; ``thread``: of the
    part; ``group``: its warpgroup."""

    config: KernelConfig
    tile: Tile
    staging: Any
    thread: Int32
    group: Int32

    @property
    def lane(self) -> Int32:
        return self.thread & 31

    @property
    def in_group(self) -> Int32:
        return self.thread & 127

    @property
    def row_scaled(self) -> bool:
        """Whether sums are multiplied by something that belongs to a row."""
        return self.tile.format.channel_scaled or self.tile.format.growth != 1

    @property
    def stored_rows(self) -> int:
        """Columns of the output that the rows of a tile become."""
        return self.config.rows // 2 if self.config.gated else self.config.rows

    def fetch(self, scales: Scales, place: Place) -> Factors:
        """The factors of what the thread will store."""
        raise NotImplementedError

    def store(self, acc: cute.Tensor, factors: Factors, place: Place, output: Output) -> None:
        """Scale and round the sums, and store them."""
        raise NotImplementedError

    @cute.jit
    def grow(self, factors: Factors) -> None:
        """Make up for what decoded weights lack."""
        if const_expr(self.tile.format.growth != 1):
            factors.channels.store(factors.channels.load() * Float32(self.tile.format.growth))

    @cute.jit
    def token_factor(self, scales: Scales, token: Int32, place: Place) -> Float32:
        """What the sums of a token of the tile are to be multiplied by; 0 past the last."""
        factor = Float32(0.0)
        if const_expr(self.tile.format.token_scaled):  # noqa: SIM102 (known when the kernel is compiled)
            if token < place.rows:
                factor = scales.tokens[place.first + token]
        return factor


@dataclass(frozen=True)
class TileEpilogue(Epilogue):
    """Of a whole tile, through a staging tile; ``shared_scales``: [tokens, warpgroups], of the tile's tokens."""

    shared_scales: cute.Tensor

    @cute.jit
    def fetch(self, scales: Scales, place: Place) -> Factors:
        """Of the thread's two rows, and of tokens thread, thread + 128, ..."""
        format_, tokens = self.tile.format, self.tile.tokens
        row = place.row_tile * self.config.rows + (self.thread >> 5) * 16 + (self.lane >> 2)
        by_row = cute.make_rmem_tensor((2,), Float32)
        by_token = cute.make_rmem_tensor(((tokens + 127) // 128,), Float32)
        for r in cutlass.range_constexpr(2):
            by_row[r] = scales.channels[place.entry, row + 8 * r] if format_.channel_scaled else Float32(1.0)
        for j in cutlass.range_constexpr(cute.size(by_token)):
            by_token[j] = self.token_factor(scales, self.in_group + 128 * j, place)
        return Factors(by_row, by_token)

    @cute.jit
    def store(self, acc: cute.Tensor, factors: Factors, place: Place, output: Output) -> None:
        """Scale and round the sums, and store them."""
        tokens, pitch, in_group = self.tile.tokens, self.config.staging_pitch, self.in_group
        shared_scales = self.shared_scales
        self.grow(factors)
        if const_expr(self.tile.format.token_scaled):
            for j in cutlass.range_constexpr(cute.size(factors.tokens)):
                if in_group + 128 * j < tokens:
                    shared_scales[in_group + 128 * j, self.group] = factors.tokens[j]
        own_rows = HALF_ROWS // 2 if self.config.gated else HALF_ROWS  # columns of the output, of a warpgroup
        lanes = own_rows // 8  # that store a token, 16 bytes each
        at_once = 128 // lanes  # tokens that a warpgroup stores
        column8 = cute.assume(self.group * own_rows + (in_group & (lanes - 1)) * 8, divby=8)
        token = in_group >> (lanes.bit_length() - 1)  # the first one
        source = cute.assume(token * pitch + column8, divby=8)
        address = output.address(place, token, place.row_tile * self.stored_rows, column8)
        for start in cutlass.range_constexpr(0, tokens, EPILOGUE_TOKENS):
            staged = min(tokens - start, EPILOGUE_TOKENS)
            cute.arch.barrier(barrier_id=1 + self.group, number_of_threads=128)
            if const_expr(self.config.gated):
                self.stage_products(acc, factors, start, staged)
            else:
                self.stage(acc, factors, start, staged)
            cute.arch.barrier(barrier_id=1 + self.group, number_of_threads=128)
            words = cute.make_rmem_tensor((4, (staged + at_once - 1) // at_once), Int32)
            for j in cutlass.range_constexpr(cute.size(words, mode=[1])):
                staged_words = cute.recast_ptr(self.staging + source + at_once * j * pitch, dtype=Int32)
                cute.autovec_copy(cute.make_tensor(staged_words, cute.make_layout(4)), words[None, j])
            for j in cutlass.range_constexpr(cute.size(words, mode=[1])):
                store_if(output.stored & (start + token + at_once * j < place.rows), words[None, j], address)
                address += output.pitch(at_once)

    @cute.jit
    def scale(self, acc: cute.Tensor, factors: Factors, start: cutlass.Constexpr, values: cute.Tensor) -> None:
        """``values``, float32: sums of the tokens from ``start`` on, in the order of accumulators."""
        pair = cute.make_rmem_tensor((2,), Float32)
        for e in cutlass.range_constexpr(cute.size(values)):
            value = Float32(acc[start // 2 + e])
            if const_expr(self.row_scaled):
                value = value * factors.channels[row_of(e)]
            if const_expr(self.tile.format.token_scaled):
                if const_expr(e % 4 == 0):
                    at = cute.assume(start + 2 * e + 2 * (self.lane & 3), divby=2)
                    scale_pair = self.shared_scales[None, self.group].iterator + at
                    cute.autovec_copy(cute.make_tensor(scale_pair, cute.make_layout(2)), pair)
                value = value * pair[e % 2]
            values[e] = value

    @cute.jit
    def stage(self, acc: cute.Tensor, factors: Factors, start: cutlass.Constexpr, staged: cutlass.Constexpr) -> None:
        """Sums of ``staged`` tokens from ``start`` on to the staging tile."""
        rows = self.config.rows
        layout = cute.make_layout((rows, staged), stride=(1, self.config.staging_pitch))
        staging_mma = tiled_mma(self.config, W16A16(), staged)
        copy = cute.make_copy_atom(warp.StMatrix8x8x16bOp(True, min(4, staged // 4)), BFloat16)
        to_staging = cute.make_tiled_copy_C(copy, staging_mma)
        values = cute.make_rmem_tensor(staging_mma.partition_shape_C((rows, staged)), Float32)
        rounded = cute.make_fragment_like(values, BFloat16)
        self.scale(acc, factors, start, values)
        rounded.store(values.load().to(BFloat16))
        target = to_staging.get_slice(self.thread).partition_D(cute.make_tensor(self.staging, layout))
        cute.copy(to_staging, to_staging.retile(rounded), target)

    @cute.jit
    def stage_products(
        self, acc: cute.Tensor, factors: Factors, start: cutlass.Constexpr, staged: cutlass.Constexpr
    ) -> None:
        """As `stage`, of gate and up: a thread's first row and its second one, which become one."""
        pitch = self.config.staging_pitch
        lines = self.staging + ((self.lane & 15) * pitch + (self.thread >> 5) * GATE_ROWS)  # of the lane's tokens
        in_order = cute.make_layout(
            (2, 2, staged // 8), stride=(1, staged // 4, 2)
        )  # token, gate or up, pair of tokens
        values = cute.make_rmem_tensor((staged // 4, 2), Float32)
        self.scale(acc, factors, start, cute.make_tensor(values.iterator, in_order))
        rounded = cute.make_fragment_like(values, BFloat16)
        rounded.store(values.load().to(BFloat16))
        products = swiglu(rounded[None, 0], rounded[None, 1])
        matrices = cute.make_tensor(cute.recast_ptr(products.iterator, dtype=Int32), cute.make_layout(staged // 8))
        for j in cutlass.range_constexpr(0, staged // 8, 2):
            store_matrices(lines.toint() + 2 * 8 * j * pitch, matrices[j], matrices[j + 1])
