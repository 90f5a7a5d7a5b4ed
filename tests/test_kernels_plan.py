"""What a layer's grouped GEMMs are made of: problems, stacks in kernel order, the slices of a shared expert."""

import random

import pytest
import torch

from mxmoe_steps.errors import UserError
from mxmoe_steps.kernels.formats import OPERAND_MASKS
from mxmoe_steps.kernels.launch import problem_table
from mxmoe_steps.kernels.layouts import quantized_weight
from mxmoe_steps.kernels.moe_layer import _entries, _stack
from mxmoe_steps.kernels.plan import LayerPlan, plan_layer
from mxmoe_steps.quantizers.grid import QuantizedWeight, round_to_nearest
from mxmoe_steps.schemes import BLOCKS, SHARED, parse_scheme

SCHEMES = ("w16a16", "w8a8_fp8", "w8a8", "w8a16", "w4a16", "w4a8_fp8", "w4a8", "w2a16_g-1_sym", "w1a16")
HIDDEN, INNER, SLICES, EXPERTS = 256, 128, 2, 5
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
        stacks = [
            _stack([_entries(weights[source.expert, source.block], source) for source in sources], torch.device("cpu"))
            for sources in launch.stacks
        ]
        assert tuple(stack.format for stack in stacks) == launch.formats == launch.config("decode").formats
        problem_table(launch.problems, stacks, EXPERTS + plan.slices, columns, "cpu")  # accepts it
        assert len(set(launch.problems)) == (EXPERTS + plan.slices) * columns // stacks[0].out_features
        needs = [0] * (EXPERTS + plan.slices)
        for expert, number, entry, column in launch.problems:
            needs[expert] |= OPERAND_MASKS[launch.formats[number].operand]
            owner, piece = (expert, 0) if expert < EXPERTS else (SHARED, expert - EXPERTS)
            block = "down" if launch is plan.down else "gate" if column == 0 else "up"
            whole = dense(weights[owner, block])
            expected = whole.chunk(SLICES if owner == SHARED else 1, dim=int(block == "down"))[piece]
            stack = stacks[number]
            if stack.format.bits == 16:
                assert torch.equal(stack.data[entry].double(), expected)
                continue
            original = weights[owner, block]
            assert isinstance(original, QuantizedWeight)
            mine = quantized_weight(stack, original.scheme)  # the stack may hold other schemes of this format
            got = QuantizedWeight(mine.scheme, mine.codes[entry], mine.scales[entry],
                                  None if mine.zeros is None else mine.zeros[entry])  # fmt: skip
            assert torch.equal(dense(got), expected)
        assert launch.needs == tuple(needs)


def test_the_shared_expert_and_the_formats_are_spread_over_the_launch() -> None:
    w4, fp8 = parse_scheme("w4a16"), parse_scheme("w8a8_fp8")
    schemes = {expert: (w4,) * 3 if expert < 2 else (fp8,) * 3 for expert in range(4)}
    plan = plan_layer(schemes | {SHARED: (fp8, fp8, w4)}, HIDDEN, INNER, 2 * INNER)
    experts = [problem[0] for problem in plan.gate_up.problems]
    assert [(place, expert) for place, expert in enumerate(experts) if expert >= 4] == [(0, 4), (3, 5), (6, 4), (9, 5)]
    formats = [problem[1] for problem in plan.gate_up.problems if problem[0] < 4]
    assert formats == [0, 1] * 4
    assert [problem[1] for problem in plan.down.problems] == [0, 0, 1, 0, 0, 1]


def test_more_problems_take_a_larger_table() -> None:
    plan = plan_layer({expert: (parse_scheme("w4a16"),) * 3 for expert in range(100)}, 256, 128)
    assert plan.gate_up.config("decode").max_problems == 224
    assert plan.down.config("decode").max_problems == 128


@pytest.mark.parametrize(
    ("scheme", "sizes", "said"),  # sizes: hidden, routed width, shared width
    [
        ("w4a4", (256, 128, 256), "w4a4_g-1_sym: no GPU kernel"),
        ("w4a16_g64", (256, 128, 256), "w4a16_g64_asym: no GPU kernel"),
        ("w4a16", (256, 192, 192), "multiples of 64 and input features in multiples of 128"),
        ("w16a16", (256, 96, 96), "multiples of 64"),
        ("w16a16", (256, 192, 256), "shared expert of width 256: no multiple"),
    ],
)
def test_layers_without_a_kernel_say_why(scheme: str, sizes: tuple[int, int, int], said: str) -> None:
    with pytest.raises(UserError, match=said):
        plan_layer({0: (parse_scheme(scheme),) * 3, SHARED: (parse_scheme("w16a16"),) * 3}, *sizes)
