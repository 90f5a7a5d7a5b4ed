"""Every kernel and every token tile on a GPU, against float64 on the dequantized operands.

On a Hopper GPU also the kernels of ``mma.sync`` GPUs, compiled for it. Without one

    PYTHONPATH=src:tests python tests/gpu/test_group_gemm.py [FOLDER [ARCHITECTURE]]

compiles what the tests load into a folder for `MXMOE_KERNEL_CACHE`, by default the one that it names.
"""

import sys
from pathlib import Path

import pytest
import torch
from gpu_marks import RUN_HERE, needs_kernels

from mxmoe_steps.kernels import reference
from mxmoe_steps.kernels.architecture import Architecture
from mxmoe_steps.kernels.architectures import PHASES
from mxmoe_steps.kernels.build import TokenKernel, build
from mxmoe_steps.kernels.codes.format import Format
from mxmoe_steps.kernels.formats import FORMATS, kernel_format
from mxmoe_steps.kernels.launch import Activations, GroupGemmKernel, problem_table
from mxmoe_steps.kernels.layouts import gate_and_up, kernel_weights, original_weights
from mxmoe_steps.quantizers.grid import E4M3, QuantizedWeight, round_to_nearest
from mxmoe_steps.schemes import Scheme, parse_scheme

pytestmark = needs_kernels

MIXTURE = ("w16a16", "w8a8_fp8", "w4a16", "w4a8_fp8", "w4a8", "w2a16")
BORROWERS = (
    "w4a16_g-1_asym", "w4a16_g-1_sym", "w3a16_g-1_asym", "w1a16", "w1a16_g128_sym", "w4a8_g-1_sym", "w4a8_g-1_sym_fp8",
    "w4a4_g-1_sym",
)  # fmt: skip
ROWS = [5, 0, 130, 64, 17, 1, 257, 33, 0, 48, 200, 16, 32, 300, 100, 3, 8, 9]  # ragged; every tile and its edges
# Rounding the output to bf16 is 1.66e-3, rounding decoded weights to bf16 another 1.2e-3, or 1.8e-3 where a row has
# only eight of them, equal ones rounded alike; given rounded weights, what is left is the rounding of the output.
SYMMETRIC_BOUND, ASYMMETRIC_BOUND, DECODED_BOUND = 2.4e-3, 2.6e-3, 1.9e-3
LONG_FP8_BOUND = 4e-3  # K = 14336: fp8 tensor cores keep about 14 bits of a running sum


def quantize(weight: torch.Tensor, scheme: Scheme) -> QuantizedWeight:
    """Plain round-to-nearest of [E, N, K]: the kernels do not care how well."""
    if scheme.floats is not None:
        return round_to_nearest(weight.float(), scheme)
    features, size = weight.shape[-1], scheme.group_size(weight.shape[-1])
    ragged = weight[..., -1:].expand(*weight.shape[:-1], -features % size)
    groups = torch.cat([weight, ragged], -1).float().unflatten(-1, (-1, size))
    if scheme.fp8 and scheme.weight_bits == 8:
        scales = (groups.abs().amax(-1) / 448).bfloat16()
        codes = (groups / scales.float()[..., None]).clamp(-448, 448).to(E4M3)
        return QuantizedWeight(scheme, codes.flatten(-2), scales, None)
    top = 2**scheme.weight_bits - 1
    low, high = groups.amin(-1), groups.amax(-1)
    if scheme.symmetric:
        scales = (groups.abs().amax(-1) * 2 / top).bfloat16()
        zeros = torch.full_like(scales, 2 ** (scheme.weight_bits - 1))
    else:
        scales = ((high - low) / top).bfloat16()
        zeros = (-low / scales.float()).bfloat16()
    codes = (groups / scales.float()[..., None] + zeros.float()[..., None]).round().clamp(0, top).to(torch.uint8)
    codes = codes.flatten(-2)[..., :features].contiguous()
    return QuantizedWeight(scheme, codes, scales, None if scheme.symmetric else zeros)


def as_decoded(weight: QuantizedWeight | torch.Tensor) -> QuantizedWeight | torch.Tensor:
    """The bfloat16 weights that kernels decode codes of fewer than 8 bits to, where activations are bfloat16."""
    if isinstance(weight, torch.Tensor) or weight.scheme.act_bits < 16 or weight.scheme.weight_bits == 8:
        return weight
    return weight.dequantize().bfloat16()


