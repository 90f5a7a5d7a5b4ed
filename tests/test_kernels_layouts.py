"""Kernel order of weights: exact inverses for every scheme and size the kernels take."""

from collections.abc import Callable

import pytest
import torch

from mxmoe_steps.errors import UserError
from mxmoe_steps.kernels.layouts import kernel_weights, original_weights, quantized_weight
from mxmoe_steps.quantizers.grid import E4M3, QuantizedWeight
from mxmoe_steps.schemes import parse_scheme

SCHEMES = [
    "w8a8", "w8a8_fp8", "w8a16", "w4a16", "w4a16_g128_sym", "w4a16_g-1_asym", "w4a16_g-1_sym", "w3a16",
    "w3a16_g128_sym", "w2a16", "w2a16_g128_sym", "w1a16", "w1a16_g128_sym", "w4a8_fp8", "w4a8", "w4a8_g-1_sym",
]  # fmt: skip


def random_weight(name: str, entries: int, rows: int, features: int, seed: int = 0) -> QuantizedWeight:
    """Codes over their whole range with random scales and zero points."""
    scheme = parse_scheme(name)
    generator = torch.Generator().manual_seed(seed)
    groups = features // scheme.group_size(features)
    codes = torch.randint(0, 2**scheme.weight_bits, (entries, rows, features), generator=generator, dtype=torch.uint8)
    if scheme.fp8 and scheme.weight_bits == 8:
        codes = torch.randn(entries, rows, features, generator=generator).mul(30).to(E4M3)
    scales = torch.rand(entries, rows, groups, generator=generator).add(0.5).bfloat16()
    zeros = None
    if not scheme.symmetric:
        zeros = torch.rand(entries, rows, groups, generator=generator).mul(2**scheme.weight_bits).bfloat16()
    return QuantizedWeight(scheme, codes, scales, zeros)


@pytest.mark.parametrize("name", SCHEMES)
@pytest.mark.parametrize(("rows", "features"), [(64, 128), (192, 384), (256, 256)])
def test_kernel_order_is_exactly_invertible(name: str, rows: int, features: int) -> None:
    weight = random_weight(name, 2, rows, features)
    back = quantized_weight(kernel_weights(weight), weight.scheme)
    assert torch.equal(back.codes.view(torch.uint8), weight.codes.view(torch.uint8))
    assert torch.equal(back.scales, weight.scales)
    assert (back.zeros is None) == (weight.zeros is None)
    assert weight.zeros is None or torch.equal(back.zeros, weight.zeros)


@pytest.mark.parametrize("name", ["w8a8", "w8a8_fp8", "w8a16"])
def test_per_channel_formats_take_multiples_of_64(name: str) -> None:
    weight = random_weight(name, 1, 64, 192)
    back = quantized_weight(kernel_weights(weight), weight.scheme)
    assert torch.equal(back.codes.view(torch.uint8), weight.codes.view(torch.uint8))


