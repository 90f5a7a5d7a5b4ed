"""Grids, packing and GPTQ against independent float64 references."""

import math

import numpy as np
import pytest
import torch

from mxmoe_steps import packing
from mxmoe_steps.quantizers import grid as grids
from mxmoe_steps.quantizers.gptq import gptq
from mxmoe_steps.quantizers.grid import from_tensors, quantize_activations, round_to_nearest
from mxmoe_steps.quantizers.hadamard import rotate
from mxmoe_steps.quantizers.hessians import Hessians
from mxmoe_steps.schemes import parse_scheme

SCHEMES = [
    "w8a16", "w6a16", "w4a16", "w3a16", "w2a16", "w1a16", "w4a16_g32_sym", "w4a16_mxfp4", "w8a8", "w8a8_fp8", "w4a8",
    "w4a8_fp8", "w4a4",
]  # fmt: skip
E2M1 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]  # OCP Microscaling Formats v1.0, table 5


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("in_features", [1, 7, 8, 64, 129])
def test_packing_is_the_documented_bit_stream(bits: int, in_features: int) -> None:
    generator = torch.Generator().manual_seed(bits * 1000 + in_features)
    codes = torch.randint(0, 2**bits, (3, in_features), generator=generator, dtype=torch.uint8)
    packed = packing.pack(codes, bits)
    assert packed.shape == (3, math.ceil(in_features / 8) * bits)
    assert torch.equal(packing.unpack(packed, bits, in_features), codes)
    stream = np.unpackbits(packed.numpy(), axis=-1, bitorder="little")
    for k in range(in_features):
        expected = sum(int(bit) << j for j, bit in enumerate(stream[1, k * bits : (k + 1) * bits]))
        assert expected == codes[1, k]


def test_packing_refuses_a_wrong_width() -> None:
    with pytest.raises(ValueError, match="3 bits"):
        packing.unpack(torch.zeros(2, 5, dtype=torch.uint8), 3, 16)


@pytest.mark.parametrize("name", SCHEMES)
@pytest.mark.parametrize("in_features", [128, 256, 192, 100])
def test_stored_tensors_round_trip_and_count_their_bits(name: str, in_features: int) -> None:
    scheme = parse_scheme(name)
    weight = torch.randn(2, 24, in_features, generator=torch.Generator().manual_seed(1))
    quantized = round_to_nearest(weight, scheme)
    stored = quantized.tensors()
    again = from_tensors(scheme, in_features, {key: value.clone() for key, value in stored.items()})
    assert torch.equal(again.dequantize(), quantized.dequantize())
    if in_features % 8 == 0:
        stored_bits = sum(tensor.numel() * tensor.element_size() * 8 for tensor in stored.values())
        assert stored_bits == pytest.approx(scheme.bits(in_features) * weight.numel())


@pytest.mark.parametrize("name", ["w4a16", "w3a16", "w2a16", "w1a16", "w4a8"])
def test_a_ragged_last_group_is_a_group_of_its_own_size(name: str) -> None:
    scheme = parse_scheme(name)
    generator = torch.Generator().manual_seed(2)
    weight = torch.randn(64, 2 * 128 + 40, generator=generator)
    importance = torch.rand(weight.shape[1], generator=generator)
    whole = round_to_nearest(weight, scheme, importance).dequantize()
    for columns in (slice(0, 256), slice(256, 296)):
        alone = round_to_nearest(weight[:, columns], scheme, importance[columns]).dequantize()
        errors = [
            ((restored - weight[:, columns]).square() * importance[columns]).sum()
            for restored in (whole[:, columns], alone)
        ]
        assert errors[0] == pytest.approx(float(errors[1]), rel=1e-3)