def activations_of(x: torch.Tensor, operands: tuple[str, ...]) -> dict[str, Activations]:
    return {
        name: Activations(x) if name == "bf16" else Activations(*reference.quantize_tokens(x, name))
        for name in operands
    }


def assert_right(errors: dict[str, float]) -> None:
    print(errors)
    for name, error in errors.items():
        assert error < (ASYMMETRIC_BOUND if name.endswith("_asym") else SYMMETRIC_BOUND), (name, error)


def relative_error(out: torch.Tensor, exact: torch.Tensor) -> float:
    return ((out.double() - exact).norm() / exact.norm()).item()


def run_mixture(
    architecture: Architecture,
    schemes: list[Scheme],
    phase: str,
    rows: list[int],
    shape: tuple[int, int],
    seed: int,
) -> dict[str, float]:
    """One launch with gate and up (two problems an expert), schemes dealt round-robin; errors by scheme."""
    torch.manual_seed(seed)
    n, k = shape
    experts, columns = len(rows), 2 * n + 64
    ordered = sorted(schemes, key=lambda scheme: kernel_format(scheme))
    weights: list[QuantizedWeight | torch.Tensor] = []
    packed = []
    for scheme in ordered:
        dense = (torch.randn(experts, n, k, device="cuda") * 0.05 + 0.01).bfloat16()
        weights.append(dense if scheme.is_original else quantize(dense, scheme))
        packed.append(original_weights(dense) if scheme.is_original else kernel_weights(weights[-1]))
    problems = [
        (expert, (2 * expert + block) % len(ordered), (7 * expert + block) % experts, block * (n + 64))
        for expert in range(experts)
        for block in range(2)
    ]
    offsets = torch.tensor([0, *rows]).cumsum(0).tolist()
    total = offsets[-1]
    x = (torch.randn(total, k, device="cuda") * 0.5 + 0.05).bfloat16()
    config = architecture.config(tuple(weight.format for weight in packed), phase)
    out = torch.full((total + 70, columns), float("nan"), device="cuda", dtype=torch.bfloat16)
    table = problem_table(problems, packed, experts, columns, "cuda")
    on_gpu = torch.tensor(offsets, dtype=torch.int32, device="cuda")
    given = activations_of(torch.cat([x, torch.zeros(70, k, device="cuda", dtype=x.dtype)]), config.operands)
    kernel = GroupGemmKernel(config)
    kernel(given, packed, table, on_gpu, out)
    first = out.clone()
    kernel(given, packed, table, on_gpu, out)  # the tile counters are back at zero
    assert torch.equal(first.view(torch.int16), out.view(torch.int16))
    torch.cuda.synchronize()
    assert out[total:].isnan().all(), "wrote past the last token"
    assert out[:, n : n + 64].isnan().all(), "wrote past the last output feature"
    exact = reference.group_gemm(x, offsets, problems, weights, columns, torch.float64)
    alike = reference.group_gemm(x, offsets, problems, list(map(as_decoded, weights)), columns, torch.float64)
    errors = {}
    for number, scheme in enumerate(ordered):
        mine = [(e, c) for e, w, _, c in problems if w == number and rows[e]]
        got = torch.cat([out[offsets[e] : offsets[e + 1], c : c + n].flatten() for e, c in mine])
        want = torch.cat([exact[offsets[e] : offsets[e + 1], c : c + n].flatten() for e, c in mine])
        assert not got.isnan().any(), f"{scheme}: some outputs were not written"
        errors[scheme.name] = relative_error(got, want)
        if scheme.act_bits == 16:
            same = torch.cat([alike[offsets[e] : offsets[e + 1], c : c + n].flatten() for e, c in mine])
            assert relative_error(got, same) < DECODED_BOUND, (scheme.name, relative_error(got, same))
    return errors


def scheme_of(format_: Format) -> Scheme:
    return parse_scheme(format_.name)


def mixture_of(architecture: Architecture) -> list[Scheme]:
    """Of all types that its tensor cores multiply."""
    schemes = map(parse_scheme, MIXTURE)
    return [scheme for scheme in schemes if kernel_format(scheme).operand in architecture.operands]


on_architectures = pytest.mark.parametrize("architecture", RUN_HERE, ids=lambda one: one.name)


def on_formats(*formats: Format) -> pytest.MarkDecorator:
    """``architecture`` and ``format_`` that its tensor cores multiply."""
    pairs = [
        pytest.param(one, format_, id=f"{one.name}-{format_.name}")
        for one in RUN_HERE
        for format_ in formats
        if format_.operand in one.operands
    ]
    return pytest.mark.parametrize(("architecture", "format_"), pairs)


