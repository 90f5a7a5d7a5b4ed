"""What quantizing one block of one expert does to the output of its layer.

A MoE layer's output is a routed sum, so the change that one block of one expert causes is the change of that expert's
output on its own tokens times their router weights: no other expert is computed. Changes are computed as such, as
products with the change of the weights, never as the difference of two outputs: nothing cancels, and on a GPU the
tensor cores' TF32 products with float32 sums are accurate enough.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch

from mxmoe_steps.calibration.inputs import Batch, LayerInputs
from mxmoe_steps.calibration.loss import Loss
from mxmoe_steps.models.gating import Function, Gating
from mxmoe_steps.quantizers.grid import QuantizedWeight, quantize_activations
from mxmoe_steps.quantizers.hadamard import rotate
from mxmoe_steps.quantizers.method import Method
from mxmoe_steps.schemes import Scheme


def layer_losses(
    inputs: LayerInputs,
    experts: list[int],
    weights: Sequence[torch.Tensor],
    quantized: Sequence[QuantizedWeight],
    gating: Gating,
    scheme: Scheme,
    method: Method,
    losses: Sequence[Loss],
) -> torch.Tensor:
    """float64 [E, 3, 1 + D, L] on the CPU: per expert and block (gate, up, down) every one of L ``losses``.

    The first is that of all tokens; the others are its parts from the tokens of each of D domains, which add up to it.
    ``weights``: the originals, three [E, N, K] in any precision; ``quantized``: what `quantize_layer` made of them;
    ``gating``: that of the same experts.
    """
    seen = None if scheme.act_bits == 16 else partial(_seen, scheme=scheme, rotated=method.rotated)
    found = []
    for index, expert in enumerate(experts):
        own = [block[index].float() for block in weights]
        restored = [stack[index].dequantize() for stack in quantized]
        changes = [
            (rotate(new) if method.rotated else new) - original for new, original in zip(restored, own, strict=True)
        ]
        batches = inputs.batches(expert)
        found.append(expert_losses(batches, own, changes, gating[index], seen, losses, len(inputs.sizes)))
    sums = torch.stack(found).cpu()
    sums /= torch.tensor([float(len(inputs) if loss.per_token else 1) for loss in losses])
    return torch.cat((sums.sum(2, keepdim=True), sums), dim=2)


def _seen(x: torch.Tensor, scheme: Scheme, rotated: bool) -> torch.Tensor:
    """What a kernel multiplies in place of ``x``: its quantized values, turned back where they were rotated."""
    return rotate(quantize_activations(rotate(x), scheme)) if rotated else quantize_activations(x, scheme)


def expert_losses(
    batches: Iterable[Batch],
    weights: Sequence[torch.Tensor],
    changes: Sequence[torch.Tensor],
    gating: Gating,
    seen: Function | None,
    losses: Sequence[Loss],
    domains: int = 1,
) -> torch.Tensor:
    """One expert's sums over its tokens, float64 [3, D, L]: per block and domain every one of L ``losses``.

    ``weights`` and ``changes`` (quantized minus original): float32 (gate, up, down), each [N, K]. ``seen`` maps a
    block's input to what its kernel would multiply, None for 16-bit activations. Only one block is quantized at a
    time (MxMoE, section 3.2).
    """
    gate, up, down = weights
    sums = torch.zeros(3, domains, len(losses), dtype=torch.float64, device=gate.device)
    with _tensor_cores():
        for batch in batches:
            gated, raised = batch.x @ gate.T, batch.x @ up.T
            moved_gate, moved_up = _product_changes(batch.x, (gate, up), changes[:2], seen)
            moved_gate = gating.of_gate(moved_gate.add_(gated))
            moved_up = gating.change_of_up(raised, moved_up)
            gated, raised = gating.of_gate(gated), gating.of_up(raised)
            sums[0, batch.domain] += _sums((moved_gate.sub_(gated) * raised) @ down.T, batch, losses)
            sums[1, batch.domain] += _sums(moved_up.mul_(gated) @ down.T, batch, losses)
            (moved,) = _product_changes(raised.mul_(gated), (down,), changes[2:], seen)
            sums[2, batch.domain] += _sums(moved, batch, losses)
    return sums


def _product_changes(
    x: torch.Tensor, weights: Sequence[torch.Tensor], changes: Sequence[torch.Tensor], seen: Function | None
) -> list[torch.Tensor]:
    """``seen(x) (W + dW)^T - x W^T`` for each block, by its two small parts."""
    if seen is None:
        return [x @ change.T for change in changes]
    entering = seen(x)
    noise = entering - x
    return [(entering @ change.T).add_(noise @ weight.T) for weight, change in zip(weights, changes, strict=True)]


def _sums(change: torch.Tensor, batch: Batch, losses: Sequence[Loss]) -> torch.Tensor:
    """float64 [L]: every loss of a change of the expert's output [n, H]."""
    return torch.stack([loss.of(change, batch) for loss in losses])


@contextmanager
def _tensor_cores() -> Iterator[None]:
    """TF32 products on GPUs that have them: 11 bits of each factor, float32 sums."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
