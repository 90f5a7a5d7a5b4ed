"""Sorting, dispatching, SwiGLU and the weighted sum on a GPU, against torch on the CPU."""

import pytest
import torch
from gpu_marks import RUN_HERE, needs_kernels

from mxmoe_steps.kernels import reference
from mxmoe_steps.kernels.architecture import Architecture
from mxmoe_steps.kernels.launch import Activations
from mxmoe_steps.kernels.limits import OPERAND_MASKS
from mxmoe_steps.kernels.rotation import CHUNK, ROTATED_BF16, SPAN, span
from mxmoe_steps.kernels.routing import Routed, combine, dispatch, quantize, sort_by_expert, swiglu
from mxmoe_steps.packing import unpack
from mxmoe_steps.quantizers.grid import E4M3
from mxmoe_steps.quantizers.hadamard import rotate

pytestmark = needs_kernels


def route(tokens: int, experts: int, top_k: int, shared: int, architecture: Architecture = RUN_HERE[0]) -> Routed:
    expert_ids = torch.rand(tokens, experts, device="cuda").topk(top_k, dim=1).indices
    return sort_by_expert(expert_ids, experts, shared, architecture)


def rows_of(routed: Routed) -> torch.Tensor:
    """[tokens, top_k + shared]: all rows of every token, on the CPU."""
    tokens, top_k = routed.expert_ids.shape
    shared = torch.arange(tokens)[:, None] + tokens * torch.arange(top_k, top_k + routed.slices)
    return torch.cat([routed.row.cpu().long(), shared], 1)


def experts_of(routed: Routed) -> torch.Tensor:
    """[tokens, top_k + shared]: the experts that those rows belong to."""
    tokens = len(routed.expert_ids)
    experts = routed.offsets.shape[0] - 1
    last = torch.arange(experts - routed.slices, experts).expand(tokens, -1)
    return torch.cat([routed.expert_ids.cpu(), last], 1)


@pytest.mark.parametrize("shared", [0, 3])
@pytest.mark.parametrize(
    ("tokens", "experts", "top_k"), [(1, 60, 4), (77, 8, 2), (5000, 128, 8), (300, 1, 1), (9, 1000, 6)]
)
def test_rows_are_sorted_by_expert(tokens: int, experts: int, top_k: int, shared: int) -> None:
    torch.manual_seed(tokens)
    routed = route(tokens, experts, top_k, shared)
    owner = experts_of(routed)
    counts = torch.bincount(owner.flatten(), minlength=experts + shared)
    assert torch.equal(routed.offsets.cpu(), torch.cat([torch.zeros(1), counts.cumsum(0)]).int())
    rows = rows_of(routed).flatten()
    assert torch.equal(rows.sort().values, torch.arange(routed.rows))
    by_row = torch.empty_like(rows)
    by_row[rows] = owner.flatten()
    assert (by_row.diff() >= 0).all()


def values_of(codes: torch.Tensor, operand: str) -> torch.Tensor:
    """What the bits mean: zeros may differ in sign."""
    if operand == "int4":
        return (unpack(codes, 4, 2 * codes.shape[1]).int() ^ 8).float() - 8  # two's complement
    return codes.view(E4M3 if operand == "fp8" else torch.int8).float()


def check_operands(made: dict[str, Activations], expected: torch.Tensor, mask: torch.Tensor) -> None:
    """``expected``: bfloat16 [rows, K]; ``mask``: the types each row is needed in."""
    for operand, got in made.items():
        needed = (mask & OPERAND_MASKS[operand]) != 0
        assert needed.any()
        if operand == "bf16":
            assert torch.equal(got.values.cpu()[needed], expected[needed])
            continue
        codes, scales = reference.quantize_tokens(expected[needed], operand)
        assert got.scales is not None
        assert torch.equal(got.scales.cpu()[needed], scales)
        assert torch.equal(values_of(got.values.cpu()[needed], operand), values_of(codes, operand))


def check_slices(made: dict[str, Activations], expected: torch.Tensor, tokens: int, shared: int) -> None:
    """The last ``shared * tokens`` rows of ``expected``: slices of a token's row, which has one scale."""
    if not shared:
        return
    last = slice(-shared * tokens, None)

    def joined(values: torch.Tensor) -> torch.Tensor:
        return values[last].view(shared, tokens, -1).transpose(0, 1).reshape(tokens, -1)

    for operand in made.keys() - {"bf16"}:
        codes, scales = reference.quantize_tokens(joined(expected), operand)
        assert torch.equal(values_of(joined(made[operand].values.cpu()), operand), values_of(codes, operand))
        assert made[operand].scales is not None
        assert torch.equal(made[operand].scales[last].cpu().view(shared, tokens), scales.expand(shared, -1))


