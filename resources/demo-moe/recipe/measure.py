"""What the model card reports: perplexity, expert traffic and damage by rounding, per domain of held-out text."""

import copy
import math

import torch
from model import DemoMoe
from torch import Tensor
from torch.nn import functional

WINDOW = 1024  # tokens of context at most


@torch.no_grad()
def perplexity(model: DemoMoe, tokens: Tensor, batch: int = 16) -> tuple[float, Tensor]:
    """Perplexity over all whole windows of [n] token ids, and traffic [layers, experts].

    A window's first token is context only. Traffic is each expert's share of the routed slots of its layer.
    """
    windows = tokens[: len(tokens) // WINDOW * WINDOW].view(-1, WINDOW)
    loss, traffic = 0.0, 0.0
    for rows in windows.split(batch):
        logits, share, _ = model(rows)
        predicted = logits[:, :-1].flatten(0, 1).float()
        loss += functional.cross_entropy(predicted, rows[:, 1:].flatten(), reduction="sum").item()
        traffic = traffic + share * len(rows)
    assert isinstance(traffic, Tensor)
    traffic = traffic / traffic.sum(dim=-1, keepdim=True)
    return math.exp(loss / (windows.numel() - len(windows))), traffic


def round_to_nearest(weight: Tensor, bits: int, group: int = 128) -> Tensor:
    """Asymmetric min-max rounding in groups of input features, scale and zero point in bfloat16."""
    rows = weight.float().unflatten(-1, (-1, group))
    low, high = rows.amin(dim=-1, keepdim=True), rows.amax(dim=-1, keepdim=True)
    scale = ((high - low) / (2**bits - 1)).clamp(min=1e-8).bfloat16().float()
    low = low.bfloat16().float()
    return (((rows - low) / scale).round().clamp(0, 2**bits - 1) * scale + low).flatten(-2).to(weight.dtype)


@torch.no_grad()
def rounded(model: DemoMoe, bits: int) -> DemoMoe:
    """Copy of the model with every routed and shared expert rounded to ``bits``."""
    model = copy.deepcopy(model)
    for name, parameter in model.named_parameters():
        if ".experts." in name or ".shared_expert." in name:
            parameter.copy_(round_to_nearest(parameter, bits))
    return model


def measure(model: DemoMoe, texts: dict[str, Tensor], sizes: dict[str, int]) -> dict[str, object]:
    """Card numbers of a float32 model. ``texts``: token ids per domain; ``sizes``: their bytes."""
    domains: dict[str, dict[str, object]] = {}
    for domain, tokens in texts.items():
        value, traffic = perplexity(model, tokens)
        relative = traffic * traffic.shape[1]
        domains[domain] = {
            "tokens": len(tokens),
            "perplexity": value,
            "bits_per_byte": math.log2(value) * len(tokens) / sizes[domain],
            "busiest_expert": relative.amax(dim=1).tolist(),  # per layer, times the mean
            "rarest_expert": relative.amin(dim=1).tolist(),
            "traffic": traffic.tolist(),
        }
    for bits in (8, 4, 3, 2):
        worse = rounded(model, bits)
        for domain, tokens in texts.items():
            domains[domain][f"perplexity_{bits}_bits"] = perplexity(worse, tokens)[0]
    return {"window": WINDOW, "domains": domains}
