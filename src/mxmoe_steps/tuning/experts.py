"""Experts of one width in a layer, all in a few matrix products, and the gradients of their weights.

Weights of all experts stand in one buffer a block, in the precision of the products: bfloat16 on a GPU, float32 on a
CPU. Rows of tokens are sorted by expert, and a grouped product multiplies each by its expert's weights.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch.nn.functional import grouped_mm

from mxmoe_steps.models.gating import Gating
from mxmoe_steps.quantizers.grid import QuantizedWeight, quantize_activations
from mxmoe_steps.quantizers.hadamard import rotate
from mxmoe_steps.schemes import Scheme
from mxmoe_steps.tuning.blocks import TunedBlocks, is_tuned


class Block:
    """One block (gate, up or down) of all experts; ``originals`` [E, N, K].

    ``packed``: stacks of those that have one scheme, each with their places among the experts. The others keep their
    weights.
    """

    def __init__(
        self,
        originals: torch.Tensor,
        packed: Sequence[tuple[list[int], QuantizedWeight]],
        rotated: bool,
        precision: torch.dtype,
    ) -> None:
        self.buffer = originals.to(precision, copy=True)
        self._rotated = rotated
        self.tuned: list[tuple[list[int], TunedBlocks]] = []  # of which experts
        self._inputs: list[tuple[torch.Tensor, Scheme]] = []  # which experts' inputs are quantized
        for places, stack in packed:
            if stack.scheme.act_bits < 16:
                self._inputs.append((torch.tensor(places, device=originals.device), stack.scheme))
            if is_tuned(stack.scheme):
                self.tuned.append((places, TunedBlocks(stack, originals[places], rotated)))
            else:
                values = stack.dequantize()
                self.buffer[places] = (rotate(values) if rotated else values).to(precision)
        self._refresh()
        self.buffer.requires_grad_(bool(self.tuned))

    def product(self, x: torch.Tensor, rows: "Rows") -> torch.Tensor:
        """[P, K] to [P, N]; gradients pass the rounding of activations as if it were not there."""
        for places, scheme in self._inputs:
            with torch.no_grad():
                own = torch.isin(rows.expert, places).nonzero().squeeze(-1)
                plain = x[own].float()
                turned = rotate(plain) if self._rotated else plain
                seen = quantize_activations(turned, scheme)
                noise = torch.zeros_like(x)
                noise[own] = ((rotate(seen) if self._rotated else seen) - plain).to(x.dtype)
            x = x + noise
        return grouped_mm(x, self.buffer.mT, offs=rows.ends)

    def descend(self, seen: torch.Tensor, rate: float) -> None:
        """Move tuned weights down their gradients; ``seen`` bool [E]: experts that had a token."""
        gradient = self.buffer.grad
        if gradient is None:
            return
        gradient[~seen] = 0  # of an empty group PyTorch says nothing
        for places, blocks in self.tuned:
            blocks.descend(gradient[places], rate)
        self.buffer.grad = None
        self._refresh()

    @torch.no_grad()
    def _refresh(self) -> None:
        for places, blocks in self.tuned:
            for place, weight in zip(places, blocks.weights(), strict=True):
                self.buffer[place].copy_(weight)


@dataclass(frozen=True)
class Rows:
    """Tokens sorted by expert: ``slot`` int64 [P], where each row is in the flat [T, k] expert ids, with its ``token``
    and ``expert``; ``ends`` int32 [E] of the experts' rows; ``place`` int64 [T, k], the row of each slot.
    """

    slot: torch.Tensor
    token: torch.Tensor
    expert: torch.Tensor
    ends: torch.Tensor
    place: torch.Tensor

    @classmethod
    def of(cls, expert_ids: torch.Tensor, experts: int) -> "Rows":
        """``expert_ids`` int64 [T, k]."""
        flat = expert_ids.flatten()
        order = flat.argsort(stable=True)
        ends = flat.bincount(minlength=experts).cumsum(0).to(torch.int32)
        return cls(order, order // expert_ids.shape[1], flat[order], ends, order.argsort().view_as(expert_ids))


class Experts:
    """Experts of one width: ``down(gating(gate x, up x))`` each, times router weights; ``biases`` [E, H] of down."""

    def __init__(self, blocks: Sequence[Block], gating: Gating, biases: torch.Tensor | None = None) -> None:
        self.blocks, self._gating, self._biases = tuple(blocks), gating, biases

    @property
    def count(self) -> int:
        """Experts E."""
        return len(self.blocks[0].buffer)

    def outputs(self, x: torch.Tensor, rows: Rows) -> torch.Tensor:
        """[P, H] of every row; ``x`` [T, H]."""
        gate, up, down = self.blocks
        entering = x[rows.token].to(gate.buffer.dtype)
        gating = self._gating
        if gating.biases is not None:
            of_gate, of_up = (bias[rows.expert].to(entering.dtype) for bias in gating.biases)
            gating = replace(gating, biases=(of_gate, of_up))
        inner = gating(gate.product(entering, rows), up.product(entering, rows))
        found = down.product(inner, rows)
        return found if self._biases is None else found + self._biases[rows.expert].to(found.dtype)

    def descend(self, rows: Rows, rate: float) -> None:
        """Move weights down the gradients that a backward pass left."""
        seen = torch.zeros(len(rows.ends), dtype=torch.bool, device=rows.ends.device)
        seen[rows.expert] = True
        for block in self.blocks:
            block.descend(seen, rate)


def summed(outputs: torch.Tensor, rows: Rows, weights: torch.Tensor) -> torch.Tensor:
    """float32 [T, H]: the rows' ``outputs`` [P, H] times router weights [T, k], summed over each token's experts."""
    return (outputs[rows.place].float() * weights.unsqueeze(-1)).sum(1)