def operands_of(architecture: Architecture) -> tuple[str, ...]:
    """In the order of their masks."""
    return tuple(operand for operand in OPERAND_MASKS if operand in architecture.operands)


every_architecture = pytest.mark.parametrize("architecture", RUN_HERE, ids=lambda one: one.name)
ALONE_AND_TOGETHER = [
    pytest.param(one, operands, id=f"{one.name}-{'+'.join(operands)}")
    for one in RUN_HERE
    for operands in (*((operand,) for operand in operands_of(one)), operands_of(one))
]


@pytest.mark.parametrize(("architecture", "operands"), ALONE_AND_TOGETHER)
@pytest.mark.parametrize("features", [64, 2048, 14336])
def test_dispatched_tokens_are_those_of_the_reference_exactly(
    architecture: Architecture, operands: tuple[str, ...], features: int
) -> None:
    torch.manual_seed(features)
    x = (torch.randn(200, features) * torch.logspace(-6, 6, 200)[:, None]).bfloat16()
    x[3] = 0
    routed = route(200, 16, 3, 2, architecture)
    needs = torch.randint(1, 16, (18,)) & sum(OPERAND_MASKS[operand] for operand in operands)
    made, logits = dispatch(x.cuda(), routed, needs.int().cuda(), operands)
    assert set(made) == set(operands)
    assert logits is None
    expected, mask = torch.empty(routed.rows, features, dtype=x.dtype), torch.empty(routed.rows, dtype=torch.long)
    expected[rows_of(routed)] = x[:, None]
    mask[rows_of(routed)] = needs[experts_of(routed)]
    check_operands(made, expected, mask)


@pytest.mark.parametrize("tokens", [1, 300])
@pytest.mark.parametrize("features", [64, 1408, 14336])
def test_the_gate_of_a_shared_expert_is_multiplied_on_the_way(features: int, tokens: int) -> None:
    torch.manual_seed(features)
    x, gate = torch.randn(tokens, features).bfloat16(), torch.randn(1, features).bfloat16()
    routed = route(tokens, 16, 3, 2)
    needs = torch.full((18,), OPERAND_MASKS["bf16"] | OPERAND_MASKS["fp8"], dtype=torch.int32)
    plain, _ = dispatch(x.cuda(), routed, needs.cuda(), ("bf16", "fp8"))
    made, logits = dispatch(x.cuda(), routed, needs.cuda(), ("bf16", "fp8"), gate.cuda())
    for operand, tensors in made.items():
        assert torch.equal(tensors.values, plain[operand].values)
    exact = (x.double() @ gate.double().T)[:, 0]
    assert logits is not None
    size = x.double().abs() @ gate.double().abs()[0]
    assert ((logits.cpu().double() - exact).abs() <= 2**-8 * exact.abs() + 1e-6 * size).all()


@pytest.mark.parametrize("features", [64, 1408, 14336])
@pytest.mark.parametrize("shared", [0, 2])
@every_architecture
def test_products_of_gate_and_up(architecture: Architecture, features: int, shared: int) -> None:
    torch.manual_seed(features)
    tokens = 50
    routed = route(tokens, 16, 3, shared, architecture)
    gate_up = (torch.randn(routed.rows, 2 * features) * torch.logspace(-2, 1.5, routed.rows)[:, None]).bfloat16()
    gate, up = gate_up.double().chunk(2, 1)
    exact = gate * gate.sigmoid() * up
    operands, every = operands_of(architecture), architecture.operand_mask
    needs = torch.full((16 + shared,), every, dtype=torch.int32, device="cuda")
    made = swiglu(gate_up.cuda(), routed, needs, operands)
    product = made["bf16"].values.cpu()
    assert ((product.double() - exact).abs() <= 2**-8 * exact.abs() + 1e-30).all()
    routed_rows = tokens * 3
    mask = torch.full((routed_rows,), every)
    parts = {
        name: Activations(each.values[:routed_rows], None if each.scales is None else each.scales[:routed_rows])
        for name, each in made.items()
    }
    check_operands(parts, product[:routed_rows], mask)
    check_slices(made, product, tokens, shared)


