"""The main loops of the warps that multiply, one per way that weights reach the tensor cores (CuTe DSL)."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import cutlass
from cutlass import Boolean, Float32, Int32, const_expr, cute
from cutlass._mlir.dialects import llvm
from cutlass.cutlass_dsl import T

from mxmoe_steps.kernels.codes.format import GROUP
from mxmoe_steps.kernels.mma.config import MMA_ROWS, MMA_TOKENS, STEP_BYTES, MmaConfig
from mxmoe_steps.kernels.mma.fragments import STEPS, load_matrices, multiply, token_offset, weight_offset
from mxmoe_steps.kernels.mma.ring import Ring
from mxmoe_steps.kernels.sm90.config import ROW_BYTES, Tile, block_features
from mxmoe_steps.kernels.sm90.main_loops import MAGIC
from mxmoe_steps.kernels.sm90.registers import Scratch, fetch_codes, fetch_scales, row_of
from mxmoe_steps.kernels.sm90.ring import Chunks, Position
from mxmoe_steps.kernels.sm90.warp_loop import MAGIC_BITS


@dataclass(frozen=True)
class Warp:
    """Which part of a tile a warp multiplies: ``part`` of a split, ``row`` and ``column`` of the warps of a part."""

    lane: Int32
    part: Int32
    row: Int32
    column: Int32


@dataclass(frozen=True)
class MainLoop:
    """Multiplies a warp's share of a tile into sums (4, token blocks, row blocks); ``slots`` of the tile."""

    most_ahead: ClassVar[int] = 8  # token blocks whose next fragments have registers, too
    most_at_once: ClassVar[int] = 16  # token blocks of which ptxas may fetch more than the next fragments

    config: MmaConfig
    tile: Tile
    ring: Ring
    warp: Warp
    slots: Int32

    @cute.jit
    def run(self, acc: cute.Tensor, position: Position) -> Position:
        """Add the products to ``acc``, from ``position`` of the ring on; returns the one behind the tile."""
        ring, split = self.ring, self.config.split
        views = self.views()
        for slot in cutlass.range(self.slots, unroll=1):
            begin = ring.begin(self.tile, position.end)
            mine = Boolean(True) if const_expr(split == 1) else slot & (split - 1) == self.warp.part
            if mine:
                ring.wait_full(position)
                self.multiply_slot(acc, views, begin)
                ring.release(position.stage, Boolean(True))
            position = ring.after(self.tile, begin, position)
        return position

    def views(self) -> Any:
        """What all slots share."""
        return ()

    def multiply_slot(self, acc: cute.Tensor, views: Any, begin: Int32) -> None:
        """Add the products of the slot that begins at unit ``begin``."""
        raise NotImplementedError

    @property
    def row_blocks(self) -> range:
        return range(self.config.row_blocks)

    @property
    def token_blocks(self) -> range:
        return range(self.config.token_blocks(self.tile))

    def token_address(self, address: Int32) -> Int32:
        """What this lane fetches token fragments from, of the tokens at ``address``."""
        first = self.warp.column * (len(self.token_blocks) * MMA_TOKENS * ROW_BYTES)
        return address + first + token_offset(self.warp.lane)

    def token_fragments(self, address: Int32, block: int, step: int) -> list[Any]:
        """The two words of every token block, of step ``step`` of the 128-byte block ``block``."""
        count = len(self.token_blocks)
        at = (address ^ STEP_BYTES * step) + block * self.tile.tokens * ROW_BYTES
        if count == 1:
            return [load_matrices(at, 2)]
        fragments = []
        for pair in range(count // 2):
            words = load_matrices(at + pair * 2 * MMA_TOKENS * ROW_BYTES)
            fragments += [words[:2], words[2:]]
        return fragments

    def ahead(self, fetches: list[Callable[[], Any]]) -> Iterator[Any]:
        """What ``fetches`` give, each asked for before the one ahead of it is used, if registers suffice."""
        if len(self.token_blocks) > self.most_ahead:
            for fetch in fetches:
                self.keep_order()
                yield fetch()
            return
        following = fetches[0]()
        for fetch in fetches[1:]:
            self.keep_order()
            current, following = following, fetch()
            yield current
        yield following

    def keep_order(self) -> None:
        """Where registers are few, nothing is fetched across this."""
        if len(self.token_blocks) > self.most_at_once:
            cute.arch.sync_warp()

    def add(self, sums: cute.Tensor, weights: list[Any], tokens: list[Any], start: Any = None) -> None:
        """Products of one step."""
        for m in self.row_blocks:
            for n in self.token_blocks:
                multiply(self.tile.format.operand, sums[None, n, m], weights[m], tokens[n], start)


class RowsLoop(MainLoop):
    """Weights in rows, as the tokens are. Fragments of a step are fetched while the step before is multiplied."""

    def multiply_slot(self, acc: cute.Tensor, views: Any, begin: Int32) -> None:
        """As `MainLoop.multiply_slot`."""
        weights, tokens = self.ring.address(self.tile, begin)
        first_row = self.warp.row * self.config.warp_rows
        weights = weights + first_row * ROW_BYTES + weight_offset(self.warp.lane)
        tokens = self.token_address(tokens)
        steps = [(block, step) for block in range(self.tile.depth) for step in range(STEPS)]
        for fragments in self.ahead([partial(self.fetch, weights, tokens, *at) for at in steps]):
            self.add(acc, *fragments)

    def fetch(self, weights: Int32, tokens: Int32, block: int, step: int) -> tuple[list[Any], list[Any]]:
        """Fragments of a step."""
        at = (weights ^ STEP_BYTES * step) + block * self.tile.rows * ROW_BYTES
        fetched = [load_matrices(at + m * MMA_ROWS * ROW_BYTES) for m in self.row_blocks]
        return fetched, self.token_fragments(tokens, block, step)


class DecodedLoop(MainLoop):
    """Weights that are decoded in registers, from chunks."""

    most_at_once = 4

    def views(self) -> tuple[Chunks, ...]:
        """Of the chunks' parts for this lane, by row block."""
        first = self.warp.row * self.config.row_blocks
        return tuple(self.ring.chunks(self.tile, (first + m) * 32 + self.warp.lane) for m in self.row_blocks)


class Bf16Loop(DecodedLoop):
    """Codes become bfloat16, a step at a time; token fragments of a step are fetched one step ahead."""

    def multiply_slot(self, acc: cute.Tensor, views: Any, begin: Int32) -> None:
        """As `MainLoop.multiply_slot`."""
        format_ = self.tile.format
        _, tokens = self.ring.address(self.tile, begin)
        tokens = self.token_address(tokens)
        scratches = [Scratch.make(format_) for _ in self.row_blocks]
        steps = [(block, step) for block in range(self.tile.depth) for step in range(STEPS)]
        fetched = self.ahead([partial(self.token_fragments, tokens, *at) for at in steps])
        for (block, step), fragments in zip(steps, fetched, strict=True):
            chunk, half = block // 2, block % 2
            if step == 0:
                for m in self.row_blocks:
                    self.prepare(views[m], scratches[m], chunk, half, begin)
            weights = [format_.decode(one.words, STEPS * half + step, one.terms) for one in scratches]
            self.add(acc, weights, fragments)

    def prepare(self, chunks: Chunks, scratch: Scratch, chunk: int, half: int, begin: Int32) -> None:
        """Words and terms of half a chunk."""
        format_ = self.tile.format
        fetch_codes(format_, chunks, half, chunk, begin, scratch.words)
        if format_.grouped and half == 0:
            cute.autovec_copy(chunks.numbers[None, chunk, begin], scratch.numbers)
        if half in format_.term_halves:
            for i, term in enumerate(format_.terms(scratch.numbers, half)):
                scratch.terms[i] = term


class GroupedLoop(DecodedLoop):
    """Codes become 8-bit numbers, or are 4-bit ones; sums of a group are multiplied by its scale in float32.

    Those of integers start at the bits of the float32 MAGIC: the same bits are MAGIC + sum, so nothing is converted.
    """

    most_ahead = 4  # the sums of a group take the registers

    def multiply_slot(self, acc: cute.Tensor, views: Any, begin: Int32) -> None:
        """As `MainLoop.multiply_slot`."""
        format_ = self.tile.format
        integers = format_.operand != "fp8"
        _, tokens = self.ring.address(self.tile, begin)
        tokens = self.token_address(tokens)
        words = [cute.make_rmem_tensor((format_.words,), Int32) for _ in self.row_blocks]
        scales = [cute.make_rmem_tensor((2,), Float32) for _ in self.row_blocks]
        sums = cute.make_rmem_tensor(acc.layout, Int32 if integers else Float32)
        start = Int32(MAGIC_BITS) if integers else Float32(0.0)
        for chunk in range(self.tile.slot_features // GROUP):
            for m in self.row_blocks:
                for half in range(2):
                    fetch_codes(format_, views[m], half, chunk, begin, words[m])
                fetch_scales(views[m], chunk, begin, scales[m])
            steps = STEPS * GROUP // block_features(format_)  # of a chunk
            places = [divmod(chunk * steps + step, STEPS) for step in range(steps)]
            fetched = self.ahead([partial(self.token_fragments, tokens, *place) for place in places])
            for step, fragments in enumerate(fetched):
                weights = [format_.decode(words[m], step, None) for m in self.row_blocks]
                self.add(sums, weights, fragments, start if step == 0 else None)
            for m in self.row_blocks:
                for n in self.token_blocks:
                    for e in range(4):
                        total = sums[e, n, m]
                        if integers:
                            total = Float32(llvm.bitcast(T.f32(), total.ir_value())) - MAGIC
                        acc[e, n, m] = acc[e, n, m] + total * scales[m][row_of(e)]


def loop_of(tile: Tile) -> type[MainLoop]:
    """The main loop of a tile."""
    if not tile.format.decoded:
        return RowsLoop
    return Bf16Loop if tile.format.operand == "bf16" else GroupedLoop
