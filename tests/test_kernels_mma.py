"""Kernels of ``mma.sync`` GPUs without one: where fragments lie, which tiles fit, and what the machine code says."""

import importlib.util
import os
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from kernel_weights import random_weight

from mxmoe_steps.kernels.architecture import ROTATED_KERNELS
from mxmoe_steps.kernels.build import TokenKernel, build, default_cache
from mxmoe_steps.kernels.codes.format import GROUP
from mxmoe_steps.kernels.formats import CODES, FORMATS
from mxmoe_steps.kernels.layouts import kernel_weights
from mxmoe_steps.kernels.lint import disassemble, disassembler, inspect, spills_in_loops
from mxmoe_steps.kernels.mma.architecture import GPUS, ON_HOPPER, MmaSync
from mxmoe_steps.kernels.mma.config import STEP_BYTES, MmaConfig
from mxmoe_steps.kernels.sm90.config import UNIT, Tile, block_features

needs_compiler = pytest.mark.skipif(
    importlib.util.find_spec("cutlass") is None or disassembler() is None,
    reason="nvidia-cutlass-dsl or nvidia-cuda-nvdisasm is not installed",
)
if importlib.util.find_spec("cutlass") is not None:
    from mxmoe_steps.kernels.mma.fragments import (
        ROWS_AT_ONCE,
        STEPS,
        copied,
        copied_offset,
        stored_offset,
        token_offset,
        weight_offset,
    )
MOST_SHARED = {"sm_80": 163 * 1024, "sm_86": 99 * 1024, "sm_89": 99 * 1024, "sm_120a": 99 * 1024}  # of a block


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if "MXMOE_KERNEL_CACHE" in os.environ:
        return default_cache()
    return tmp_path_factory.getbasetemp().parent / "mxmoe-kernels"  # shared by xdist's workers


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


def test_the_addresses_of_copies_are_those_of_the_rows() -> None:
    for step in range(8):
        for lane in range(32):
            row, chunk = copied(lane)
            assert copied_offset(lane, step) == stored_offset(row + step * ROWS_AT_ONCE, chunk)


