"""The whole MoE layer on a GPU, against float64 with the same bfloat16 intermediates."""

import random
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from gpu_marks import RUN_HERE, needs_kernels

from mxmoe_steps.kernels import launch, moe_layer, plan, reference
from mxmoe_steps.kernels.architecture import ROTATED_KERNELS, Architecture
from mxmoe_steps.kernels.architectures import BUILT, DEFAULT
from mxmoe_steps.kernels.build import TokenKernel, build
from mxmoe_steps.kernels.formats import FORMATS, kernel_format
from mxmoe_steps.kernels.moe_layer import MoeLayer
from mxmoe_steps.kernels.plan import LayerPlan, plan_layer
from mxmoe_steps.kernels.stacks import in_memory
from mxmoe_steps.quantizers.grid import E4M3, QuantizedWeight, from_e8m0, to_e8m0
from mxmoe_steps.schemes import BLOCKS, SHARED, Scheme, parse_scheme

pytestmark = needs_kernels
every_architecture = pytest.mark.parametrize("architecture", RUN_HERE, ids=lambda one: one.name)

QWEN = (2048, 1408, 4)  # hidden, intermediate, slices of the shared expert: Qwen1.5-MoE with fewer experts
UNIFORM = tuple(format_.name for format_ in FORMATS if format_.asymmetric == format_.zeros)
BY_EXPERT = (("w16a16",), ("w4a16",), ("w8a8",), ("w8a8_fp8", "w4a8", "w2a16"))
ROTATED = (  # one with all that rows of one token can be; what w4a4 is for
    ("w16a16", "w4a16", "w8a8", "w8a8_fp8", "w2a16"),
    ("w4a8", "w8a8"),
    ("w4a4_g128", "w8a8", "w16a16"),
)
WITHOUT_GROUPS = ("w8a8", "w16a16", "w8a16")
MIXTURES = (("w2a16", "w4a16", "w8a8_fp8"), ("w16a16", "w4a8_fp8", "w8a8", "w4a16"))
# Relative Frobenius errors. Rounding the rows of the down blocks and the sum to bfloat16 is 2.4e-3; three rounded
# decodings add up. A product that falls on the other side of a bfloat16 rounding, which fp8 tensor cores make happen
# in one of a few, takes another e4m3 code, 6 to 12 % away: that is most of the error of fp8 down blocks (quantizing
# to e4m3 is itself an error of 2.6e-2), and int8 products, summed exactly, show that it is all.
# Running int8 sums (w4a8) are rounded to a step or two of a group's scale, about 1e-4 of the result; emulated, the
# neighbouring bfloat16 and int8 values that products then land on make 3.0e-3 to 5.9e-3 of a layer. Codes of int4
# (w4a4) are further apart and seldom change.
# A rotation spreads a product on the other side over all numbers that are rounded again.
BOUND, ASYMMETRIC_BOUND, RUNNING_BOUND, ROTATED_BOUND, FP8_BOUND = 4e-3, 7e-3, 8e-3, 1e-2, 3e-2

Weights = dict[tuple[int, str], QuantizedWeight | torch.Tensor]


def layer_plan(
    names: Sequence[str], experts: int, sizes: tuple[int, int, int], seed: int = 0, rotated: bool = False
) -> LayerPlan:
    """Schemes drawn from ``names`` for every block of every expert."""
    hidden, inner, slices = sizes
    return plan_layer(schemes_of(names, experts, slices, seed), hidden, inner, inner * slices, rotated=rotated)


def schemes_of(names: Sequence[str], experts: int, slices: int, seed: int) -> dict[int, tuple[Scheme, Scheme, Scheme]]:
    rng = random.Random(seed)
    deck = [parse_scheme(name) for name in names]
    numbers = [*range(experts), *([SHARED] if slices else [])]
    drawn: dict[int, tuple[Scheme, Scheme, Scheme]] = {}
    for place, expert in enumerate(numbers):  # every scheme in every kind of block, then at random
        gate, up, down = (
            deck[(place + kind) % len(deck)] if place < len(deck) else rng.choice(deck) for kind in (0, 1, 2)
        )
        drawn[expert] = (gate, up, down)
    return drawn