@pytest.mark.parametrize("name", SCHEMES)
def test_rounding_picks_the_nearest_grid_point(name: str) -> None:
    scheme = parse_scheme(name)
    weight = torch.randn(5, 256, generator=torch.Generator().manual_seed(2))
    quantized = round_to_nearest(weight, scheme)
    if scheme.fp8 and scheme.weight_bits == 8:
        values = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).double()
        values = values[values.isfinite()]
    elif scheme.floats is not None:
        values = torch.tensor([*E2M1, *(-value for value in E2M1)], dtype=torch.float64)
    else:
        values = torch.arange(2.0**scheme.weight_bits, dtype=torch.float64)
    size = scheme.group_size(256)
    for row in range(5):
        for group in range(256 // size):
            scale = quantized.scales[row, group].double()
            offset = torch.tensor(2.0 ** (scheme.weight_bits - 1), dtype=torch.float64)
            if quantized.zeros is not None:
                offset = quantized.zeros[row, group].double()
            if (scheme.fp8 and scheme.weight_bits == 8) or scheme.floats is not None:
                offset = torch.tensor(0.0, dtype=torch.float64)
            points = values * scale + (-offset * scale).bfloat16().double()  # rounded as in the kernels
            columns = slice(group * size, (group + 1) * size)
            best = (weight[row, columns, None].double() - points).abs().amin(-1)
            got = (weight[row, columns].double() - quantized.dequantize()[row, columns].double()).abs()
            assert torch.allclose(got, best, atol=1e-5)


def test_mxfp4_bytes_mean_what_the_specification_says() -> None:
    """Every code under every scale, decoded by the definition of e2m1 and e8m0: sign, exponent, mantissa."""
    scheme = parse_scheme("w4a16_mxfp4")
    scales = torch.arange(255, dtype=torch.uint8).view(255, 1)  # 255 is NaN
    codes = torch.arange(16, dtype=torch.uint8).repeat(255, 2)
    weight = from_tensors(scheme, 32, {"qweight": packing.pack(codes, 4), "scales": scales})
    restored = weight.dequantize().double()
    for code in range(16):
        sign, exponent, mantissa = code >> 3, code >> 1 & 3, code & 1
        value = mantissa * 0.5 if exponent == 0 else 2.0 ** (exponent - 1) * (1 + mantissa / 2)
        expected = (-1.0) ** sign * value * 2.0 ** (torch.arange(255, dtype=torch.float64) - 127)
        finite = expected.abs() < 2.0**128  # 6 * 2**127 is past float32
        assert torch.equal(restored[finite, code], expected[finite]), code
    assert torch.equal(weight.tensors()["scales"], scales)


def test_halfway_between_two_e2m1_numbers_goes_to_the_even_code() -> None:
    """As IEEE 754 and the specification round; the sign survives, what is too large saturates."""
    floats = parse_scheme("w4a16_mxfp4").floats
    assert floats is not None
    halfway = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0])
    assert grids.float_codes(halfway, floats).tolist() == [0, 2, 2, 4, 4, 6, 6]
    above, below = (torch.nextafter(halfway, torch.tensor(end)) for end in (9.0, 0.0))
    assert grids.float_codes(above, floats).tolist() == [1, 2, 3, 4, 5, 6, 7]
    assert grids.float_codes(-below, floats).tolist() == [0, 9, 10, 11, 12, 13, 14]
    assert grids.float_codes(torch.tensor([6.0, 7.9, 1e9, -1e9]), floats).tolist() == [7, 7, 7, 15]


def test_mxfp4_scales_are_the_powers_of_two_of_least_error() -> None:
    weight = torch.randn(64, 96, generator=torch.Generator().manual_seed(4)) * torch.logspace(-6, 6, 64)[:, None]
    quantized = round_to_nearest(weight, parse_scheme("w4a16_mxfp4"))
    numbers = torch.tensor([*E2M1, *(-value for value in E2M1)], dtype=torch.float64)
    groups = weight.double().view(64, 3, 32)
    errors = []
    for exponent in range(-40, 40):
        points = numbers * 2.0**exponent
        errors.append((groups[..., None] - points).abs().amin(-1).square().sum(-1))
    best = torch.stack(errors).amin(0)
    got = (quantized.dequantize().double().view(64, 3, 32) - groups).square().sum(-1)
    assert torch.allclose(got, best, rtol=1e-5)
    assert quantized.scales.float().log2().frac().abs().max() == 0


def test_one_bit_grid_is_close_to_exact_two_means() -> None:
    scheme = parse_scheme("w1a16")
    weight = torch.randn(16, 128, generator=torch.Generator().manual_seed(3)).double()
    got = (round_to_nearest(weight.float(), scheme).dequantize().double() - weight).square().sum(-1)
    ordered = weight.sort(-1).values
    best = torch.stack(
        [
            (ordered[:, :cut] - ordered[:, :cut].mean(-1, keepdim=True)).square().sum(-1)
            + (ordered[:, cut:] - ordered[:, cut:].mean(-1, keepdim=True)).square().sum(-1)
            for cut in range(1, 128)
        ]
    ).amin(0)
    assert (got / best).max() < 1.05


def test_constant_and_zero_groups_survive() -> None:
    for name in SCHEMES:
        scheme = parse_scheme(name)
        weight = torch.zeros(3, 128)
        weight[1] = 0.7
        weight[2] = -3.0
        restored = round_to_nearest(weight, scheme).dequantize()
        assert restored.isfinite().all()
        assert restored[0].abs().max() == 0 or scheme.symmetric
        assert torch.allclose(restored, weight, rtol=0.13 if scheme.weight_bits < 8 else 0.01, atol=1e-6), name


@pytest.mark.parametrize("name", ["w8a8", "w8a8_fp8", "w4a4"])
def test_activation_quantization_is_per_token(name: str) -> None:
    scheme = parse_scheme(name)
    x = torch.randn(7, 64, generator=torch.Generator().manual_seed(4)) * torch.logspace(-3, 3, 7).unsqueeze(-1)
    x[3] = 0
    got = quantize_activations(x, scheme)
    assert torch.equal(got[3], torch.zeros(64))
    error = ((got - x).norm(dim=-1) / x.norm(dim=-1).clamp_min(1e-9))[[0, 1, 2, 4, 5, 6]]
    assert error.max() < {"w8a8": 0.012, "w8a8_fp8": 0.04, "w4a4": 0.2}[name]
    assert torch.allclose(quantize_activations(x[2:3], scheme), got[2:3])


