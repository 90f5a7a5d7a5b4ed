"""Quantized weights of all experts of a layer, plain or rotated, by any registered quantizer.

Experts share their shapes, so they are quantized in stacks, as many experts at a time as the workspace holds. A
Hessian weighs every token by its squared router weight, because that is how the token's error enters the layer's
output. gate and up have the same input and therefore one Hessian: they are quantized as the rows of one matrix.
"""

from collections.abc import Iterable, Iterator

import torch

from mxmoe_steps.calibration.inputs import Batch, LayerInputs
from mxmoe_steps.models.gating import Gating
from mxmoe_steps.quantizers.grid import QuantizedWeight, concatenate
from mxmoe_steps.quantizers.hadamard import rotate
from mxmoe_steps.quantizers.hessians import Hessians
from mxmoe_steps.quantizers.method import Method
from mxmoe_steps.schemes import Scheme

_WORKSPACE_BYTES = 8 << 30
_WEIGHT_COPIES, _HESSIAN_COPIES = 10, 4  # float32 and float64 copies alive while a stack is quantized
_SUMMED = 4096  # tokens whose products are summed in float32; these sums are added in float64


def quantize_layer(
    inputs: LayerInputs,
    experts: list[int],
    weights: list[torch.Tensor],
    gating: Gating,
    scheme: Scheme,
    method: Method,
) -> list[QuantizedWeight]:
    """Stacks of gate, up and down; ``weights``: the originals, three [E, N, K] in any precision.

    ``gating`` is that of the same experts. The stacks of a rotating method multiply rotated inputs.
    """
    gate, up, down = weights
    if not method.uses_hessians:
        return [
            concatenate([_quantized(block[stack], scheme, method) for stack in _stacks(*block.shape)])
            for block in weights
        ]
    width, hidden = up.shape[1:]
    tokens = torch.tensor([inputs.tokens(expert) for expert in experts], device=gate.device)
    every = torch.zeros(hidden, hidden, dtype=torch.float64, device=gate.device)
    _add_second_moment(every, inputs.hidden)
    every /= len(inputs)
    inner = torch.zeros(len(experts), width, width, dtype=torch.float64, device=gate.device)
    gate_up = []
    for stack in _stacks(len(experts), gate.shape[1] + width, hidden):
        entering = torch.zeros(len(experts[stack]), hidden, hidden, dtype=torch.float64, device=gate.device)
        for index, expert in enumerate(experts[stack]):
            blocks = gate[stack][index].float(), up[stack][index].float()
            own = gating[stack.start + index]
            add_moments(entering[index], inner[stack][index], inputs.batches(expert), *blocks, own)
        hessians = Hessians(entering, tokens[stack], every, method.damping)
        gate_up.append(_quantized(torch.cat((gate[stack], up[stack]), dim=1), scheme, method, hessians))
    pooled = inner.sum(0) / tokens.sum().clamp_min(1)
    downs = [
        _quantized(down[stack], scheme, method, Hessians(inner[stack], tokens[stack], pooled, method.damping))
        for stack in _stacks(len(experts), hidden, width)
    ]
    both = concatenate(gate_up)
    return [both[:, : gate.shape[1]], both[:, gate.shape[1] :], concatenate(downs)]


def _stacks(experts: int, out_features: int, in_features: int) -> Iterator[slice]:
    """Runs of consecutive experts whose quantization fits the workspace."""
    weights, hessian = 4 * out_features * in_features, 8 * in_features**2
    size = max(1, _WORKSPACE_BYTES // (_WEIGHT_COPIES * weights + _HESSIAN_COPIES * hessian))
    for low in range(0, experts, size):
        yield slice(low, low + size)


def _quantized(
    weight: torch.Tensor, scheme: Scheme, method: Method, hessians: Hessians | None = None
) -> QuantizedWeight:
    weight = weight.float()
    if method.rotated:
        weight, hessians = rotate(weight), None if hessians is None else hessians.rotated()
    return method.kind().quantize(weight, scheme, hessians)


def add_moments(
    entering: torch.Tensor,
    inner: torch.Tensor,
    batches: Iterable[Batch],
    gate: torch.Tensor,
    up: torch.Tensor,
    gating: Gating,
) -> None:
    """Add one expert's second moments of what enters gate and up, and of what enters down."""
    for batch in batches:
        scale = batch.scale.unsqueeze(-1)
        _add_second_moment(inner, gating(batch.x @ gate.T, batch.x @ up.T).mul_(scale))
        _add_second_moment(entering, batch.x * scale)


def _add_second_moment(sums: torch.Tensor, x: torch.Tensor) -> None:
    """Add x^T x to float64 ``sums`` [K, K]; ``x`` [n, K]."""
    for part in x.split(_SUMMED):
        sums += part.float().T @ part.float()
