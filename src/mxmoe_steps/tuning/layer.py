"""One layer of the tuned model: what enters its experts, and the descent of their weights toward the original's output.

Attention, norms and router are the original's, so what they make of the tuned model's hidden states is computed once.
A step then takes any tokens of the text, and no more than the experts runs.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from mxmoe_steps.tuning.experts import Experts, Rows, summed

_WARM_UP = 0.1  # of the steps
_PLAIN = 0.2  # of the metric: the identity, for directions in which few tokens have gradients
_PASS = 1 << 14  # tokens whose outputs are computed at a time


@dataclass(frozen=True)
class LayerText:
    """Text in one layer, T tokens.

    ``hidden`` [T, H]: what enters the experts of the tuned model; ``expert_ids`` int64 and ``weights`` float32 [T, k]:
    its routing; ``shared`` float32 [T]: factor of the shared expert, or None; ``rest`` [T, H]: the layer's output
    without its experts; ``wanted`` [T, H]: what the original layer made of the original's hidden states. ``factor``: of
    the experts' sum in the layer's output. ``metric`` [H, H], symmetric and positive: an error e of the layer's output
    costs e metric e. The last ``held_out`` tokens are not tuned on.
    """

    hidden: torch.Tensor
    expert_ids: torch.Tensor
    weights: torch.Tensor
    shared: torch.Tensor | None
    rest: torch.Tensor
    wanted: torch.Tensor
    factor: float
    metric: torch.Tensor
    held_out: int

    @property
    def tuned(self) -> int:
        """Tokens to tune on."""
        return len(self.hidden) - self.held_out


class TunedLayer:
    """The experts of a layer, ``shared`` one None where there is none."""

    def __init__(self, routed: Experts, shared: Experts | None) -> None:
        self.routed, self.shared = routed, shared

    @property
    def is_tuned(self) -> bool:
        """Whether any block is."""
        return any(block.tuned for experts in (self.routed, self.shared) if experts for block in experts.blocks)

    @torch.no_grad()
    def output(self, text: LayerText, tokens: slice) -> torch.Tensor:
        """Of the layer for some tokens, float32 [n, H]."""
        return self._forward(text, tokens)[0]

    @torch.no_grad()
    def error(self, text: LayerText) -> float:
        """Cost of the difference from ``wanted`` over that of losing it, of the tokens that are not tuned on."""
        missed = power = 0.0
        first = text.tuned if text.held_out else 0
        for tokens in passes(first, len(text.hidden)):
            wanted = text.wanted[tokens].float()
            missed += _cost(self.output(text, tokens) - wanted, text.metric)
            power += _cost(wanted, text.metric)
        return missed / power

    def step(self, text: LayerText, tokens: torch.Tensor, rate: float) -> None:
        """Move the weights down the gradient of the error's cost on some tokens, int64 [n]."""
        output, parts = self._forward(text, tokens)
        parts = [part for part in parts if part[1].requires_grad]  # others have no block that is tuned
        slope = (output - text.wanted[tokens].float()) @ text.metric
        torch.autograd.backward(
            [outputs for _, outputs, _, _ in parts],
            [
                (slope[rows.token] * weights.flatten()[rows.slot].unsqueeze(-1)).to(outputs.dtype)
                for _, outputs, rows, weights in parts
            ],
        )
        for experts, _, rows, _ in parts:
            experts.descend(rows, rate)

    def _forward(
        self, text: LayerText, tokens: torch.Tensor | slice
    ) -> tuple[torch.Tensor, list[tuple[Experts, torch.Tensor, Rows, torch.Tensor]]]:
        """The layer's output, and of routed and shared experts what each row contributes."""
        hidden, expert_ids, weights = text.hidden[tokens], text.expert_ids[tokens], text.weights[tokens]
        kinds = [(self.routed, expert_ids, weights)]
        if self.shared is not None:
            assert text.shared is not None
            kinds.append((self.shared, torch.zeros_like(expert_ids[:, :1]), text.shared[tokens].unsqueeze(-1)))
        output = text.rest[tokens].float()
        parts = []
        for experts, ids, factors in kinds:
            rows = Rows.of(ids, experts.count)
            outputs = experts.outputs(hidden, rows)
            output = output.add(summed(outputs.detach(), rows, factors), alpha=text.factor)
            parts.append((experts, outputs, rows, factors))
        return output, parts


def metric_of(gradients: Sequence[torch.Tensor], features: int) -> torch.Tensor:
    """What an error of the layer's output [.., H] costs, float32 [H, H]: g g^T, the mean over tokens, mixed with the
    identity.

    ``gradients``, some [T, H]: of the model's loss with respect to that output, as `capture` has them: 1/2 (g . e)^2
    estimates the KL divergence that the error e causes. Without any it is the identity alone.
    """
    identity = torch.eye(features)
    if not gradients:
        return identity
    moments = torch.zeros(features, features, dtype=torch.float64, device=gradients[0].device)
    for part in (part for gradient in gradients for part in gradient.split(_PASS)):
        moments += part.float().T @ part.float()
    moments /= moments.diagonal().mean().clamp_min(torch.finfo(torch.float64).tiny)
    return ((1 - _PLAIN) * moments.float() + _PLAIN * identity.to(moments.device)).contiguous()


def _cost(missed: torch.Tensor, metric: torch.Tensor) -> float:
    return float(torch.linalg.vecdot(missed @ metric, missed).sum(dtype=torch.float64))


def descend(layer: TunedLayer, text: LayerText, steps: int, batch: int, rate: float, seed: int) -> None:
    """``steps`` steps of ``batch`` tokens, drawn without repeats until all were; the rate rises, then falls as a
    cosine."""
    drawn = _drawn(text.tuned, min(batch, text.tuned), seed)
    warm_up = max(1, round(_WARM_UP * steps))
    for step, tokens in zip(range(steps), drawn, strict=False):
        falling = (1 + math.cos(math.pi * step / steps)) / 2
        layer.step(text, tokens.to(text.hidden.device), rate * falling * min(1.0, (step + 1) / warm_up))


def _drawn(count: int, batch: int, seed: int) -> Iterator[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield from torch.randperm(count, generator=generator)[: count - count % batch].split(batch)


def passes(first: int, last: int, size: int = _PASS) -> Iterator[slice]:
    """Runs of at most ``size`` tokens."""
    for low in range(first, last, size):
        yield slice(low, min(low + size, last))