def _hadamard(size: int) -> torch.Tensor:
    """float64 block-diagonal R [K, K] from the Kronecker definition."""
    block = torch.ones(1, 1, dtype=torch.float64)
    while size % (2 * len(block)) == 0:
        block = torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64), block)
    return torch.block_diag(*[block / len(block) ** 0.5] * (size // len(block)))


@pytest.mark.parametrize("size", [1, 7, 64, 96, 352])
def test_rotation_is_the_hadamard_matrix_and_leaves_a_linear_block_unchanged(size: int) -> None:
    generator = torch.Generator().manual_seed(size)
    x = torch.randn(3, 5, size, generator=generator, dtype=torch.float64)
    weight = torch.randn(9, size, generator=generator, dtype=torch.float64)
    assert torch.allclose(rotate(x), x @ _hadamard(size), atol=1e-12)
    assert torch.allclose(rotate(rotate(x)), x, atol=1e-12)
    assert torch.allclose(rotate(x) @ rotate(weight).T, x @ weight.T, atol=1e-12)


def test_rotated_hessians_are_those_of_rotated_inputs() -> None:
    x = torch.randn(50, 24, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    moments = Hessians((x.T @ x).unsqueeze(0), torch.tensor([50]), x.T @ x / 50, 0.01).rotated()
    turned = x @ _hadamard(24)
    assert torch.allclose(moments.sums[0], turned.T @ turned)
    assert torch.allclose(moments.layer, turned.T @ turned / 50)


def test_stacks_concatenate_and_split() -> None:
    weight = torch.randn(5, 16, 64, generator=torch.Generator().manual_seed(0))
    for name in ("w4a16_g32", "w8a8_fp8"):
        whole = round_to_nearest(weight, parse_scheme(name))
        parts = [round_to_nearest(weight[part], parse_scheme(name)) for part in (slice(0, 2), slice(2, 5))]
        assert torch.equal(grids.concatenate(parts).dequantize(), whole.dequantize())
        assert torch.equal(whole[1:3, 4:9].dequantize(), whole.dequantize()[1:3, 4:9])


def _gptq_reference(weight: torch.Tensor, hessian: torch.Tensor, grid: grids.Grid) -> torch.Tensor:
    """One expert in float64 by the definition: quantize a column, move the error by the OBS update,
    remove the column from the inverse Hessian (no Cholesky factor, no blocks)."""
    weight, inverse = weight.double().clone(), torch.linalg.inv(hessian)
    result = torch.zeros_like(weight)
    for column in hessian.diagonal().argsort(descending=True, stable=True).tolist():
        cell = grid.columns(torch.tensor([[column]]))
        code = cell.round(weight[None, :, column, None].float())
        result[:, column] = cell.value(code)[0, :, 0].double()
        error = (weight[:, column] - result[:, column]) / inverse[column, column]
        weight -= error[:, None] * inverse[column][None, :]
        inverse -= torch.outer(inverse[:, column], inverse[column]) / inverse[column, column]
        weight[:, column] = result[:, column]
    return result


@pytest.mark.parametrize(
    "name", ["w2a16_g64", "w3a16_g32", "w6a16_g32", "w4a16_mxfp4", "w4a8", "w8a8", "w8a8_fp8", "w1a16_g32"]
)
def test_gptq_matches_the_definition_and_beats_rounding(name: str) -> None:
    scheme = parse_scheme(name)
    generator = torch.Generator().manual_seed(5)
    experts, out_features, in_features = 3, 12, 160
    weight = torch.randn(experts, out_features, in_features, generator=generator)
    mixing = torch.randn(in_features, in_features, generator=generator, dtype=torch.float64)
    tokens = torch.tensor([900, 40, 0])  # plenty, too few, none
    sums = []
    for count in tokens.tolist():
        x = torch.randn(count, in_features, generator=generator, dtype=torch.float64) @ mixing
        sums.append(x.T @ x)
    hessians = Hessians(torch.stack(sums), tokens, torch.stack(sums).sum(0) / tokens.sum(), 0.01)
    got = gptq(weight, hessians, scheme)
    shrunk = hessians.shrunk()
    grid = grids.find_grid(weight, scheme, importance=shrunk.diagonal(dim1=-2, dim2=-1).float())
    rounded = round_to_nearest(weight, scheme)
    for expert in range(experts):
        own = grids.Grid(scheme, grid.scales[expert : expert + 1], grid.zeros[expert : expert + 1])
        expected = _gptq_reference(weight[expert], shrunk[expert], own)

        def damage(restored: torch.Tensor, expert: int = expert) -> float:
            change = restored.double() - weight[expert].double()
            return float(torch.einsum("nk,kl,nl->", change, shrunk[expert], change))

        ours = damage(got.dequantize()[expert])
        # A tie decided by float32 rounding may send a row another way; the damage must agree closely.
        assert ours == pytest.approx(damage(expected), rel=0.05)
        assert ours < damage(rounded.dequantize()[expert])