@pytest.mark.parametrize("phase", sorted(PHASES))
@on_formats(*FORMATS)
def test_every_tile_is_right(architecture: Architecture, format_: Format, phase: str) -> None:
    for seed, (shape, rows) in enumerate([((192, 384), ROWS), ((320, 1408), ROWS[::-1]), ((64, 128), [0, 1, 0, 2])]):
        errors = run_mixture(architecture, [scheme_of(format_)], phase, rows, shape, seed)
        assert_right(errors)


@pytest.mark.parametrize("phase", sorted(PHASES))
@on_formats(*FORMATS)
def test_features_in_odd_multiples_of_64(architecture: Architecture, format_: Format, phase: str) -> None:
    """A group and a half, and the 22.5 of gpt-oss."""
    for features in (192, 2880):
        errors = run_mixture(architecture, [scheme_of(format_)], phase, ROWS, (192, features), 5)
        assert_right(errors)


@on_architectures
@pytest.mark.parametrize("phase", sorted(PHASES))
def test_a_mixture_is_as_right_as_its_parts(architecture: Architecture, phase: str) -> None:
    errors = run_mixture(architecture, mixture_of(architecture), phase, ROWS, (192, 1408), 9)
    assert_right(errors)


@pytest.mark.parametrize("name", BORROWERS)
@on_architectures
def test_schemes_that_borrow_a_kernel(architecture: Architecture, name: str) -> None:
    scheme = parse_scheme(name)
    if kernel_format(scheme).operand not in architecture.operands:
        pytest.skip("has no tensor cores for it")
    errors = run_mixture(architecture, [scheme], "decode", ROWS, (192, 384), 11)
    assert_right(errors)


@on_architectures
def test_long_sums_keep_their_bits(architecture: Architecture) -> None:
    for name in ("w8a8", "w4a8", "w4a16", *(["w4a8_fp8"] if "fp8" in architecture.operands else [])):
        assert_right(run_mixture(architecture, [parse_scheme(name)], "prefill", [40, 300], (128, 14336), 13))
    if "fp8" not in architecture.operands:
        return
    errors = run_mixture(architecture, [parse_scheme("w8a8_fp8")], "prefill", [40, 300], (128, 14336), 13)
    assert max(errors.values()) < LONG_FP8_BOUND


