"""What a layer's grouped GEMMs are made of: problems, stacks in kernel order, the slices of a shared expert."""

import random
from dataclasses import replace

import pytest
import torch

from mxmoe_steps.errors import UserError
from mxmoe_steps.gating import CLAMPED, Gating, of_variant
from mxmoe_steps.kernels.launch import problem_table
from mxmoe_steps.kernels.layouts import quantized_weight
from mxmoe_steps.kernels.limits import OPERAND_MASKS
from mxmoe_steps.kernels.plan import LayerPlan, Source, plan_layer
from mxmoe_steps.kernels.rotation import CHUNK, ROTATED_BF16, SPAN
from mxmoe_steps.kernels.sm90.architecture import HOPPER
from mxmoe_steps.kernels.stacks import in_memory, stack
from mxmoe_steps.quantizers.grid import QuantizedWeight, round_to_nearest
from mxmoe_steps.quantizers.hadamard import rotate
from mxmoe_steps.schemes import BLOCKS, SHARED, parse_scheme

SCHEMES = ("w16a16", "w8a8_fp8", "w8a8", "w8a16", "w4a16", "w4a8_fp8", "w4a8", "w2a16_g-1_sym", "w1a16",
           "w6a16", "w4a16_mxfp4", "w4a16_g-1_asym")  # fmt: skip
HIDDEN, INNER, SLICES, EXPERTS = 256, 128, 2, 5
CPU = torch.device("cpu")
Weights = dict[tuple[int, str], QuantizedWeight | torch.Tensor]


def random_layer(seed: int, shared: bool = True) -> tuple[LayerPlan, Weights]:
    """A plan and the weights of a random mixed allocation."""
    rng = random.Random(seed)
    torch.manual_seed(seed)
    numbers = [*range(EXPERTS), *([SHARED] if shared else [])]
    schemes = {expert: tuple(parse_scheme(rng.choice(SCHEMES)) for _ in BLOCKS) for expert in numbers}
    weights: Weights = {}
    for expert, three in schemes.items():
        width = INNER * SLICES if expert == SHARED else INNER
        for block, scheme in zip(BLOCKS, three, strict=True):
            dense = torch.randn(*((HIDDEN, width) if block == "down" else (width, HIDDEN))) * 0.1
            weights[expert, block] = dense.bfloat16() if scheme.is_original else round_to_nearest(dense, scheme)
    return plan_layer(schemes, HIDDEN, INNER, INNER * SLICES), weights


def dense(weight: QuantizedWeight | torch.Tensor) -> torch.Tensor:
    return weight.double() if isinstance(weight, torch.Tensor) else weight.dequantize().double()


@pytest.mark.parametrize("seed", range(6))
def test_every_output_column_is_written_by_the_right_block(seed: int) -> None:
    plan, weights = random_layer(seed, shared=seed % 3 > 0)
    for launch, columns in ((plan.gate_up, 2 * INNER), (plan.down, HIDDEN)):
        stacks = [stack(in_memory(weights), sources, 3, CPU) for sources in launch.stacks]
        assert tuple(stack.format for stack in stacks) == launch.formats == launch.kernels(HOPPER)["decode"].formats
        problem_table(launch.problems, stacks, EXPERTS + plan.slices, columns, "cpu")  # accepts it
        assert len(set(launch.problems)) == (EXPERTS + plan.slices) * columns // stacks[0].out_features
        needs = [0] * (EXPERTS + plan.slices)
        for expert, number, entry, column in launch.problems:
            needs[expert] |= OPERAND_MASKS[launch.formats[number].operand]
            owner, piece = (expert, 0) if expert < EXPERTS else (SHARED, expert - EXPERTS)
            block = "down" if launch is plan.down else "gate" if column == 0 else "up"
            whole = dense(weights[owner, block])
            expected = whole.chunk(SLICES if owner == SHARED else 1, dim=int(block == "down"))[piece]
            made = stacks[number]
            if made.format.original:
                assert torch.equal(made.data[entry].double(), expected)
                continue
            original = weights[owner, block]
            assert isinstance(original, QuantizedWeight)
            mine = quantized_weight(made, original.scheme)  # the stack may hold other schemes of this format
            got = QuantizedWeight(mine.scheme, mine.codes[entry], mine.scales[entry],
                                  None if mine.zeros is None else mine.zeros[entry])  # fmt: skip
            assert torch.equal(dense(got), expected)
        assert launch.needs == tuple(needs)


