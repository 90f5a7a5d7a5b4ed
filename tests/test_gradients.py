"""Gradients by deterministic operations where there are any, and by others where there are none."""

import logging
from typing import Any

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from mxmoe_steps.models.gradients import gradients


class OnGpu(torch.Tensor):
    """A tensor on the CPU that says otherwise."""

    device = torch.device("cuda", 0)


class Squared(torch.autograd.Function):
    """Has a deterministic form only where told, and remembers whether it was asked for."""

    asked: list[bool] = []  # noqa: RUF012
    deterministic = True

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx: Any, *above: torch.Tensor) -> torch.Tensor:
        strict = torch.are_deterministic_algorithms_enabled()
        strict &= not torch.is_deterministic_algorithms_warn_only_enabled()
        Squared.asked.append(strict)
        if strict and not Squared.deterministic:
            raise RuntimeError("squared does not have a deterministic implementation, but you set")
        return 2 * ctx.saved_tensors[0] * above[0]


@pytest.fixture(autouse=True)
def as_steps_set_it(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(Squared, "asked", [])
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def run(x: torch.Tensor) -> torch.Tensor:
    output = Squared.apply(x * 3)
    (found,) = gradients(output.as_subclass(OnGpu), [x], torch.ones(3))
    return found


@pytest.mark.parametrize("deterministic", [True, False])
def test_deterministic_forms_are_asked_for_first(
    deterministic: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(Squared, "deterministic", deterministic)
    x = torch.tensor([1.0, -2.0, 0.5], requires_grad=True)
    with caplog.at_level(logging.WARNING, "mxmoe_steps"):
        assert torch.equal(run(x), 18 * x.detach())
    assert Squared.asked == ([True] if deterministic else [True, False])
    assert ("squared does not have" in caplog.text) != deterministic
    assert torch.is_deterministic_algorithms_warn_only_enabled()


def test_other_errors_are_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.ones(3, requires_grad=True)
    output = Squared.apply(x).as_subclass(OnGpu)
    with pytest.raises(RuntimeError, match="Mismatch in shape"):
        gradients(output, [x], torch.ones(4))
    assert torch.is_deterministic_algorithms_warn_only_enabled()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("masked", [False, True])
def test_gradients_of_attention_have_the_same_bytes(dtype: torch.dtype, masked: bool) -> None:
    torch.backends.cuda.enable_cudnn_sdp(False)
    torch.manual_seed(0)
    q, k, v, above = (torch.randn(4, 8, 1024, 64, device="cuda", dtype=dtype) for _ in range(4))
    mask = torch.rand(4, 1, 1024, 1024, device="cuda") < 0.9 if masked else None
    inputs = [one.requires_grad_() for one in (q, k, v)]
    first: tuple[torch.Tensor, ...] = ()
    for _ in range(8):
        output = scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=not masked)
        found = gradients(output, inputs, above)
        first = first or found
        assert all(torch.equal(one, other) for one, other in zip(found, first, strict=True))