@pytest.mark.parametrize("code", [0, 15])
@pytest.mark.parametrize("features", [4096, 4224, 14336])
@on_architectures
def test_int8_sums_at_their_limit(architecture: Architecture, code: int, features: int) -> None:
    """Every product has the same sign and is the largest: 32 groups just fit into the float32 sums of the kernel."""
    scheme, rows = parse_scheme("w4a8"), 250
    scales = torch.rand(1, 128, features // 128, device="cuda").add(0.5).bfloat16()
    codes = torch.full((1, 128, features), code, dtype=torch.uint8, device="cuda")
    weight = QuantizedWeight(scheme, codes, scales, None)
    x = torch.ones(rows, features, device="cuda", dtype=torch.bfloat16)
    x[::2] = -1.0
    packed = [kernel_weights(weight)]
    out = torch.empty(rows, 128, device="cuda", dtype=torch.bfloat16)
    problems = [(0, 0, 0, 0)]
    table = problem_table(problems, packed, 1, 128, "cuda")
    offsets = torch.tensor([0, rows], dtype=torch.int32, device="cuda")
    config = architecture.config((packed[0].format,), "prefill")
    GroupGemmKernel(config)(activations_of(x, config.operands), packed, table, offsets, out)
    exact = reference.group_gemm(x, [0, rows], problems, [weight], 128, torch.float64)
    assert relative_error(out, exact) < SYMMETRIC_BOUND


@on_architectures
def test_more_than_64_experts(architecture: Architecture) -> None:
    rows = torch.randint(0, 40, (64,), generator=torch.Generator().manual_seed(3)).tolist()
    errors = run_mixture(architecture, [parse_scheme("w4a16")], "decode", rows, (128, 256), 17)
    assert_right(errors)


@pytest.mark.parametrize("phase", sorted(PHASES))
@pytest.mark.parametrize("name", ["w16a16", "w4a16"])
@on_architectures
def test_launches_overlap_in_everything_but_tokens(architecture: Architecture, name: str, phase: str) -> None:
    """Launches in a row, each on the outputs of the one before and with the same tile counters: in a CUDA graph, where
    they overlap, and one by one."""
    torch.manual_seed(23)
    experts, n, rows, count = 6, 1024, [3, 0, 9, 1, 0, 5], 30
    dense = (torch.randn(experts, n, n, device="cuda") * n**-0.5).bfloat16()
    scheme = parse_scheme(name)
    packed = [original_weights(dense) if scheme.is_original else kernel_weights(quantize(dense, scheme))]
    table = problem_table([(e, 0, e, 0) for e in range(experts)], packed, experts, n, "cuda")
    offsets = torch.tensor([0, *rows], device="cuda").cumsum(0).int()
    kernel = GroupGemmKernel(architecture.config((packed[0].format,), phase))
    start = torch.randn(sum(rows), n, device="cuda").bfloat16()
    steps = [start, *(torch.empty_like(start) for _ in range(count))]

    def step(i: int) -> None:
        kernel({"bf16": Activations(steps[i])}, packed, table, offsets, steps[i + 1])

    for i in range(count):
        step(i)
        torch.cuda.synchronize()
    alone = steps[-1].clone()
    assert alone.float().norm() > 0.1 * start.float().norm()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(count):
            step(i)
    for _ in range(20):
        for tokens in steps[1:]:
            tokens.fill_(float("nan"))
        graph.replay()
        assert torch.equal(steps[-1], alone)


GATED = ("w16a16", "w4a16", "w8a8", "w4a8")


@on_architectures
@pytest.mark.parametrize("phase", sorted(PHASES))
@pytest.mark.parametrize("name", GATED)
def test_gated_launches_store_products(architecture: Architecture, name: str, phase: str) -> None:
    torch.manual_seed(29)
    scheme, n, k = parse_scheme(name), 96, 256
    experts, offsets = len(ROWS), torch.tensor([0, *ROWS]).cumsum(0).tolist()
    dense = [(torch.randn(experts, n, k, device="cuda") * 0.1).bfloat16() for _ in range(2)]
    if scheme.is_original:
        stored, packed = dense, [original_weights(gate_and_up(*dense))]
    else:
        stored = [quantize(one, scheme) for one in dense]
        codes, scales = (gate_and_up(*(getattr(one, part) for one in stored)) for part in ("codes", "scales"))
        zeros = None if stored[0].zeros is None else gate_and_up(*(one.zeros for one in stored))
        packed = [kernel_weights(QuantizedWeight(scheme, codes, scales, zeros))]
    x = torch.randn(offsets[-1], k, device="cuda").bfloat16()
    config = architecture.config((packed[0].format,), phase, gated=True)
    table = problem_table([(e, 0, e, 0) for e in range(experts)], packed, experts, n, "cuda", gated=True)
    out = torch.full((offsets[-1] + 40, n), float("nan"), device="cuda", dtype=torch.bfloat16)
    given = activations_of(torch.cat([x, x[:40]]), config.operands)
    GroupGemmKernel(config)(given, packed, table, torch.tensor(offsets, dtype=torch.int32, device="cuda"), out)
    problems = [(e, 0, e, 0) for e in range(experts)]
    gate, up = (
        reference.group_gemm(x, offsets, problems, [one], n, torch.float64).bfloat16().double() for one in stored
    )
    exact = gate * gate.sigmoid() * up
    assert out[offsets[-1] :].isnan().all()
    assert relative_error(out[: offsets[-1]], exact) < 2 * ASYMMETRIC_BOUND


def main() -> None:
    """Build every kernel that the tests in this folder load: run where there is a compiler and no GPU."""
    cache = Path(sys.argv[1]) if len(sys.argv) > 1 else None
    for architecture in (one for one in RUN_HERE if one.name in (sys.argv[2:] or one.name)):
        mixture = tuple(kernel_format(scheme) for scheme in mixture_of(architecture))
        alone = [(format_,) for format_ in FORMATS if format_.operand in architecture.operands]
        for formats in [*alone, mixture]:
            for phase in architecture.phases:
                print(build(architecture.config(formats, phase), cache), flush=True)
        for format_ in (kernel_format(parse_scheme(name)) for name in GATED):
            for phase in architecture.phases:
                print(build(architecture.config((format_,), phase, gated=True), cache), flush=True)
        for name in architecture.token_kernels:
            print(build(TokenKernel(name, architecture), cache), flush=True)


if __name__ == "__main__":
    main()
