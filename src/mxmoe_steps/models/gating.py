"""What an expert makes of the products of its gate and up blocks before its down block."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from mxmoe_steps import gating
from mxmoe_steps.models.adapters import Family

Function = Callable[[torch.Tensor], torch.Tensor]

_ACTIVATIONS: dict[str, Function] = {  # the names are those of `families.ACTIVATIONS`
    "silu": torch.nn.functional.silu,
    "swish": torch.nn.functional.silu,
    "gelu": torch.nn.functional.gelu,
    "gelu_pytorch_tanh": lambda x: torch.nn.functional.gelu(x, approximate="tanh"),
    "relu": torch.nn.functional.relu,
    "relu2": lambda x: torch.nn.functional.relu(x).square(),
}


@dataclass(frozen=True)
class Gating:
    """``activation(gate) * up``, of the products gate and up, each [..., I].

    With a ``limit`` it is gpt_oss's ``activation(min(gate, limit)) * (clamp(up, -limit, limit) + 1)``. ``biases`` of
    gate and up, [I], or [E, I] for a stack of experts, are added to the products first; None where there are none, or
    where whoever multiplies adds them. An expert that is not ``gated`` has no gate, [..., 0], and makes
    ``activation(up)``.
    """

    activation: Function
    limit: float | None = None
    gated: bool = True
    biases: tuple[torch.Tensor, torch.Tensor] | None = None

    def __getitem__(self, index: int) -> "Gating":
        """That of one expert of a stack."""
        if self.biases is None:
            return self
        gate, up = self.biases
        return replace(self, biases=(gate[index], up[index]))

    def __call__(self, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        """What enters down."""
        return self.of_gate(gate) * self.of_up(up)

    def of_gate(self, product: torch.Tensor) -> torch.Tensor:
        """Gate's factor, [..., I], or 1 without a gate, [..., 1]."""
        if not self.gated:
            return product.new_ones(*product.shape[:-1], 1)
        biased = product if self.biases is None else product + self.biases[0]
        return self.activation(biased if self.limit is None else biased.clamp(max=self.limit))

    def of_up(self, product: torch.Tensor) -> torch.Tensor:
        """Up's factor."""
        if not self.gated:
            return self.activation(product)
        biased = product if self.biases is None else product + self.biases[1]
        return biased if self.limit is None else biased.clamp(-self.limit, self.limit) + 1

    def change_of_up(self, product: torch.Tensor, change: torch.Tensor) -> torch.Tensor:
        """``of_up(product + change) - of_up(product)``, of which nothing cancels."""
        if not self.gated:
            exact = product.double()
            return (self.activation(exact + change.double()) - self.activation(exact)).to(change.dtype)
        if self.limit is None:
            return change
        biased = product if self.biases is None else product + self.biases[1]
        clamped = biased.clamp(-self.limit, self.limit)
        return (change + (biased - clamped)).clamp(-self.limit - clamped, self.limit - clamped)


def gating_of(family: "Family", config: Mapping[str, Any]) -> Gating:
    """Gating of a model's experts, without biases, from its ``config.json``.

    Activations are spelled out here because importing those of transformers takes seconds.
    """
    if family.clamped:
        alpha, limit = _clamping(config)
        return Gating(lambda x: x * torch.sigmoid(alpha * x), limit)
    return Gating(_ACTIVATIONS[config.get(family.activation, "silu")], gated=family.gated)


def kernel_gating(family: "Family", config: Mapping[str, Any]) -> gating.Gating:
    """The same, as the GPU kernels know it."""
    if family.clamped:
        alpha, limit = _clamping(config)
        return gating.Gating(gating.CLAMPED, family.gated, family.biased, alpha, limit)
    function = str(config.get(family.activation, "silu"))
    return gating.Gating("silu" if function == "swish" else function, family.gated, family.biased)


def _clamping(config: Mapping[str, Any]) -> tuple[float, float]:
    """Alpha and limit of a clamped gating; published configurations leave alpha out."""
    return float(config.get("swiglu_alpha", 1.702)), float(config.get("swiglu_limit", 7.0))