@pytest.mark.parametrize("name", SCHEMES)
def test_gate_and_up_of_one_scheme_take_turns_of_eight_rows(name: str) -> None:
    torch.manual_seed(2)
    scheme, down = parse_scheme(name), parse_scheme("w16a16")
    weights: Weights = {}
    for expert in (0, 1, SHARED):
        for block in ("gate", "up"):
            matrix = torch.randn(INNER * (SLICES if expert == SHARED else 1), HIDDEN) * 0.1
            weights[expert, block] = matrix.bfloat16() if scheme.is_original else round_to_nearest(matrix, scheme)
    plan = plan_layer(dict.fromkeys((0, 1, SHARED), (scheme, scheme, down)), HIDDEN, INNER, INNER * SLICES)
    launch = plan.gate_up
    assert launch.gated
    assert launch.kernels(HOPPER)["prefill"].gated
    assert not plan.down.gated
    assert launch.strips == 2 * INNER // 64
    assert sorted(launch.problems) == [(expert, 0, (expert + 2) % 4, 0) for expert in range(4)]  # the shared one first
    (sources,) = launch.stacks
    made = stack(in_memory(weights), sources, 3, CPU)
    problem_table(launch.problems, [made], 4, INNER, "cpu", gated=True)  # accepts it
    rows = made.data if scheme.is_original else dense(quantized_weight(made, scheme))
    for expert in range(4):
        owner, start = (expert, 0) if expert < 2 else (SHARED, INNER * (expert - 2))
        gate, up = (dense(weights[owner, block])[start : start + INNER] for block in ("gate", "up"))
        mine = rows[(expert + 2) % 4].double()
        for feature in (0, 7, 8, 77, INNER - 1):
            row = feature // 8 * 16 + feature % 8
            assert torch.equal(mine[row], gate[feature])
            assert torch.equal(mine[row + 8], up[feature])


def test_one_expert_whose_gate_and_up_differ_keeps_them_apart() -> None:
    w4, fp8 = parse_scheme("w4a16"), parse_scheme("w8a8_fp8")
    plan = plan_layer({0: (w4, w4, w4), 1: (w4, fp8, w4)}, HIDDEN, INNER)
    assert not plan.gate_up.gated
    assert {problem[3] for problem in plan.gate_up.problems} == {0, INNER}


def test_the_shared_expert_and_the_formats_are_spread_over_the_launch() -> None:
    w4, fp8 = parse_scheme("w4a16"), parse_scheme("w8a8_fp8")
    schemes = {expert: (w4,) * 3 if expert < 2 else (fp8,) * 3 for expert in range(4)}
    schemes[0] = (w4, parse_scheme("w4a16_g-1_asym"), w4)  # the same format: gate and up stay apart
    plan = plan_layer(schemes | {SHARED: (fp8, fp8, w4)}, HIDDEN, INNER, 2 * INNER)
    experts = [problem[0] for problem in plan.gate_up.problems]
    assert [(place, expert) for place, expert in enumerate(experts) if expert >= 4] == [(0, 4), (3, 5), (6, 4), (9, 5)]
    formats = [problem[1] for problem in plan.gate_up.problems if problem[0] < 4]
    assert formats == [0, 1] * 4
    assert [problem[1] for problem in plan.down.problems] == [0, 0, 1, 0, 0, 1]


def test_more_problems_take_a_larger_table() -> None:
    schemes = parse_scheme("w4a16"), parse_scheme("w3a16"), parse_scheme("w4a16")
    plan = plan_layer(dict.fromkeys(range(100), schemes), 256, 128)
    assert plan.gate_up.kernels(HOPPER)["decode"].max_problems == 224
    assert plan.down.kernels(HOPPER)["decode"].max_problems == 128


