"""Modules that hold packed weights and compute what they mean, on any device PyTorch runs on.

The reference arithmetic: activations are quantized per token as the scheme says, weights are
dequantized exactly, the product is taken in the activations' precision. The routed experts of a layer are one PyTorch
operator, ``mxmoe::packed_experts``, so that `torch.compile` sees no loop over experts.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from mxmoe_steps.models.finite import BadNumbersError, Check, any_bad, not_finite
from mxmoe_steps.models.gating import Gating
from mxmoe_steps.models.operators import define, register
from mxmoe_steps.quantizers.grid import QuantizedWeight, from_tensors, quantize_activations
from mxmoe_steps.quantizers.hadamard import rotate
from mxmoe_steps.schemes import BLOCKS, ORIGINAL, Scheme

DTYPES = {"U8": torch.uint8, "BF16": torch.bfloat16}  # of parts, as safetensors names them


def _is_e4m3_nan(values: torch.Tensor) -> torch.Tensor:
    return values & 0x7F == 0x7F


def _is_e8m0_nan(values: torch.Tensor) -> torch.Tensor:
    return values == 0xFF


def _not_positive_float32(values: torch.Tensor) -> torch.Tensor:
    return _not_positive(values.view(torch.float32))


def _not_positive(values: torch.Tensor) -> torch.Tensor:
    return ~((values > 0) & values.isfinite())


def check_of_part(scheme: Scheme, part: str, tensor: torch.Tensor) -> Check | None:
    """What calls elements of a block's part bad: what is no number, and scales that are not positive."""
    if part == "qweight":
        return _is_e4m3_nan if scheme.e4m3_weights else None
    if part == "scales":
        if scheme.scale_rows > 1:
            return _not_positive_float32
        return _is_e8m0_nan if tensor.dtype == torch.uint8 else _not_positive
    return not_finite


@dataclass(frozen=True, eq=False)
class StoredBlock:
    """A linear block [N, K] as a checkpoint stores it: its ``parts`` by name, wherever they lie, in a mapped file too.

    ``name``: for messages.
    """

    name: str
    scheme: Scheme
    out_features: int
    in_features: int
    rotated: bool
    parts: dict[str, torch.Tensor]

    def check(self) -> None:
        """`BadNumbersError` for a part that means no numbers."""
        for part, tensor in self.parts.items():
            check = check_of_part(self.scheme, part, tensor)
            if check is not None and any_bad(tensor, check):
                raise BadNumbersError(f"{self.name}: {part}")


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
            self.register_buffer(part, torch.empty(shape, dtype=DTYPES[dtype]))
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
        """See `finite.bad_numbers`."""
        return check_of_part(self.scheme, name, tensor)

    def extra_repr(self) -> str:
        """Shown by ``print(model)``."""
        rotated = ", rotated" if self.rotated else ""
        return f"{self.scheme}, in_features={self.in_features}, out_features={self.out_features}{rotated}"


def make_linear(scheme: Scheme, out_features: int, in_features: int, rotated: bool, biased: bool) -> nn.Module:
    """A packed block, or a plain linear where the scheme keeps 16-bit weights."""
    if scheme.is_original:
        return nn.Linear(in_features, out_features, bias=biased)
    return PackedLinear(scheme, out_features, in_features, rotated, biased)


def stored_block(linear: Any, name: str) -> StoredBlock:
    """What `make_linear` has made, as a checkpoint stores it."""
    scheme = linear.scheme if isinstance(linear, PackedLinear) else ORIGINAL
    parts = {part: tensor.detach() for part, tensor in (*linear.named_parameters(), *linear.named_buffers())}
    return StoredBlock(name, scheme, linear.out_features, linear.in_features, getattr(linear, "rotated", False), parts)


def linear_of(block: StoredBlock, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """What `make_linear` makes, with copies of a block's parts; those that are not packed, in ``dtype``."""
    with torch.device("meta"):
        linear = make_linear(block.scheme, block.out_features, block.in_features, block.rotated, "bias" in block.parts)
    own = {
        part: tensor.to(device, dtype if part in ("weight", "bias") else tensor.dtype, copy=True).contiguous()
        for part, tensor in block.parts.items()
    }
    linear.load_state_dict(own, assign=True)
    return linear.requires_grad_(False)


class MixedExpert(nn.Module):
    """One expert: its ``linears``, gate_proj, if it has one, up_proj and down_proj, each under its own scheme.

    ``gating`` has no biases: the blocks add theirs.
    """

    gate_proj: nn.Module
    up_proj: nn.Module
    down_proj: nn.Module

    def __init__(self, linears: Mapping[str, nn.Module], gating: Gating) -> None:
        super().__init__()
        for name, linear in linears.items():
            self.add_module(name, linear)
        self.gating = gating

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., H] to [..., H]."""
        up = self.up_proj(x)
        return self.down_proj(self.gating(self.gate_proj(x), up) if self.gating.gated else self.gating.of_up(up))


def make_expert(
    schemes: Sequence[Scheme], hidden: int, inner: int, gating: Gating, rotated: bool = False, biased: bool = False
) -> MixedExpert:
    """``schemes``: of gate, up and down, see `make_linear`; that of a gate which there is not is not looked at."""
    linears = {}
    for kind, scheme in zip(BLOCKS, schemes, strict=True):
        if kind != "gate" or gating.gated:
            shape = (hidden, inner) if kind == "down" else (inner, hidden)
            linears[f"{kind}_proj"] = make_linear(scheme, *shape, rotated, biased)
    return MixedExpert(linears, gating)


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