def random_block(scheme: Scheme, n: int, k: int) -> QuantizedWeight | torch.Tensor:
    """Random codes and plausible scales: weights of about 0.03."""
    if scheme.is_original:
        return (torch.randn(n, k, device="cuda") * 0.03).bfloat16()
    groups = -(-k // scheme.group_size(k))
    spread = 0.05 / 2**scheme.weight_bits
    if scheme.fp8 and scheme.weight_bits == 8:
        codes, spread = (torch.randn(n, k, device="cuda") * 100).clamp(-448, 448).to(E4M3), 3e-4
    else:
        codes = torch.randint(0, 2**scheme.weight_bits, (n, k), device="cuda", dtype=torch.uint8)
    scales = (spread * (1 + torch.rand(n, groups, device="cuda"))).bfloat16()
    if scheme.floats is not None:
        scales = from_e8m0(to_e8m0(scales))
    middle = (2**scheme.weight_bits - 1) / 2
    zeros = None if scheme.symmetric else (middle + torch.rand(n, groups, device="cuda") - 0.5).bfloat16()
    return QuantizedWeight(scheme, codes, scales, zeros)


def random_weights(schemes: dict[int, tuple[Scheme, Scheme, Scheme]], sizes: tuple[int, int, int]) -> Weights:
    """All blocks of a layer."""
    hidden, inner, slices = sizes
    weights: Weights = {}
    for expert, three in schemes.items():
        width = inner * slices if expert == SHARED else inner
        for block, scheme in zip(BLOCKS, three, strict=True):
            weights[expert, block] = random_block(scheme, *((hidden, width) if block == "down" else (width, hidden)))
    return weights


def make_layer(
    names: Sequence[str],
    experts: int,
    sizes: tuple[int, int, int],
    seed: int,
    gated: bool = False,
    architecture: Architecture = RUN_HERE[0],
    rotated: bool = False,
) -> tuple[MoeLayer, Weights]:
    torch.manual_seed(seed)
    weights = random_weights(schemes_of(names, experts, sizes[2], seed), sizes)
    plan = layer_plan(names, experts, sizes, seed, rotated)
    gate = (torch.randn(1, sizes[0], device="cuda") * 0.05).bfloat16() if gated else None
    device = torch.device("cuda", 0)
    return MoeLayer(plan, in_memory(weights), device, gate, architecture), weights


def route(tokens: int, experts: int, top_k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Skewed choices, the last expert never expert_ids if there is a choice, and their weights."""
    logits = torch.randn(tokens, experts, device="cuda") - torch.arange(experts, device="cuda") * 4 / experts
    if experts > top_k:
        logits[:, -1] = -torch.inf
    weights, expert_ids = logits.softmax(-1).topk(top_k)
    return expert_ids, weights


def error_of(layer: MoeLayer, weights: Weights, tokens: int, top_k: int) -> float:
    x = torch.randn(tokens, layer.plan.hidden, device="cuda").bfloat16()
    expert_ids, mixing = route(tokens, layer.plan.experts, top_k)
    mixing = mixing.bfloat16() if tokens % 2 else mixing
    logits = None if layer.gate is None else (x.double() @ layer.gate.double().T)[:, 0].bfloat16()
    out = layer(x, expert_ids, mixing)
    shared, rotated = layer.plan.slices > 0, layer.plan.rotated
    exact = reference.moe_layer(x, expert_ids, mixing, lambda e, block: weights[e, block], logits, shared, rotated)
    assert torch.equal(out, layer(x, expert_ids, mixing)), "not the same bits twice"
    return ((out.double() - exact).norm() / exact.norm()).item()


def bound_of(names: Sequence[str]) -> float:
    if any(scheme.fp8 for scheme in map(parse_scheme, names)):
        return FP8_BOUND
    if {parse_scheme("w4a8"), parse_scheme("w4a4_g128")} & set(map(parse_scheme, names)):
        return RUNNING_BOUND
    return BOUND if all(scheme.symmetric for scheme in map(parse_scheme, names)) else ASYMMETRIC_BOUND


@pytest.mark.parametrize("tokens", [1, 7, 64, 1000])
@pytest.mark.parametrize("name", UNIFORM)
@every_architecture
def test_one_scheme(architecture: Architecture, name: str, tokens: int) -> None:
    if kernel_format(parse_scheme(name)).operand not in architecture.operands:
        pytest.skip(f"{architecture.gpus} do not multiply {name}")
    layer, weights = make_layer([name], 8, QWEN, 1, gated=True, architecture=architecture)
    error = error_of(layer, weights, tokens, 4)
    print(name, tokens, error)
    assert error < bound_of([name])


@pytest.mark.parametrize("tokens", [1, 2, 33, 517, 8192])
@pytest.mark.parametrize("names", MIXTURES, ids="+".join)
@every_architecture
def test_random_mixtures(architecture: Architecture, names: Sequence[str], tokens: int) -> None:
    layer, weights = make_layer(names, 16, QWEN, tokens, architecture=architecture)
    error = error_of(layer, weights, tokens, 6)
    print(names, tokens, error)
    assert error < bound_of(names)


@pytest.mark.parametrize(
    ("experts", "top_k", "sizes"),
    [(1, 1, (256, 128, 0)), (3, 3, (128, 256, 1)), (8, 2, (4096, 14336, 0)), (100, 8, (256, 128, 2))],
)
def test_other_shapes(experts: int, top_k: int, sizes: tuple[int, int, int]) -> None:
    layer, weights = make_layer(MIXTURES[0], experts, sizes, 3)
    error = error_of(layer, weights, 300, top_k)
    print(sizes, error)
    assert error < bound_of(MIXTURES[0])


@pytest.mark.parametrize("tokens", [1, 2, 33, 517, 8192])
@pytest.mark.parametrize("names", ROTATED, ids="+".join)
@every_architecture
def test_rotated_mixtures(architecture: Architecture, names: Sequence[str], tokens: int) -> None:
    """Blocks kept in 16 bits read plain rows, or have rotated weights beside a packed one of 16-bit activations."""
    if any(kernel_format(parse_scheme(name)).operand not in architecture.operands for name in names):
        pytest.skip(f"{architecture.gpus} do not multiply {'+'.join(names)}")
    layer, weights = make_layer(names, 16, QWEN, tokens, True, architecture, rotated=True)
    assert layer.plan.rotated
    error = error_of(layer, weights, tokens, 6)
    print(names, tokens, error)
    assert error < max(ROTATED_BOUND, bound_of(names))


@pytest.mark.parametrize("name", ["w4a16", "w8a8", "w8a8_fp8"])
def test_one_rotated_scheme(name: str) -> None:
    """Gate and up are one block, and products of its launch are quantized by a warp or, of a shared expert, a block."""
    layer, weights = make_layer([name], 8, QWEN, 1, rotated=True)
    assert layer.plan.gate_up.gated
    for tokens in (1, 64, 1000):
        error = error_of(layer, weights, tokens, 4)
        print(name, tokens, error)
        assert error < max(ROTATED_BOUND, bound_of([name]))


@pytest.mark.parametrize(
    ("experts", "top_k", "sizes"),
    [
        (3, 3, (2880, 704, 3)),
        (8, 2, (4096, 14336, 0)),
        (3, 1, (8192, 2880, 1)),
        (100, 8, (256, 128, 2)),
        (8, 2, (256, 352, 1)),
    ],
)
def test_other_rotated_shapes(experts: int, top_k: int, sizes: tuple[int, int, int]) -> None:
    """2880 features are 45 transforms of 64; 704 are 11, and three slices of them 33; 352 are 11 of 32, filled up."""
    layer, weights = make_layer(WITHOUT_GROUPS, experts, sizes, 3, rotated=True)
    error = error_of(layer, weights, 300, top_k)
    print(sizes, error)
    assert error < ROTATED_BOUND


def by_expert(names: Sequence[str]) -> dict[int, tuple[Scheme, Scheme, Scheme]]:
    """One scheme for all blocks of an expert, of eight and a shared one."""
    return {e: (parse_scheme(names[place % len(names)]),) * 3 for place, e in enumerate([*range(8), SHARED])}


@pytest.mark.parametrize("names", BY_EXPERT, ids="+".join)
@every_architecture
def test_products_in_the_gate_up_launch_are_those_of_swiglu(
    architecture: Architecture, names: Sequence[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit for bit: gate and up are rounded to bfloat16 in both."""
    torch.manual_seed(3)
    hidden, inner, slices = QWEN
    schemes = by_expert(names)
    weights = random_weights(schemes, QWEN)
    plans = [plan_layer(schemes, hidden, inner, inner * slices)]
    monkeypatch.setattr(plan, "_gated", lambda schemes: False)
    plans.append(plan_layer(schemes, hidden, inner, inner * slices))
    assert [one.gate_up.gated for one in plans] == [True, False]
    device = torch.device("cuda", 0)
    one, other = (MoeLayer(each, in_memory(weights), device, None, architecture) for each in plans)
    for tokens in (1, 3, 40, 700):  # latency, decode and prefill kernels
        x = torch.randn(tokens, hidden, device="cuda").bfloat16()
        expert_ids, mixing = route(tokens, 8, 4)
        assert torch.equal(one(x, expert_ids, mixing), other(x, expert_ids, mixing)), tokens


@pytest.mark.parametrize("rotated", [False, True])
def test_the_first_call_of_a_layer_can_be_captured_and_follows_its_inputs(rotated: bool) -> None:
    layer, _ = make_layer(MIXTURES[0], 16, QWEN, 5, gated=True, rotated=rotated)
    x = torch.randn(40, 2048, device="cuda").bfloat16()
    expert_ids, mixing = route(40, 16, 4)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = layer(x, expert_ids, mixing)
    for _ in range(3):
        x.copy_(torch.randn(40, 2048, device="cuda"))
        for target, new in zip((expert_ids, mixing), route(40, 16, 4), strict=True):
            target.copy_(new)
        graph.replay()
        assert torch.equal(out, layer(x, expert_ids, mixing))


@pytest.mark.parametrize("rotated", [False, True])
def test_launches_that_overlap_give_what_launches_apart_give(rotated: bool) -> None:
    given = ((MIXTURES[0], 5), (["w4a16"], 6))
    layers = [make_layer(names, 16, QWEN, seed, rotated=rotated)[0] for names, seed in given]
    calls = []
    for number in range(24):  # latency, decode and prefill kernels in turn
        tokens = (1, 3, 40, 700)[number % 4]
        calls.append(
            (layers[number % 3 % 2], torch.randn(tokens, 2048, device="cuda").bfloat16(), *route(tokens, 16, 4))
        )
    apart = []
    for layer, *given in calls:
        apart.append(layer(*given))
        torch.cuda.synchronize()
    for _ in range(5):
        together = [layer(*given) for layer, *given in calls]
        assert all(torch.equal(one, two) for one, two in zip(apart, together, strict=True))


def test_calls_on_several_streams_do_not_disturb_each_other() -> None:
    layer, _ = make_layer(MIXTURES[0], 16, QWEN, 5, gated=True)
    calls = [(torch.randn(tokens, 2048, device="cuda").bfloat16(), *route(tokens, 16, 4)) for tokens in (1, 40, 700)]
    alone = [layer(*call) for call in calls]
    streams = [torch.cuda.Stream() for _ in calls]
    torch.cuda.synchronize()
    for _ in range(10):
        together = []
        for stream, call in zip(streams, calls, strict=True):
            with torch.cuda.stream(stream):
                together.append(layer(*call))
        torch.cuda.synchronize()
        assert all(torch.equal(one, two) for one, two in zip(alone, together, strict=True))


def test_long_inputs_run_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, _ = make_layer(["w16a16"], 8, QWEN, 7, gated=True)
    x = torch.randn(1000, 2048, device="cuda").bfloat16()
    expert_ids, mixing = route(1000, 8, 4)
    whole = layer(x, expert_ids, mixing)
    monkeypatch.setattr(moe_layer, "MOST_TOKENS", 300)
    assert torch.equal(layer(x, expert_ids, mixing), whole)
    assert layer(x[:0], expert_ids[:0], mixing[:0]).shape == (0, 2048)


@pytest.mark.parametrize("slices", [0, 4])
def test_experts_of_other_gpus_add_nothing(slices: int) -> None:
    sizes = (2048, 1408, slices)
    torch.manual_seed(3)
    schemes = schemes_of(MIXTURES[0], 7, slices, 3)
    weights = random_weights(schemes, sizes)
    plan = plan_layer(schemes, 2048, 1408, 1408 * slices, elsewhere=True)
    layer = MoeLayer(plan, in_memory(weights), torch.device("cuda", 0))
    for tokens in (1, 16, 700):
        x = torch.randn(tokens, 2048, device="cuda").bfloat16()
        expert_ids = torch.rand(tokens, 8, device="cuda").topk(4).indices  # 7 is any expert elsewhere
        mixing = torch.rand(tokens, 4, device="cuda")
        torch.full((tokens * 8, 2048), float("nan"), device="cuda")  # what new tensors may lie on
        out = layer(x, expert_ids, mixing)
        here = expert_ids < 7
        expected = reference.moe_layer(
            x, expert_ids.where(here, 0), mixing.where(here, 0), lambda e, b: weights[e, b], shared=slices > 0
        )
        assert (out - expected).norm() / expected.norm() < FP8_BOUND


def test_the_default_type_of_new_tensors_does_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    """Engines set another one while they load a model."""
    monkeypatch.setattr(launch, "_ones", launch._ones.__wrapped__)
    torch.manual_seed(1)
    weights = random_weights(schemes_of(["w4a16"], 8, QWEN[2], 1), QWEN)
    plan = layer_plan(["w4a16"], 8, QWEN, 1)
    torch.set_default_dtype(torch.bfloat16)
    try:
        layer = MoeLayer(plan, in_memory(weights), torch.device("cuda", 0))
    finally:
        torch.set_default_dtype(torch.float32)
    assert error_of(layer, weights, 16, 4) < ASYMMETRIC_BOUND


def main() -> None:
    """Build every kernel that these tests load on a Hopper GPU: run where there is a compiler and no GPU."""
    plans = [layer_plan([name], 8, QWEN, 1) for name in UNIFORM]
    plans += [layer_plan(names, 16, QWEN, seed) for names in MIXTURES for seed in (1, 2, 33, 517, 8192)]
    shapes = [(1, (256, 128, 0)), (3, (128, 256, 1)), (8, (4096, 14336, 0)), (100, (256, 128, 2))]
    plans += [layer_plan(MIXTURES[0], experts, sizes, 3) for experts, sizes in shapes]
    plans += [layer_plan(MIXTURES[0], 16, QWEN, 5)]
    plans += [layer_plan(names, 16, QWEN, seed) for names in ROTATED for seed in (1, 2, 33, 517, 8192)]
    plain = [(3, (2880, 704, 3)), (8, (4096, 14336, 0)), (3, (8192, 2880, 1)), (100, (256, 128, 2)), (8, (256, 352, 1))]
    plans += [layer_plan(WITHOUT_GROUPS, experts, sizes, 3) for experts, sizes in plain]
    plans += [plan_layer(by_expert(names), QWEN[0], QWEN[1], QWEN[1] * QWEN[2]) for names in BY_EXPERT]
    for architecture in [one for one in BUILT if one.capability == DEFAULT.capability]:
        launches = [launch for plan in plans for launch in (plan.gate_up, plan.down)]
        launches = [one for one in launches if set(one.operands) <= set(architecture.operands)]
        configs = {config for launch in launches for config in launch.kernels(architecture).values()}
        kernels = [*(configs | {replace(config, gated=False) for config in configs})]
        names = (*architecture.token_kernels, *ROTATED_KERNELS)
        for kernel in (*kernels, *(TokenKernel(name, architecture) for name in names)):
            print(build(kernel), architecture.name, kernel.name, flush=True)


if __name__ == "__main__":
    main()