def test_an_expert_reads_rotated_rows_or_plain_ones() -> None:
    w16, w4, w8 = (parse_scheme(name) for name in ("w16a16", "w4a16", "w8a8"))
    schemes = {0: (w4, w4, w8), 1: (w16, w16, w16), 2: (w16, w8, w4), 3: (w16, w4, w16), SHARED: (w8, w8, w4)}
    plan = plan_layer(schemes, HIDDEN, INNER, 2 * INNER, rotated=True)
    bf16, int8 = OPERAND_MASKS["bf16"], OPERAND_MASKS["int8"]
    assert plan.rotated
    assert [need % SPAN for need in plan.gate_up.needs] == [ROTATED_BF16, bf16, bf16 | int8, ROTATED_BF16, int8, int8]
    assert [need % SPAN for need in plan.down.needs] == [int8, bf16, ROTATED_BF16, bf16, ROTATED_BF16, ROTATED_BF16]
    assert [need // SPAN for need in plan.gate_up.needs] == [HIDDEN, 0, HIDDEN, HIDDEN, HIDDEN, HIDDEN]
    assert [need // SPAN for need in plan.down.needs] == [INNER, 0, INNER, 0, 2 * INNER, 2 * INNER]
    rotate_too = [source for launch in (plan.gate_up, plan.down) for stack in launch.stacks for source in stack]
    assert [source for source in rotate_too if source.rotate] == [Source(3, "gate", w16, 1, rotate=True)]
    plain = plan_layer(schemes, HIDDEN, INNER, 2 * INNER)
    assert not plain.rotated
    assert replace(plan.down, needs=plain.down.needs, rotated=False) == plain.down
    only = plan_layer({0: (w16, w16, w8)}, HIDDEN, INNER, rotated=True)
    assert (only.gate_up.rotated, only.down.rotated, only.rotated) == (False, True, True)
    assert not plan_layer({0: (w16,) * 3}, HIDDEN, INNER, rotated=True).rotated


def test_rows_that_are_filled_up_with_zeros_are_rotated_as_if_they_were_not() -> None:
    w8 = parse_scheme("w8a8")
    plan = plan_layer({0: (w8,) * 3, SHARED: (w8,) * 3}, HIDDEN, 352, 352, rotated=True)
    assert plan.padding == 32
    assert [need // SPAN for need in plan.down.needs] == [32, 32]
    with pytest.raises(UserError, match="slices of the routed experts' width, 352: kernels need a multiple of 64"):
        plan_layer({0: (w8,) * 3, SHARED: (w8,) * 3}, HIDDEN, 352, 704, rotated=True)


def test_weights_kept_in_16_bits_beside_rotated_ones_are_rotated() -> None:
    torch.manual_seed(0)
    weight = torch.randn(INNER, HIDDEN).bfloat16()
    source = Source(0, "gate", parse_scheme("w16a16"), 1, rotate=True)
    turned = stack(in_memory({(0, "gate"): weight}), [source], 1, CPU).data
    assert torch.equal(turned, rotate(weight.float()).bfloat16()[None])
    x = torch.randn(7, HIDDEN)
    exact = x.double() @ weight.double().T
    assert (rotate(x).double() @ turned[0].double().T - exact).norm() < 2e-3 * exact.norm()


def test_rotations_that_are_too_long_or_too_short_are_refused() -> None:
    schemes = {0: (parse_scheme("w8a8"),) * 3}
    assert plan_layer(schemes, 3 * CHUNK, CHUNK, rotated=True).rotated
    for width, together in ((2 * CHUNK, 2 * CHUNK), (100, 4)):
        said = f"rotated inputs of {width} features: the kernels rotate 8 to 8192 together, not {together}"
        with pytest.raises(UserError, match=said):
            plan_layer(schemes, 256, width, rotated=True)


@pytest.mark.parametrize(
    ("scheme", "sizes", "said"),  # sizes: hidden, routed width, shared width
    [
        ("w4a4_g64", (256, 128, 256), "w4a4_g64_sym: no GPU kernel"),
        ("w4a16_g64", (256, 128, 256), "w4a16_g64_asym: no GPU kernel"),
        ("w4a16", (256, 192, 384), "slices of the routed experts' width, 192, and need a multiple of 128"),
        ("w16a16", (256, 96, 192), "slices of the routed experts' width, 96, and need a multiple of 64"),
        ("w16a16", (96, 128, 128), "hidden states of 96 features: kernels need a multiple of 64"),
        ("w16a16", (256, 192, 256), "shared expert of width 256: no multiple"),
    ],
)
def test_layers_without_a_kernel_say_why(scheme: str, sizes: tuple[int, int, int], said: str) -> None:
    with pytest.raises(UserError, match=said):
        plan_layer({0: (parse_scheme(scheme),) * 3, SHARED: (parse_scheme("w16a16"),) * 3}, *sizes)


@pytest.mark.parametrize("width", [32, 192, 352, 720])
@pytest.mark.parametrize("name", SCHEMES)
def test_odd_widths_are_filled_up_with_features_of_zeros(name: str, width: int) -> None:
    """Rows of gate and up are zero, columns of down meet these; 192 hidden features are a group and a half."""
    torch.manual_seed(width)
    hidden, scheme = 192, parse_scheme(name)
    whole = {
        (expert, block): torch.randn(*((hidden, width) if block == "down" else (width, hidden))) * 0.1
        for expert in (0, SHARED)
        for block in BLOCKS
    }
    weights: Weights = {
        place: matrix.bfloat16() if scheme.is_original else round_to_nearest(matrix, scheme)
        for place, matrix in whole.items()
    }
    up = parse_scheme("w8a16") if name != "w8a16" else parse_scheme("w4a16")  # gate and up are blocks of their own
    for expert in (0, SHARED):
        weights[expert, "up"] = round_to_nearest(whole[expert, "up"], up)
    plan = plan_layer(dict.fromkeys((0, SHARED), (scheme, up, scheme)), hidden, width, width)
    filled = width + -width % 64
    assert (plan.intermediate, plan.padding, plan.slices) == (filled, filled - width, 1)
    for launch in (plan.gate_up, plan.down):
        for sources in launch.stacks:
            for source in sources:
                made = stack(in_memory(weights), [source], 1, CPU)
                block = weights[source.expert, source.block]
                assert (made.out_features, made.in_features) == (
                    (hidden, filled) if source.block == "down" else (filled, hidden)
                )
                if isinstance(block, torch.Tensor):
                    got = made.data[0].double()
                else:
                    got = dense(quantized_weight(made, block.scheme))[0]
                rows, features = block.shape if isinstance(block, torch.Tensor) else block.codes.shape
                assert torch.equal(got[:rows, :features], dense(block))
                assert (got[rows:] == 0).all()
                assert got.isfinite().all()


def test_other_gatings_have_launches_of_their_own() -> None:
    w4 = parse_scheme("w4a16")
    schemes = dict.fromkeys((0, 1), (w4, w4, w4))
    assert plan_layer(schemes, HIDDEN, INNER).gate_up.gated
    gelu = plan_layer(schemes, HIDDEN, INNER, gating=Gating("gelu"))
    assert not gelu.gate_up.gated
    assert sorted(problem[3] for problem in gelu.gate_up.problems) == [0, 0, INNER, INNER]
    ungated = plan_layer(schemes, HIDDEN, INNER, gating=Gating("relu2", gated=False))
    assert [source.block for source in ungated.gate_up.stacks[0]] == ["up", "up"]
    assert [problem[3] for problem in ungated.gate_up.problems] == [0, 0]
    with pytest.raises(UserError, match="no biases of a shared expert"):
        plan_layer(schemes | {SHARED: (w4, w4, w4)}, HIDDEN, INNER, INNER, gating=Gating(biased=True))


@pytest.mark.parametrize("gating", [Gating(), Gating(CLAMPED, biased=True), Gating("relu2", gated=False)])
def test_a_gating_is_told_by_the_name_of_its_kernel(gating: Gating) -> None:
    assert of_variant(gating.variant) == gating
    assert gating.plain == (gating.token_kernels == ())