@pytest.mark.parametrize("features", [64, 1408, 1536, 1600, 14336])  # a warp's up to 1536, then a block's
@pytest.mark.parametrize("shared", [0, 2])
@every_architecture
def test_quantized_products_are_those_of_the_reference_exactly(
    architecture: Architecture, features: int, shared: int
) -> None:
    torch.manual_seed(features)
    tokens = 53
    routed = route(tokens, 16, 3, shared, architecture)
    products = (torch.randn(routed.rows, features) * torch.logspace(-4, 4, routed.rows)[:, None]).bfloat16()
    needs = torch.randint(1, 16, (16 + shared,)) & architecture.operand_mask
    needs[16:] = architecture.operand_mask & ~OPERAND_MASKS["bf16"]
    made = quantize(products.cuda(), routed, needs.int().cuda(), operands_of(architecture))
    assert torch.equal(made["bf16"].values.cpu(), products)
    mask = torch.empty(routed.rows, dtype=torch.long)
    mask[rows_of(routed)] = needs[experts_of(routed)]
    check_slices(made, products, tokens, shared)
    mask[tokens * 3 :] = 0  # slices have a scale for the whole row
    check_operands(made, products, mask)
    only = quantize(products.cuda(), routed, torch.ones_like(needs).int().cuda(), ("bf16",))
    assert set(only) == {"bf16"}


def check_rotated(made: dict[str, Activations], plain: torch.Tensor, mask: torch.Tensor) -> None:
    """``plain``: bfloat16 [rows, K]; ``mask``: what each row is needed in, rotated but for plain bfloat16."""
    turned = rotate(plain.float())
    for operand, got in made.items():
        needed = (mask & (ROTATED_BF16 if operand == "bf16" else OPERAND_MASKS[operand])) != 0
        assert needed.any()
        if operand == "bf16":
            assert torch.equal(got.values.cpu()[needed], turned[needed].bfloat16())
            as_it_is = (mask & OPERAND_MASKS["bf16"]) != 0
            assert torch.equal(got.values.cpu()[as_it_is], plain[as_it_is])
            continue
        codes, scales = reference.quantize_tokens(turned[needed], operand)
        assert got.scales is not None
        assert torch.equal(got.scales.cpu()[needed], scales)
        assert torch.equal(values_of(got.values.cpu()[needed], operand), values_of(codes, operand))
        exact = rotate(plain[needed].double())
        nearest = values_of(codes, operand).double() * scales.double()[:, None]
        if operand != "fp8":
            assert ((nearest - exact).abs() <= 0.501 * scales.double()[:, None] + 1e-30).all()


def check_rotated_slices(
    made: dict[str, Activations], plain: torch.Tensor, mask: torch.Tensor, tokens: int, shared: int
) -> None:
    """As `check_rotated`, of the last ``shared * tokens`` rows: slices of a token's row, which is rotated as one."""

    def joined(values: torch.Tensor) -> torch.Tensor:
        return values[-shared * tokens :].cpu().view(shared, tokens, -1).transpose(0, 1).reshape(tokens, -1)

    whole = {}
    for operand, got in made.items():
        scales = got.scales
        if scales is not None:
            of_slices = scales[-shared * tokens :].view(shared, tokens)
            assert torch.equal(of_slices, of_slices[:1].expand(shared, -1))
            scales = of_slices[0]
        whole[operand] = Activations(joined(got.values), scales)
    check_rotated(whole, joined(plain), mask[-tokens:])


def rotated_needs(architecture: Architecture, experts: int, features: int) -> torch.Tensor:
    """Every type somewhere, bfloat16 rotated or plain."""
    scaled = torch.randint(0, 16, (experts,)) & architecture.operand_mask & ~OPERAND_MASKS["bf16"]
    of_bf16 = torch.tensor([0, OPERAND_MASKS["bf16"], ROTATED_BF16])[torch.arange(experts) % 3]
    return (scaled | of_bf16 | SPAN * span(features)).int()


SPANS = [64, 128, 768, 1024, 1408, 1536, 2048, 2880, 4096, 8192, 14336, 24576]  # 64 to 8192 features a transform


