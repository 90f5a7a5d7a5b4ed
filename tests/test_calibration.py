"""Calibration of one layer beside plain definitions: tokens by expert, the closed form of a loss, stacks of experts."""

import pytest
import torch
from torch.nn.functional import silu

from mxmoe_steps.calibration import inputs as inputs_module
from mxmoe_steps.calibration import weights as weights_module
from mxmoe_steps.calibration.inputs import LayerInputs
from mxmoe_steps.calibration.loss import losses_of
from mxmoe_steps.calibration.losses import layer_losses
from mxmoe_steps.calibration.weights import add_moments, quantize_layer
from mxmoe_steps.models.gating import Gating
from mxmoe_steps.quantizers.method import Method, method_names
from mxmoe_steps.schemes import SHARED, parse_scheme

GATING = Gating(silu)
EXPERTS, TOKENS, TOP_K, HIDDEN, WIDTH = 5, 300, 2, 64, 96


@pytest.fixture
def captured() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(TOKENS, EXPERTS, generator=generator) + torch.tensor([2.0, 1.0, 0.0, -1.0, -99.0])
    weights, ids = logits.softmax(-1).topk(TOP_K)  # the last expert sees no token
    return {
        "hidden": torch.randn(TOKENS, HIDDEN, generator=generator).bfloat16(),
        "ids": ids.to(torch.int16),
        "weights": weights,
        "shared": torch.rand(TOKENS, generator=generator),
        "gradient": torch.randn(TOKENS, HIDDEN, generator=generator).bfloat16(),
    }


@pytest.fixture
def weights() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    sizes = [(EXPERTS, WIDTH, HIDDEN)] * 2 + [(EXPERTS, HIDDEN, WIDTH)]
    return [(torch.randn(size, generator=generator) / 8).bfloat16() for size in sizes]


@pytest.mark.parametrize("sizes", [None, [100, 3, 197]])
@pytest.mark.parametrize("batch", [7, 1 << 15])
def test_batches_hold_every_token_of_an_expert(
    captured: dict[str, torch.Tensor], batch: int, sizes: list[int] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inputs_module, "_BATCH", batch)
    inputs = LayerInputs(captured, EXPERTS, sizes)
    borders = torch.tensor([0, *inputs.sizes]).cumsum(0)
    for expert in [*range(EXPERTS), SHARED]:
        token, slot = (captured["ids"] == expert).nonzero(as_tuple=True)
        scale = captured["weights"][token, slot]
        if expert == SHARED:
            token, scale = torch.arange(TOKENS), captured["shared"]
        batches = list(inputs.batches(expert))
        assert inputs.tokens(expert) == len(token)
        assert torch.equal(torch.cat([part.x for part in batches]), captured["hidden"][token].float())
        assert torch.equal(torch.cat([part.scale for part in batches]), scale)
        assert torch.equal(torch.cat([part.gradient for part in batches]), captured["gradient"][token].float())
        domains = torch.cat([torch.full((len(part.x),), part.domain) for part in batches])
        assert torch.equal(domains, torch.searchsorted(borders, token, right=True) - 1)


def test_losses_of_a_domain_are_those_of_its_tokens_alone(
    captured: dict[str, torch.Tensor], weights: list[torch.Tensor]
) -> None:
    """And they add up to those of the whole text, sums as they are and means by tokens."""
    sizes, scheme, method = [100, 3, 197], parse_scheme("w2a16_g32"), Method("rtn")
    inputs, experts = LayerInputs(captured, EXPERTS, sizes), list(range(EXPERTS))
    stacks = quantize_layer(inputs, experts, weights, GATING, scheme, method)
    found = layer_losses(inputs, experts, weights, stacks, GATING, scheme, method, losses_of([]))
    assert torch.equal(found[:, :, 0], found[:, :, 1:].sum(2))
    for number, rows in enumerate(torch.arange(TOKENS).split(sizes)):
        alone = LayerInputs({name: tensor[rows] for name, tensor in captured.items()}, EXPERTS)
        expected = layer_losses(alone, experts, weights, stacks, GATING, scheme, method, losses_of([]))[:, :, 0]
        share = torch.tensor([1.0, len(rows) / TOKENS], dtype=torch.float64)  # of out_sq, a sum, and fisher, a mean
        assert torch.allclose(found[:, :, 1 + number], expected * share, rtol=1e-5)


def test_down_losses_equal_the_closed_form(captured: dict[str, torch.Tensor], weights: list[torch.Tensor]) -> None:
    """Weight-only: sum ||w dW h||^2 = tr(dW G dW^T) with G the second moment of what enters down."""
    inputs, scheme, method = LayerInputs(captured, EXPERTS), parse_scheme("w2a16_g32"), Method("gptq")
    experts = list(range(EXPERTS))
    stacks = quantize_layer(inputs, experts, weights, GATING, scheme, method)
    losses = layer_losses(inputs, experts, weights, stacks, GATING, scheme, method, losses_of([]))
    for expert in experts:
        entering = torch.zeros(HIDDEN, HIDDEN, dtype=torch.float64)
        inner = torch.zeros(WIDTH, WIDTH, dtype=torch.float64)
        add_moments(entering, inner, inputs.batches(expert), *(w[expert].float() for w in weights[:2]), GATING)
        change = (stacks[2][expert].dequantize() - weights[2][expert].float()).double()
        assert float(losses[expert, 2, 0, 0]) == pytest.approx(float(((change @ inner) * change).sum()), rel=1e-5)


@pytest.mark.parametrize("name", method_names())
def test_stacks_of_any_size_give_the_same_weights(
    captured: dict[str, torch.Tensor], weights: list[torch.Tensor], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs, experts, scheme = LayerInputs(captured, EXPERTS), list(range(EXPERTS)), parse_scheme("w3a16_g32")
    whole = quantize_layer(inputs, experts, weights, GATING, scheme, Method(name))
    monkeypatch.setattr(weights_module, "_WORKSPACE_BYTES", 1)  # one expert at a time
    parts = quantize_layer(inputs, experts, weights, GATING, scheme, Method(name))
    for one, other, block in zip(whole, parts, weights, strict=True):
        assert one.codes.shape == block.shape
        assert (one.codes != other.codes).float().mean() < 0.01  # a tie may fall the other way
        error = (one.dequantize() - other.dequantize()).norm() / one.dequantize().norm()
        assert error < 0.05