def emulated(config: MmaConfig, tile: Tile, weights: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Sums [tokens, rows] of the warps of a block: every warp's fragments of a 128-byte block, multiplied as the PTX
    ISA describes ``mma.m16n8k32`` for int8."""
    stored_weights, stored_tokens = block_of(weights), block_of(tokens)
    sums = torch.zeros(tile.tokens, tile.rows, dtype=torch.int64)
    blocks = config.token_blocks(tile)
    for row in range(4):
        for column in range(config.columns):
            for step in range(STEPS):
                for m in range(config.row_blocks):
                    first_row = row * config.warp_rows + 16 * m
                    starts = [(first_row * 128 + weight_offset(lane)) ^ STEP_BYTES * step for lane in range(32)]
                    a = load_matrices(stored_weights, starts).view(torch.int8).long()
                    for n in range(0, blocks, 2):
                        first = (column * blocks + n) * 8
                        starts = [(first * 128 + token_offset(lane)) ^ STEP_BYTES * step for lane in range(32)]
                        b = load_matrices(stored_tokens, starts).view(torch.int8).long()
                        for pair in range(2):
                            left = a.view(2, 2, 8, 4, 4).permute(1, 2, 0, 3, 4).reshape(16, 32)  # row of 8, row, word
                            right = b[2 * pair : 2 * pair + 2].view(2, 8, 4, 4).permute(1, 0, 2, 3).reshape(8, 32)
                            at = slice(first + 8 * pair, first + 8 * pair + 8)
                            sums[at, first_row : first_row + 16] += right @ left.T
    return sums


def test_warps_of_a_block_multiply_all_of_a_tile() -> None:
    w8a8 = next(format_ for format_ in FORMATS if format_.name == "w8a8_g-1_sym")
    for phase in ("decode", "prefill"):
        config = ON_HOPPER.config((w8a8,), phase)
        tile = next(tile for tile in config.tiles if tile.tokens == 64)
        weights, tokens = (torch.randint(0, 256, (count, 128), dtype=torch.uint8) for count in (128, 64))
        expected = tokens.view(torch.int8).long() @ weights.view(torch.int8).long().T
        assert torch.equal(emulated(config, tile, weights, tokens), expected)


def signed_nibbles(data: torch.Tensor) -> torch.Tensor:
    """int64 [..., 2 n] of bytes [..., n], low bits first."""
    return torch.stack((data << 4, data & 0xF0), -1).flatten(-2).view(torch.int8).long() // 16


def test_steps_of_a_slot_multiply_its_groups_of_4_bit_codes() -> None:
    """As `GroupedLoop` and the PTX ISA's ``mma.m16n8k64`` do: two chunks a slot, sums of each apart."""
    weight = random_weight("w4a4", 1, 128, 256)
    packed = kernel_weights(weight)
    tokens = torch.randint(0, 256, (8, 128), dtype=torch.uint8)
    block = block_of(tokens)
    halves = packed.data[: 2 * packed.format.chunk_bytes].view(2, 2, -1)[..., : packed.format.code_bytes]
    words = halves.view(2, 2, 2, 128, 16).permute(0, 1, 3, 2, 4).reshape(2, 8, 32, 8, 4)  # chunk, warp, lane, word
    steps = STEPS * GROUP // block_features(packed.format)
    for chunk in range(2):
        sums = torch.zeros(8, 128, dtype=torch.int64)
        for step in range(steps):
            number, at = divmod(chunk * steps + step, STEPS)
            assert number == 0  # one block of rows
            starts = [token_offset(lane & 7 | lane & 8) ^ STEP_BYTES * at for lane in range(32)]
            b = load_matrices(block, [starts[lane % 16] for lane in range(32)])[:2]
            right = signed_nibbles(b.view(2, 8, 4, 4)).permute(1, 0, 2, 3).reshape(8, 64)
            for warp in range(8):
                a = signed_nibbles(words[chunk, warp, :, 4 * step : 4 * step + 4])  # lane, word, element
                left = a.view(8, 4, 2, 2, 8).permute(3, 0, 2, 1, 4).reshape(16, 64)
                sums[:, 16 * warp : 16 * warp + 16] += right @ left.T
        of = slice(GROUP * chunk, GROUP * chunk + GROUP)
        expected = signed_nibbles(tokens)[:, of] @ (weight.codes[0, :, of].long() - 8).T
        assert torch.equal(sums, expected)


@pytest.mark.parametrize("architecture", GPUS, ids=lambda one: one.target)
def test_every_kernel_fits_in_shared_memory(architecture: MmaSync) -> None:
    for phase in architecture.phases:
        formats = tuple(format_ for format_ in FORMATS if format_.operand in architecture.operands)
        for some in (*((format_,) for format_ in formats), formats):
            config = architecture.config(some, phase)
            assert config.stages >= 2
            assert len(config.tiles) >= len(some)
            used = config.ring_units * UNIT + config.staging_bytes + 4 * (7 * config.max_problems + 1) + 512 + UNIT
            assert used * config.blocks_per_sm <= config.shared_bytes - 1024 * config.blocks_per_sm
            assert used <= MOST_SHARED[architecture.target]


BY_NAME = {format_.name: format_ for format_ in FORMATS}
MIXTURE = (  # a format of every main loop
    *("w16a16", "w4a16_g128_asym", "w8a8_g-1_sym", "w4a8_g128_sym", "w8a8_g-1_sym_fp8", "w4a8_g128_sym_fp8"),
    "w4a4_g128_sym",
)
LARGE_TILES = {  # prefill kernels by their formats: of every code on the A100, whose warps have the most sums
    "sm_80": (
        *((code.variants()[-1].name,) for code in CODES if code.operand in GPUS[0].operands),
        ("w16a16", "w4a16_g128_asym", "w8a8_g-1_sym"),
    ),
    "sm_86": (("w4a4_g128_sym",),),
    "sm_89": (("w16a16",),),
    "sm_120a": (("w4a16_g128_asym",), ("w2a16_g128_asym",)),
}


def kernels() -> Iterator[Any]:
    """Of every GPU a latency kernel of all main loops, and its `LARGE_TILES`."""
    for architecture in GPUS:
        mixture = tuple(name for name in MIXTURE if BY_NAME[name].operand in architecture.operands)
        for phase, names in (("latency", mixture), *(("prefill", one) for one in LARGE_TILES[architecture.target])):
            label = names[0] if len(names) == 1 else f"{len(names)}-formats"
            yield pytest.param(architecture, phase, names, id=f"{architecture.target}-{phase}-{label}")


OPCODE = {"bf16": "HMMA", "fp8": "QMMA", "int8": "IMMA", "int4": "IMMA"}


@needs_compiler
@pytest.mark.parametrize(("architecture", "phase", "names"), list(kernels()))
def test_machine_code_is_native_and_keeps_to_registers(
    architecture: MmaSync, phase: str, names: tuple[str, ...], cache: Path
) -> None:
    config = architecture.config(tuple(BY_NAME[name] for name in names), phase)
    sass = disassemble(build(config, cache).with_suffix(".cubin"))
    code = inspect(sass)
    steps = Counter()
    for tile in config.tiles:
        steps[tile.format.operand] += tile.depth * STEPS * config.token_blocks(tile) * config.row_blocks
    native, calls = (len(re.findall(code, sass)) for code in (r"IMMA\.16864\.S4\.S4", "CALL.*m16n8k64_s4_s4"))
    assert (native, calls) == ((steps["int4"], 0) if architecture.multiplies_nibbles else (0, steps["int4"]))
    if calls:
        steps["int4"] = 2  # of int8, in what is called
    opcodes = Counter()
    for operand, count in steps.items():
        opcodes[OPCODE[operand]] += count
    assert code.matrix == opcodes
    assert spills_in_loops(sass) == 0
    assert code.registers * config.threads * config.blocks_per_sm <= 64 * 1024
    assert "LDSM.16.M88.4" in sass
    assert "LDGSTS.E.BYPASS" in sass


@needs_compiler
@pytest.mark.parametrize("architecture", GPUS[1:3], ids=lambda one: one.target)
def test_token_kernels_of_older_gpus(architecture: MmaSync, cache: Path) -> None:
    for name in ("sort_1", "dispatch", "swiglu", "quantize", "activate_clamped-biased", *ROTATED_KERNELS):
        sass = disassemble(build(TokenKernel(name, architecture), cache).with_suffix(".cubin"))
        code = inspect(sass)
        assert (code.spills, code.matrix) == (0, {})
        assert ("I2IP.S4.S32.SAT" in sass) == (name != "sort_1")
