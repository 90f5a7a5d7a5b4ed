"""Tiles on their way from the producer that draws them to all warps of the block (CuTe DSL)."""

from dataclasses import dataclass
from typing import Any

import cutlass
from cutlass import Boolean, Int32, cute

from mxmoe_steps.kernels.mma.asynchronous import arrive, wait
from mxmoe_steps.kernels.mma.config import MmaConfig
from mxmoe_steps.kernels.sm90.scheduler import PLACE_WORDS, Place, TileTable


@dataclass(frozen=True)
class TileQueue:
    """``places`` (word, slot): two slots of a `Place`; ``full``, ``empty``: their barriers."""

    config: MmaConfig
    places: cute.Tensor
    full: Any
    empty: Any

    @cute.jit
    def announce(self, table: TileTable, turn: Int32, drawn: Int32) -> None:
        """Hand the next tile on; ``drawn``, in lane 0, is its number."""
        slot = turn & 1
        lane = cute.arch.lane_idx()
        place = table.locate(cute.arch.shuffle_sync(drawn, 0), lane)
        wait(self.config, self.empty + slot, turn >> 1 & 1 ^ 1)
        words = (place.number, place.row_tile, place.first, place.rows, place.entry, place.column, 0, 0)
        words = tuple(map(Int32, words))
        if lane == 0:
            values = cute.make_rmem_tensor((PLACE_WORDS,), Int32)
            for i in cutlass.range_constexpr(PLACE_WORDS):
                values[i] = words[i]
            cute.autovec_copy(values, self.places[None, slot])
            arrive(self.full + slot)

    @cute.jit
    def take(self, turn: Int32, acknowledged: Boolean) -> Place:
        """The next tile; ``acknowledged`` by all but the warp that hands it on."""
        slot = turn & 1
        wait(self.config, self.full + slot, turn >> 1 & 1)
        words = cute.make_rmem_tensor((PLACE_WORDS,), Int32)
        cute.autovec_copy(self.places[None, slot], words)
        cute.arch.sync_warp()
        if (cute.arch.lane_idx() == 0) & acknowledged:
            arrive(self.empty + slot)
        return Place(words[0], words[1], words[2], words[3], words[4], words[5])
