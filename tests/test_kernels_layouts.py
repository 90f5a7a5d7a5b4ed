"""Kernel order of weights: exact inverses for every scheme and size the kernels take."""

import pytest
import torch
from kernel_weights import random_weight

from mxmoe_steps.errors import UserError
from mxmoe_steps.kernels.codes.format import Format
from mxmoe_steps.kernels.formats import FORMATS
from mxmoe_steps.kernels.layouts import kernel_weights, original_weights, quantized_weight
from mxmoe_steps.quantizers.grid import round_to_nearest

BORROWERS = ["w4a16_g-1_asym", "w4a16_g-1_sym", "w1a16", "w1a16_g128_sym", "w4a8_g-1_sym", "w4a4_g-1_sym"]
QUANTIZED = [format_ for format_ in FORMATS if not format_.original]


@pytest.mark.parametrize("name", [*(format_.name for format_ in QUANTIZED), *BORROWERS])
@pytest.mark.parametrize(("rows", "features"), [(64, 128), (192, 384), (256, 256), (64, 192)])
def test_kernel_order_is_exactly_invertible(name: str, rows: int, features: int) -> None:
    weight = random_weight(name, 2, rows, features)
    back = quantized_weight(kernel_weights(weight), weight.scheme)
    assert torch.equal(back.codes.view(torch.uint8), weight.codes.view(torch.uint8))
    assert torch.equal(back.scales, weight.scales)
    assert (back.zeros is None) == (weight.zeros is None)
    assert weight.zeros is None or torch.equal(back.zeros, weight.zeros)


@pytest.mark.parametrize("format_", [f for f in FORMATS if f.decoded], ids=lambda format_: format_.name)
def test_every_bit_of_a_word_is_a_bit_of_one_code(format_: Format) -> None:
    elements = 32 // format_.act_bits
    axes = torch.meshgrid(torch.arange(16 // elements), torch.arange(4), torch.arange(elements), indexing="ij")
    taken = []
    for field in format_.fields(*(axis.flatten() for axis in axes)):
        assert field.low == len(taken)
        taken += [32 * field.word + field.shift + bit for bit in range(field.width)]
    assert torch.equal(torch.cat(taken).sort().values, torch.arange(64 * format_.bits))


@pytest.mark.parametrize("format_", [f for f in FORMATS if f.decoded], ids=lambda format_: format_.name)
def test_words_are_made_where_the_weights_are(format_: Format) -> None:
    """No tensor of the processor's meets the weights: on a GPU that is an error, as it is on the meta device."""
    at = torch.zeros(64, dtype=torch.int64, device="meta")
    places = [tensor for field in format_.fields(at, at, at) for tensor in (field.word, field.shift)]
    if format_.grouped:
        places.append(format_.numbers(round_to_nearest(torch.empty(128, 256, device="meta"), format_.scheme)))
    assert {tensor.device.type for tensor in places} == {"meta"}


def test_split_six_bit_codes_match_their_diagram() -> None:
    weight = random_weight("w6a16", 1, 128, 128)
    half = kernel_weights(weight).data[: 2 * (6144 + 256)].view(2, -1)[1]
    words = torch.cat([half[:2048].view(torch.int32).view(128, 4), half[2048:3072].view(torch.int32).view(128, 2)], 1)
    thread = 32 * 2 + 13
    row, column = 64 + 16 * 2 + 13 // 4, 16 * 3 + 2 * (13 % 4)  # block 3, the second of words 3..5
    first, second, third = (int(word) & 0xFFFFFFFF for word in words[thread, 3:6])
    for element in range(2):
        for register, at in ((2, 0), (3, 8)):
            code = int(weight.codes[0, row + 8 * (register % 2), column + 8 + element])
            bits = [first >> at + 6, third >> at + 6, second >> at]
            assert [bit >> 16 * element & 3 for bit in bits] == [code >> 4, code >> 2 & 3, code & 3]
        assert third >> 16 * element & 63 == int(weight.codes[0, row, column + element])


def test_mxfp4_words_match_their_diagram() -> None:
    weight = random_weight("w4a16_mxfp4", 1, 128, 128)
    half = kernel_weights(weight).data[: 2 * (4096 + 256)].view(2, -1)[0]
    thread, block = 32 + 6, 6
    row, column = 16 + 6 // 4, 16 * block + 2 * (6 % 4)
    word = int(half[2048:4096].view(torch.int32).view(128, 4)[thread, block - 4]) & 0xFFFFFFFF
    for register, (sign, magnitude) in enumerate(((15, 6), (12, 3), (13, 0), (14, 9))):
        for element in range(2):
            code = int(weight.codes[0, row + 8 * (register % 2), column + 8 * (register // 2) + element])
            assert (word >> sign + 16 * element & 1) << 3 | word >> magnitude + 16 * element & 7 == code
    numbers = half[4096:].view(4, 8, 2, 2, 2)  # warp, row of 8, half of the chunk, r % 2, group of 32
    exponents = weight.scales[0].float().log2().int() + 127 + 110
    assert torch.equal(numbers[1, 3, :, 1].flatten().int(), exponents[16 + 8 + 3])


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


@pytest.mark.parametrize("format_", [f for f in FORMATS if f.scale_limit < 1e30], ids=lambda format_: format_.name)
def test_scales_that_are_too_large_to_decode_with_are_refused(format_: Format) -> None:
    weight = random_weight(format_.name, 1, 64, 128)
    weight.scales[0, 3, 0] = format_.scale_limit / 2
    kernel_weights(weight)
    weight.scales[0, 3, 0] = format_.scale_limit
    with pytest.raises(UserError, match=f"{format_.scale_limit:.0f} or more"):
        kernel_weights(weight)


@pytest.mark.parametrize(
    ("name", "rows", "features", "said"),
    [
        ("w4a16", 96, 128, "multiples of 64"),
        ("w4a16", 128, 160, "multiples of 64"),
        ("w8a16", 128, 96, "multiples of 64"),
        ("w4a16_g64_asym", 128, 128, "no GPU kernel"),
        ("w4a8_g64", 128, 128, "no GPU kernel"),
        ("w4a4_g64", 128, 128, "no GPU kernel"),
        ("w8a16_g128_sym", 128, 128, "no GPU kernel"),
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
