"""The ring of slots in shared memory: its barriers, its views, and how far a warp has come in it (CuTe DSL)."""

from dataclasses import dataclass
from typing import Any

import cutlass
import cutlass.utils.hopper_helpers as hopper
from cutlass import BFloat16, Boolean, Float8E4M3FN, Int8, Int32, const_expr, cute
from cutlass.cute.nvgpu import warpgroup
from cutlass.utils import LayoutEnum

from mxmoe_steps.kernels.codes.format import GROUP, HALF_ROWS
from mxmoe_steps.kernels.sm90.config import ROW_BYTES, UNIT, KernelConfig, Tile

OPERAND_TYPES = {"bf16": BFloat16, "fp8": Float8E4M3FN, "int8": Int8}


def ceil_div(value: Int32, divisor: int) -> Int32:
    """``value``, not negative, by a power of two, rounded up: `//` also takes negative numbers, in a dozen instructions
    that follow one another."""
    return (value + (divisor - 1)) >> (divisor.bit_length() - 1)


def block_layout(operand: str, rows: int) -> cute.ComposedLayout:
    """Swizzled shared memory layout (rows, columns, 1) of a block of 128-byte rows."""
    kind = OPERAND_TYPES[operand]
    columns = ROW_BYTES * 8 // kind.width
    atom = hopper.get_smem_layout_atom(LayoutEnum.ROW_MAJOR, kind, columns)
    return cute.tile_to_shape(warpgroup.make_smem_layout_atom(atom, kind), (rows, columns, 1), order=(0, 1, 2))


@dataclass(frozen=True)
class Position:
    """How far a warp has come in a ring: the next slot, the parity of its barriers, and the unit where the slot before
    it ends."""

    stage: Int32
    phase: Int32
    end: Int32


@dataclass(frozen=True)
class Chunks:
    """Views of a thread's part of the weight chunks in the ring, see `layouts`: 32-bit words; the last modes are
    (chunk, first unit of the slot).

    ``codes``: (words of the load), one view for each of `Format.loads`; ``numbers``: of its two rows, a pair a word.
    """

    codes: tuple[cute.Tensor, ...]
    numbers: cute.Tensor


@dataclass(frozen=True)
class Ring:
    """The slots that one producer fills: first byte in shared memory, and the barriers of slot 0."""

    config: KernelConfig
    base: Any
    full: Any
    empty: Any

    @staticmethod
    def of(config: KernelConfig, part: Any, base: Any, barriers: Any) -> "Ring":
        """The ring of one part of a split, from the first byte of all of them and the first of their barriers."""
        start = cute.assume(part * (config.ring_units * UNIT), divby=UNIT)
        full = barriers + part * config.stages
        return Ring(config, base + start, full, full + config.split * config.stages)

    @cute.jit
    def advance(self, stage: Int32, phase: Int32) -> tuple[Int32, Int32]:
        """The next slot, and the parity of its barriers."""
        stage += 1
        if stage == self.config.stages:
            stage = Int32(0)
            phase ^= 1
        return stage, phase

    def begin(self, tile: Tile, end: Int32) -> Int32:
        """First unit of a slot of ``tile`` if the slot before it ends at ``end``: there, unless the ring ends too
        early."""
        return cutlass.select_(end + tile.slot_units > self.config.ring_units, Int32(0), end)

    def after(self, tile: Tile, begin: Int32, position: Position) -> Position:
        """The position behind a slot of ``tile`` that begins at unit ``begin``."""
        stage, phase = self.advance(position.stage, position.phase)
        return Position(stage, phase, begin + tile.slot_units)

    def wait_full(self, position: Position) -> None:
        """Until the slot is filled."""
        cute.arch.mbarrier_wait(self.full + position.stage, position.phase)

    @cute.jit
    def release(self, stage: Int32, condition: Boolean) -> None:
        """This warp has read the slot, on ``condition``: tell the producer of every block that writes it."""
        lane = cute.arch.lane_idx()
        if const_expr(self.config.cluster == 1):
            if (lane == 0) & condition:
                cute.arch.mbarrier_arrive(self.empty + stage)
        elif (lane < self.config.cluster) & condition:
            cute.arch.mbarrier_arrive(self.empty + stage, peer_cta_rank_in_cluster=lane)

    def slots(self, tile: Tile, features: Int32, part: Int32) -> Int32:
        """Slots of one tile that go to ``part`` of a split: slot ``part`` and every ``split``-th one after it."""
        return ceil_div(ceil_div(features, tile.slot_features) - part, self.config.split)

    def blocks(self, operand: str, rows: int, offset: int, depth: int) -> cute.Tensor:
        """(rows, columns, (depth, units)) view of the swizzled 128-byte blocks at ``offset`` of a slot that starts at
        any unit of the ring."""
        layout = block_layout(operand, rows)
        size = OPERAND_TYPES[operand].width // 8
        outer = cute.make_layout(
            (layout.outer.shape[0], layout.outer.shape[1], (depth, self.config.ring_units)),
            stride=(layout.outer.stride[0], layout.outer.stride[1], (rows * ROW_BYTES // size, UNIT // size)),
        )
        return cute.make_tensor(cute.recast_ptr(self.base + offset, layout.inner, dtype=OPERAND_TYPES[operand]), outer)

    def token_blocks(self, tile: Tile) -> cute.Tensor:
        """View of a slot's activations."""
        return self.blocks(tile.format.operand, tile.tokens, tile.token_offset, tile.depth)

    def weight_blocks(self, tile: Tile) -> cute.Tensor:
        """View of a slot's weights, of formats that are rows."""
        return self.blocks(tile.format.operand, tile.rows, 0, tile.depth)

    def chunks(self, tile: Tile, thread: Int32) -> Chunks:
        """Views of what every weight chunk of a slot holds for ``thread``, by the slot's first unit."""
        format_ = tile.format
        words, halves = format_.half_bytes // 4, tile.rows // HALF_ROWS
        codes, offset = [], 0
        for load in format_.loads:
            layout = ((128, halves), load.words), ((load.words, words), 1)
            codes.append(self._chunk_view(tile, offset, *layout, thread))
            offset += 128 * 4 * load.words
        count = max(1, format_.all_numbers)  # a format without has a view of nothing
        rows = ((HALF_ROWS // 2, halves), count), ((count, words), 1)
        numbers = self._chunk_view(tile, offset, *rows, thread >> 2)  # four lanes share a pair of rows
        return Chunks(tuple(codes), numbers)

    def _chunk_view(self, tile: Tile, offset: int, shape: tuple, stride: tuple, at: Int32) -> cute.Tensor:
        """View of ``shape`` + (chunks, units) of the words at ``offset`` of every weight chunk of a slot, where the
        first mode is ``at``: cut there once, so that a slot costs one addition."""
        chunk_words = tile.format.half_bytes * (tile.rows // HALF_ROWS) // 4
        layout = cute.make_layout(
            (*shape, tile.slot_features // GROUP, self.config.ring_units), stride=(*stride, chunk_words, UNIT // 4)
        )
        view = cute.make_tensor(cute.recast_ptr(self.base + offset, dtype=Int32), layout)
        return view[at, *(None for _ in range(len(shape) + 1))]
