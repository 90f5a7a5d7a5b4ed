"""The ring of slots in shared memory, its barriers and views (CuTe DSL)."""

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


@dataclass(frozen=True)
class Ring:
    """The slots that one producer fills: first byte in shared memory, and the barriers of slot 0."""

    base: Any
    full: Any
    empty: Any


@dataclass(frozen=True)
class Chunks:
    """Views of a thread's part of the weight chunks in the ring, see `layouts`: 32-bit words; the last modes are
    (chunk, first unit of the slot).

    ``codes``: (words of the load), one view for each of `Format.loads`; ``numbers``: of its two rows, a pair a word.
    """

    codes: tuple[cute.Tensor, ...]
    numbers: cute.Tensor


@dataclass(frozen=True)
class Partials:
    """Sums of the parts of a split, in shared memory.

    ``sums``: the first one; ``full``: barrier that all parts arrive at; ``free``: that the one which adds them
    arrives at. ``part``: this warpgroup's; ``turn``: tiles before this one.
    """

    sums: Any
    full: Any
    free: Any
    part: Int32
    turn: Int32


def ceil_div(value: Int32, divisor: int) -> Int32:
    """``value``, not negative, by a power of two, rounded up: `//` also takes negative numbers, in a dozen instructions
    that follow one another."""
    return (value + (divisor - 1)) >> (divisor.bit_length() - 1)


class RingUser:
    """What producer and consumers share: the configuration, and their steps through the ring."""

    def __init__(self, config: KernelConfig) -> None:
        self.config = config
        self.tiles, self.formats, self.operands = config.tiles, config.formats, config.operands
        self.stages, self.units, self.max_problems = config.stages, config.ring_units, config.max_problems
        self.cluster, self.split = config.cluster, config.split
        self.rows, self.groups = config.rows, config.rows // HALF_ROWS
        self.threads = config.threads

    @cute.jit
    def advance(self, stage: Int32, phase: Int32) -> tuple[Int32, Int32]:
        """The next slot of the ring, and the parity of its barriers."""
        stage += 1
        if stage == self.stages:
            stage = Int32(0)
            phase ^= 1
        return stage, phase

    def ring_of(self, part: Any, base: Any, barriers: Any) -> Ring:
        """The ring of one part of a split, from the first byte of all of them and the first of their barriers."""
        start = cute.assume(part * (self.units * UNIT), divby=UNIT)
        full = barriers + part * self.stages
        return Ring(base + start, full, full + self.split * self.stages)

    def begin(self, tile: Tile, end: Int32) -> Int32:
        """First unit of a slot of ``tile`` if the slot before it ends at ``end``: there, unless the ring ends too
        early."""
        return cutlass.select_(end + tile.slot_units > self.units, Int32(0), end)

    @cute.jit
    def release(self, ring: Ring, stage: Int32, wanted: Boolean) -> None:
        """This warp has read the slot: tell the producer of every block that writes it."""
        lane = cute.arch.lane_idx()
        if const_expr(self.cluster == 1):
            if (lane == 0) & wanted:
                cute.arch.mbarrier_arrive(ring.empty + stage)
        elif (lane < self.cluster) & wanted:
            cute.arch.mbarrier_arrive(ring.empty + stage, peer_cta_rank_in_cluster=lane)

    def dealt(self, tile: Tile, features: Int32, part: Int32) -> Int32:
        """Ring slots of one tile that go to ``part`` of a split: slot ``part`` and every ``split``-th one after it."""
        return ceil_div(ceil_div(features, tile.slot_features) - part, self.split)

    @staticmethod
    def block_layout(operand: str, rows: int) -> cute.ComposedLayout:
        """Swizzled shared memory layout (rows, columns, 1) of a block of 128-byte rows."""
        kind = OPERAND_TYPES[operand]
        columns = ROW_BYTES * 8 // kind.width
        atom = hopper.get_smem_layout_atom(LayoutEnum.ROW_MAJOR, kind, columns)
        return cute.tile_to_shape(warpgroup.make_smem_layout_atom(atom, kind), (rows, columns, 1), order=(0, 1, 2))

    def blocks(self, ring: Ring, operand: str, rows: int, offset: int, depth: int) -> cute.Tensor:
        """(rows, columns, (depth, units)) view of the swizzled 128-byte blocks at ``offset`` of a slot that starts at
        any unit of the ring."""
        kind = OPERAND_TYPES[operand]
        layout = self.block_layout(operand, rows)
        size = kind.width // 8
        outer = cute.make_layout(
            (layout.outer.shape[0], layout.outer.shape[1], (depth, self.units)),
            stride=(
                layout.outer.stride[0],
                layout.outer.stride[1],
                (rows * ROW_BYTES // size, UNIT // size),
            ),
        )
        return cute.make_tensor(cute.recast_ptr(ring.base + offset, layout.inner, dtype=kind), outer)

    def chunk_parts(self, ring: Ring, tile: Tile, thread: Int32) -> Chunks:
        """Views of what every weight chunk of a slot holds for ``thread``, by the slot's first unit."""
        format_ = tile.format
        words, halves = format_.half_bytes // 4, self.groups
        codes, offset = [], 0
        for load in format_.loads:
            layout = ((128, halves), load.words), ((load.words, words), 1)
            codes.append(self.chunk_view(ring, tile, offset, *layout, thread))
            offset += 128 * 4 * load.words
        count = max(1, format_.all_numbers)  # a format without has a view of nothing
        rows = ((HALF_ROWS // 2, halves), count), ((count, words), 1)
        numbers = self.chunk_view(ring, tile, offset, *rows, thread >> 2)  # four lanes share a pair of rows
        return Chunks(tuple(codes), numbers)

    def chunk_view(self, ring: Ring, tile: Tile, offset: int, shape: tuple, stride: tuple, at: Int32) -> cute.Tensor:
        """View of ``shape`` + (chunks, units) of the words at ``offset`` of every weight chunk of a slot, where the
        first mode is ``at``: cut there once, so that a slot costs one addition."""
        layout = cute.make_layout(
            (*shape, tile.slot_features // GROUP, self.units),
            stride=(*stride, tile.format.half_bytes * self.groups // 4, UNIT // 4),
        )
        view = cute.make_tensor(cute.recast_ptr(ring.base + offset, dtype=Int32), layout)
        return view[at, *(None for _ in range(len(shape) + 1))]
