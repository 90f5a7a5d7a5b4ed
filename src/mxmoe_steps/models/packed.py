"""Modules that hold packed weights and compute what they mean, on any device PyTorch runs on.

The reference arithmetic: activations are quantized per token as the scheme says, weights are
dequantized exactly, the product is taken in the activations' precision. The routed experts of a layer are one PyTorch
operator, ``mxmoe::packed_experts``, so that `torch.compile` sees no loop over experts.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn

from mxmoe_steps.models.finite import Check, not_finite
from mxmoe_steps.models.gating import Gating
from mxmoe_steps.models.operators import define, register
from mxmoe_steps.quantizers.grid import QuantizedWeight, from_tensors, quantize_activations
from mxmoe_steps.quantizers.hadamard import rotate
from mxmoe_steps.schemes import Scheme

_DTYPES = {"U8": torch.uint8, "BF16": torch.bfloat16}  # of parts, as safetensors names them


def _is_e4m3_nan(values: torch.Tensor) -> torch.Tensor:
    return values & 0x7F == 0x7F


def _is_e8m0_nan(values: torch.Tensor) -> torch.Tensor:
    return values == 0xFF


def _not_positive_float32(values: torch.Tensor) -> torch.Tensor:
    return _not_positive(values.view(torch.float32))


def _not_positive(values: torch.Tensor) -> torch.Tensor:
    return ~((values > 0) & values.isfinite())


class PackedLinear(nn.Module):
    """A linear block [N, K] under one scheme, stored as the checkpoint stores it; a ``bias`` [N] is not quantized.

    ``rotated``: its weights multiply inputs that `rotate` has rotated.
    """

    def __init__(
        self, scheme: Scheme, out_features: int, in_features: int, rotated: bool = False, biased: bool = False
    ) -> None:
        super().__init__()
        self.scheme, self.out_features, self.in_features, self.rotated = scheme, out_features, in_features, rotated
        for part, (dtype, shape) in scheme.parts(out_features, in_features).items():
            self.register_buffer(part, torch.empty(shape, dtype=_DTYPES[dtype]))
        self.bias = nn.Parameter(torch.empty(out_features)) if biased else None

    def quantized(self) -> QuantizedWeight:
        """Codes, scales and zero points."""
        return from_tensors(self.scheme, self.in_features, dict(self.named_buffers()))

    def dequantize(self) -> torch.Tensor:
        """float32 [N, K]."""
        return self.quantized().dequantize()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., K] to [..., N] in the precision of ``x``."""
        seen = quantize_activations(rotate(x.float()) if self.rotated else x, self.scheme).to(x.dtype)
        return nn.functional.linear(seen, self.dequantize().to(x.dtype), self.bias)

    def check_of(self, name: str, tensor: torch.Tensor) -> Check | None:
        """What calls elements of its tensors bad: what is no number, and scales that are not positive."""
        if name == "qweight":
            return _is_e4m3_nan if self.scheme.e4m3_weights else None
        if name == "scales":
            if self.scheme.scale_rows > 1:
                return _not_positive_float32
            return _is_e8m0_nan if tensor.dtype == torch.uint8 else _not_positive
        return not_finite

    def extra_repr(self) -> str:
        """Shown by ``print(model)``."""
        rotated = ", rotated" if self.rotated else ""
        return f"{self.scheme}, in_features={self.in_features}, out_features={self.out_features}{rotated}"


def make_linear(scheme: Scheme, out_features: int, in_features: int, rotated: bool, biased: bool) -> nn.Module:
    """A packed block, or a plain linear where the scheme keeps 16-bit weights."""
    if scheme.is_original:
        return nn.Linear(in_features, out_features, bias=biased)
    return PackedLinear(scheme, out_features, in_features, rotated, biased)


class MixedExpert(nn.Module):
    """One expert: three blocks, each under its own scheme, those that are packed with or without rotation.

    ``gating`` has no biases: the blocks add theirs, where they are ``biased``.
    """

    def __init__(
        self,
        schemes: Sequence[Scheme],
        hidden: int,
        inner: int,
        gating: Gating,
        rotated: bool = False,
        biased: bool = False,
    ) -> None:
        super().__init__()
        gate, up, down = schemes
        if gating.gated:
            self.gate_proj = make_linear(gate, inner, hidden, rotated, biased)
        self.up_proj = make_linear(up, inner, hidden, rotated, biased)
        self.down_proj = make_linear(down, hidden, inner, rotated, biased)
        self.gating = gating

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., H] to [..., H]."""
        up = self.up_proj(x)
        return self.down_proj(self.gating(self.gate_proj(x), up) if self.gating.gated else self.gating.of_up(up))


class MixedExperts(nn.ModuleList):
    """All routed experts of a layer; takes the place of the experts module of transformers."""

    def __init__(self, experts: Iterable[MixedExpert]) -> None:
        super().__init__(experts)
        self.number = register(self)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """A copy, or what was pickled, is another module."""
        super().__setstate__(state)
        self.number = register(self)

    def forward(self, hidden: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor) -> torch.Tensor:
        """[T, H], expert ids [T, k] and router weights [T, k] to the routed sum [T, H]."""
        return _packed_experts(self, hidden, top_k_index, top_k_weights, key=self.number)

    def routed_sum(self, hidden: torch.Tensor, expert_ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """What the operator computes: one expert after another, each on its tokens."""
        result = torch.zeros(hidden.shape, dtype=torch.float32, device=hidden.device)
        for number, expert in enumerate(self):
            token, slot = (expert_ids == number).nonzero(as_tuple=True)
            if len(token):
                weighted = expert(hidden[token]).float() * weights[token, slot].unsqueeze(-1).float()
                result.index_add_(0, token, weighted)
        return result.to(hidden.dtype)


class ScaledExperts(MixedExperts):
    """Those of a family whose router weights multiply inputs: it gives every expert all tokens, times their weights."""

    def forward(self, scaled: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        """[E T, H], tokens of expert 0 first, zero where a token is not routed, to what each expert makes of them."""
        return _scaled_experts(self, scaled, key=self.number)

    def each(self, scaled: torch.Tensor) -> torch.Tensor:
        """What the operator computes."""
        result = torch.zeros_like(scaled)
        (routed,) = scaled.any(-1).nonzero(as_tuple=True)
        for number, expert in enumerate(self):
            own = routed[routed // (len(scaled) // len(self)) == number]
            if len(own):
                result[own] = expert(scaled[own])
        return result


# Which tokens an expert has is known on the host only after the GPU has said so: no CUDA graph can hold that.
_packed_experts = define(
    "packed_experts(Tensor hidden, Tensor expert_ids, Tensor weights, int number) -> Tensor",
    MixedExperts.routed_sum,
    tags=(torch.Tag.cudagraph_unsafe,),
)
_scaled_experts = define(
    "scaled_experts(Tensor scaled, int number) -> Tensor", ScaledExperts.each, tags=(torch.Tag.cudagraph_unsafe,)
)