def test_four_bit_word_matches_its_diagram() -> None:
    weight = random_weight("w4a16", 1, 128, 128)
    rows_64 = kernel_weights(weight).data[: 2 * (4096 + 256)].view(2, -1)  # codes, scales and zero points of each
    words = rows_64[1, :4096].view(torch.int32).view(2, 128, 4)
    thread, block, half = 32 * 2 + 13, 5, 1  # of rows 64-127: warp 2, lane 13; k16 block 5 is word 1 of half 1
    row, column = 64 + 16 * 2 + 13 // 4, 16 * block + 2 * (13 % 4)
    word = int(words[half, thread, block % 4]) & 0xFFFFFFFF
    for register in range(4):
        for element in range(2):
            code = weight.codes[0, row + 8 * (register % 2), column + 8 * (register // 2) + element]
            assert (word >> (4 * register + 16 * element)) & 15 == int(code)


LOWEST_BIT = {4: (0, 4, 0, 4), 3: (0, 2, 4, 4), 2: (0, 2, 4, 6)}  # of a masked code, by register
THIRD_SHIFT = ((0, 0, 0, 2), (1, 1, 1, 3), (8, 8, 8, -6), (9, 9, 9, -5))  # right, by k16 block of four and register


def bf16_numbers(pattern: int) -> torch.Tensor:
    """Two bfloat16 bit patterns as float64."""
    halves = torch.tensor([pattern & 0xFFFF, pattern >> 16], dtype=torch.int32)
    return halves.short().view(torch.bfloat16).double()


def masked(bits: int, words: list[int], block: int, register: int) -> int:
    """What `decode` leaves of a thread's words for a register: two bfloat16 bit patterns."""
    lowest = LOWEST_BIT[bits][register]
    if bits == 4:
        return words[block] >> 8 * (register // 2) & (15 << lowest) * 0x10001
    shift = 8 * (block % 2) + (2 if bits == 3 and register == 3 else 0)
    number = words[block // 2] >> shift & (3 << lowest) * 0x10001
    if bits == 3:
        places = THIRD_SHIFT[block % 4][register]
        third = words[4 + block // 4]
        number |= (third >> places if places >= 0 else third << -places) & (4 << lowest) * 0x10001
    return number


@pytest.mark.parametrize("name", ["w4a16", "w4a16_g128_sym", "w3a16", "w2a16", "w1a16"])
def test_masked_codes_are_numbers_that_one_multiply_add_turns_into_weights(name: str) -> None:
    """In bfloat16, a code in bits 0-7 is code * 2**(lowest bit - 133): subnormal or in the first normal binade."""
    weight = random_weight(name, 1, 128, 128)
    bits = max(2, weight.scheme.weight_bits)
    packed = kernel_weights(weight)
    rows_64 = packed.data[: packed.format.chunk_bytes].view(2, -1)[1]
    loads = [rows_64[: 128 * 16 * max(1, bits // 2)].view(torch.int32).view(-1, 128, 4)]
    if bits == 3:
        loads.append(rows_64[128 * 16 : 128 * 24].view(torch.int32).view(1, 128, 2))
    for thread in (0, 32 * 2 + 13, 127):
        words = [int(word) & 0xFFFFFFFF for load in loads for part in load for word in part[thread]]
        warp, lane = divmod(thread, 32)
        for block in range(8):
            for register in range(4):
                row = 64 + 16 * warp + 8 * (register % 2) + lane // 4
                column = 16 * block + 8 * (register // 2) + 2 * (lane % 4)
                pattern = masked(bits, words, block, register)
                numbers = bf16_numbers(pattern) * 2.0 ** (133 - LOWEST_BIT[bits][register])
                stored = weight.codes[0, row, column : column + 2].double() + (name == "w1a16_g128_sym")  # zero point 2
                assert torch.equal(numbers, stored), (thread, block, register)


@pytest.mark.parametrize("name", ["w4a16", "w4a16_g128_sym", "w3a16", "w2a16"])
def test_numbers_become_weights_whatever_the_scale(name: str) -> None:
    """The arithmetic of `decode`: factor and offset are bfloat16, the power of two is added to the scale's exponent."""
    weight = random_weight(name, 1, 64, 128)
    bits = weight.scheme.weight_bits
    scales = (2.0 ** torch.linspace(-60, 10.99, 64)).bfloat16()
    scales[0] = 0.0
    weight = QuantizedWeight(weight.scheme, weight.codes, scales.view(1, 64, 1), weight.zeros)
    kernel_weights(weight)  # takes them
    zeros = torch.tensor(2.0 ** (bits - 1)) if weight.zeros is None else weight.zeros[0, :, 0].float()
    offsets = (scales.float() * (zeros * -(2.0**-16))).bfloat16()
    for lowest in set(LOWEST_BIT[bits]):
        factors = (scales.view(torch.int16) + (133 - 16 - lowest << 7)).view(torch.bfloat16)
        assert factors.isfinite().all()
        numbers = (weight.codes[0].short() << lowest).view(torch.bfloat16)
        made = (numbers.double() * factors.double()[:, None] + offsets.double()[:, None]).bfloat16()
        assert torch.equal(made[1:].double() * 2.0**16, weight.dequantize()[0, 1:].bfloat16().double())
        assert made[0].abs().max() < 2.0**-120


def test_scales_that_are_too_large_to_decode_with_are_refused() -> None:
    weight = random_weight("w4a16", 1, 64, 128)
    weight.scales[0, 3, 0] = 2048.0
    with pytest.raises(UserError, match="2048 or more"):
        kernel_weights(weight)


def test_bytes_are_numbers_around_128() -> None:
    weight = random_weight("w8a16", 1, 128, 128)
    words = kernel_weights(weight).data[: 64 * 128].view(torch.int32).view(4, 128, 4)
    thread, block = 32 * 2 + 13, 5
    for register in range(4):
        place = 2 * block + register // 2
        word = int(words[place // 4, thread, place % 4]) & 0xFFFFFFFF
        pattern = word >> 8 * (register % 2) & 0xFF00FF
        row, column = 16 * 2 + 8 * (register % 2) + 13 // 4, 16 * block + 8 * (register // 2) + 2 * (13 % 4)
        codes = weight.codes[0, row, column : column + 2].double()
        assert torch.equal(bf16_numbers(pattern) * 2.0**127 - 2, (codes - 128) / 64)


def fp8_operand(word: int) -> torch.Tensor:
    """`decode.fp8_from_4bit` of an even register's word, its four elements, times 2**9."""
    bits = ((word & 0x87878787) + ((word & 0x80808080) >> 7)).to_bytes(4, "little")
    return torch.tensor(list(bits), dtype=torch.uint8).view(E4M3).float() * 512


def int8_operand(word: int) -> torch.Tensor:
    """`decode.int8_from_4bit` of an even register's word, its four elements."""
    signs = (word >> 7 & 0x01010101) * 0xFF
    bits = (word & 0x07070707 | signs & 0xF8F8F8F8).to_bytes(4, "little")
    return torch.tensor(list(bits), dtype=torch.uint8).view(torch.int8).float()


@pytest.mark.parametrize(("name", "operand"), [("w4a8_fp8", fp8_operand), ("w4a8", int8_operand)])
def test_four_bit_words_become_8_bit_operands(name: str, operand: Callable[[int], torch.Tensor]) -> None:
    weight = random_weight(name, 1, 128, 128)
    rows_64 = kernel_weights(weight).data[: 2 * (4096 + 128)].view(2, -1)  # codes and scales of each
    words = rows_64[1, :4096].view(torch.int32).view(2, 128, 4)
    thread, half = 32 * 2 + 13, 1  # of rows 64-127: warp 2, lane 13
    for block in range(2):
        for register in range(4):
            word = int(words[half, thread, 2 * block + register // 2]) & 0xFFFFFFFF
            turned = (word >> 4 | word << 28) & 0xFFFFFFFF if register % 2 else word
            row = 64 + 16 * 2 + 13 // 4 + 8 * (register % 2)
            column = 32 * (2 * half + block) + 16 * (register // 2) + 4 * (13 % 4)
            codes = weight.codes[0, row, column : column + 4].float() - 8
            assert torch.equal(operand(turned), codes)


@pytest.mark.parametrize(
    ("name", "rows", "features", "said"),
    [
        ("w4a16", 96, 128, "multiples of 64"),
        ("w4a16", 128, 192, "multiples of 128"),
        ("w8a16", 128, 96, "multiples of 64"),
        ("w4a16_g64_asym", 128, 128, "no GPU kernel"),
        ("w4a8_g64", 128, 128, "no GPU kernel"),
        ("w4a4", 128, 128, "no GPU kernel"),
    ],
)
def test_what_no_kernel_takes_is_refused(name: str, rows: int, features: int, said: str) -> None:
    with pytest.raises(UserError, match=said):
        kernel_weights(random_weight(name, 1, rows, features))


def test_scales_that_are_not_finite_are_refused() -> None:
    weight = random_weight("w4a16", 1, 64, 128)
    weight.scales[0, 3, 0] = float("inf")
    with pytest.raises(UserError, match="not finite"):
        kernel_weights(weight)


def test_original_weights_must_be_bfloat16() -> None:
    with pytest.raises(UserError, match="expected bfloat16"):
        original_weights(torch.zeros(1, 64, 64))
