"""The ring of slots in shared memory, as Hopper's, with barriers that older GPUs have (CuTe DSL)."""

from dataclasses import dataclass

from cutlass import Boolean, Int32, cute

from mxmoe_steps.kernels.mma.asynchronous import arrive, wait
from mxmoe_steps.kernels.mma.config import MmaConfig
from mxmoe_steps.kernels.sm90.config import UNIT, Tile
from mxmoe_steps.kernels.sm90.ring import Position
from mxmoe_steps.kernels.sm90.ring import Ring as Slots


@dataclass(frozen=True)
class Ring(Slots):
    """One ring for all parts of a split: part p reads every ``split``-th slot of a tile, from the p-th on."""

    config: MmaConfig  # type: ignore[assignment]

    def wait_full(self, position: Position) -> None:
        """Until the slot is filled."""
        wait(self.config, self.full + position.stage, position.parity)

    @cute.jit
    def release(self, stage: Int32, condition: Boolean) -> None:
        """This warp has read the slot, on ``condition``: tell the producer."""
        cute.arch.sync_warp()
        if (cute.arch.lane_idx() == 0) & condition:
            arrive(self.empty + stage)

    def address(self, tile: Tile, begin: Int32) -> tuple[Int32, Int32]:
        """Of the weights and of the tokens of the slot that begins at unit ``begin``."""
        slot = self.base.toint() + begin * UNIT
        return slot, slot + tile.token_offset
