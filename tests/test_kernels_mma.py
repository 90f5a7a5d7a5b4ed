"""Kernels of ``mma.sync`` GPUs without one: where fragments lie, which tiles fit, and what the machine code says."""

import pytest
import torch

from mxmoe_steps.kernels.mma.config import STEP_BYTES
from mxmoe_steps.kernels.mma.fragments import STEPS, stored_offset, token_offset, weight_offset

WORDS = torch.arange(4)  # of a 16-byte chunk


def block_of(rows: torch.Tensor) -> torch.Tensor:
    """Shared memory, uint8, after a producer has copied ``rows`` uint8 [rows, 128] to a block."""
    block = torch.zeros(rows.numel(), dtype=torch.uint8)
    for row in range(len(rows)):
        for chunk in range(8):
            at = stored_offset(row, chunk)
            block[at : at + 16] = rows[row, 16 * chunk : 16 * chunk + 16]
    return block


def load_matrices(block: torch.Tensor, addresses: list[int]) -> torch.Tensor:
    """``ldmatrix`` as the PTX ISA describes it: bytes [4 matrices, 32 lanes, 4]."""
    words = torch.empty(4, 32, 4, dtype=torch.uint8)
    for matrix in range(4):
        for lane in range(32):
            at = addresses[8 * matrix + lane // 4] + 4 * (lane % 4)
            words[matrix, lane] = block[at : at + 4]
    return words


def test_ldmatrix_makes_the_fragments_of_mma() -> None:
    """Rows through shared memory to fragments, which hold what the PTX ISA says of 8-bit operands."""
    rows = torch.randint(0, 256, (128, 128), dtype=torch.uint8)
    block = block_of(rows)
    for first in (0, 16, 112):
        for step in range(STEPS):
            for offset, is_weights in ((weight_offset, True), (token_offset, False)):
                addresses = [first * 128 + (offset(lane) ^ STEP_BYTES * step) for lane in range(32)]
                words = load_matrices(block, addresses)
                for word in range(4):
                    for lane in range(32):
                        row = lane // 4 + 8 * (word % 2 if is_weights else word // 2)
                        feature = 4 * (lane % 4) + 16 * (word // 2 if is_weights else word % 2)
                        at = STEP_BYTES * step + feature
                        assert torch.equal(words[word, lane], rows[first + row, at : at + 4])


@pytest.mark.parametrize("offset", [weight_offset, token_offset])
def test_eight_lanes_that_fetch_a_matrix_meet_in_no_bank(offset) -> None:
    for step in range(STEPS):
        for matrix in range(4):
            starts = [(offset(8 * matrix + i) ^ STEP_BYTES * step) // 4 % 32 for i in range(8)]
            assert sorted(starts) == list(range(0, 32, 4))


def test_lanes_that_copy_meet_in_no_bank() -> None:
    for first in range(4):  # quarters of a warp: a row each
        starts = [stored_offset(first, chunk) // 4 % 32 for chunk in range(8)]
        assert sorted(starts) == list(range(0, 32, 4))