@pytest.mark.parametrize("features", SPANS)
@pytest.mark.parametrize("gated", [False, True])
@every_architecture
def test_rotated_tokens_are_those_of_the_reference_exactly(
    architecture: Architecture, gated: bool, features: int
) -> None:
    torch.manual_seed(features)
    x = (torch.randn(200, features) * torch.logspace(-6, 6, 200)[:, None]).bfloat16()
    x[3] = 0
    routed = route(200, 16, 3, 2, architecture)
    needs = rotated_needs(architecture, 18, features)
    gate = torch.randn(1, features).bfloat16().cuda() if gated else None
    made, logits = dispatch(x.cuda(), routed, needs.cuda(), operands_of(architecture), gate, rotated=True)
    expected, mask = torch.empty(routed.rows, features, dtype=x.dtype), torch.empty(routed.rows, dtype=torch.long)
    expected[rows_of(routed)] = x[:, None]
    mask[rows_of(routed)] = needs[experts_of(routed)].long()
    check_rotated(made, expected, mask)
    if gate is None:
        assert logits is None
        return
    _, same = dispatch(x.cuda(), routed, needs.cuda() & OPERAND_MASKS["bf16"], ("bf16",), gate)
    assert torch.equal(logits, same)


@pytest.mark.parametrize("features", SPANS)
@pytest.mark.parametrize("shared", [0, 1, 2, 4])
@every_architecture
def test_rotated_products_are_those_of_the_reference_exactly(
    architecture: Architecture, features: int, shared: int
) -> None:
    """A shared expert's row is rotated over all of its slices: 5632 features of four of 1408."""
    if span(features * max(shared, 1)) > CHUNK:
        pytest.skip("a layer of that size is refused")
    torch.manual_seed(features)
    tokens = 53
    routed = route(tokens, 16, 3, shared, architecture)
    gate_up = (torch.randn(routed.rows, 2 * features) * torch.logspace(-2, 1.5, routed.rows)[:, None]).bfloat16().cuda()
    plain_needs = torch.ones(16 + shared, dtype=torch.int32, device="cuda")
    products = swiglu(gate_up, routed, plain_needs, ("bf16",))["bf16"].values
    needs = rotated_needs(architecture, 16 + shared, features)
    operands = operands_of(architecture)
    for of_slices in (architecture.operand_mask - 1 | ROTATED_BF16, OPERAND_MASKS["bf16"]):
        needs[16:] = of_slices | SPAN * span(features * max(shared, 1))
        mask = torch.empty(routed.rows, dtype=torch.long)
        mask[rows_of(routed)] = needs[experts_of(routed)].long()
        for made in (
            swiglu(gate_up, routed, needs.cuda(), operands, rotated=True),
            quantize(products, routed, needs.cuda(), operands, rotated=True),
        ):
            assert set(made) == set(operands)
            routed_rows = {
                name: Activations(each.values[: 3 * tokens], None if each.scales is None else each.scales[: 3 * tokens])
                for name, each in made.items()
            }
            check_rotated(routed_rows, products[: 3 * tokens].cpu(), mask[: 3 * tokens])
            if shared and of_slices & ROTATED_BF16:
                check_rotated_slices(made, products.cpu(), mask, tokens, shared)
            elif shared:
                assert torch.equal(made["bf16"].values[3 * tokens :], products[3 * tokens :])


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(
    ("tokens", "top_k", "shared", "gated"), [(1, 4, 4, True), (300, 6, 2, False), (129, 1, 0, False)]
)
def test_weighted_sums(kind: torch.dtype, tokens: int, top_k: int, shared: int, gated: bool) -> None:
    torch.manual_seed(tokens)
    routed = route(tokens, 16, top_k, shared)
    given = torch.randn(routed.rows, 2112).bfloat16()
    weights = torch.rand(tokens, top_k).to(kind)
    gate = torch.randn(tokens).bfloat16() if gated else None
    factors = torch.ones(tokens) if gate is None else gate.double().sigmoid()
    factors = torch.cat([weights.double(), factors.double()[:, None].expand(-1, shared)], 1)
    exact = (given.double()[rows_of(routed)] * factors[..., None]).sum(1)
    out = combine(given.cuda(), routed, weights.cuda(), None if gate is None else gate.cuda())
    size = (given.double()[rows_of(routed)] * factors[..., None]).abs().sum(1)
    assert ((out.cpu().double() - exact).abs() <= 2**-8 * exact.abs() + 1e-6 * size).all()
