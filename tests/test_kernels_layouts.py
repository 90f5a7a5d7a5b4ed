"""Kernel order of weights: exact inverses for every scheme and size the kernels take."""

import pytest
import torch
from kernel_weights import random_weight

from mxmoe_steps.errors import UserError
from mxmoe_steps.kernels.layouts import kernel_weights, original_weights, quantized_weight

SCHEMES = [
    "w8a8", "w8a8_fp8", "w8a16", "w4a16", "w4a16_g128_sym", "w4a16_g-1_asym", "w4a16_g-1_sym", "w3a16",
    "w3a16_g128_sym", "w2a16", "w2a16_g128_sym", "w1a16", "w1a16_g128_sym", "w4a8_fp8", "w4a8", "w4a8_g-1_sym",
]  # fmt: skip


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


def test_scales_that_are_too_large_to_decode_with_are_refused() -> None:
    weight = random_weight("w4a16", 1, 64, 128)
    weight.scales[0, 3, 0] = 2048.0
    with pytest.raises(UserError, match="2048 or more"):
        kernel_weights(weight)


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
