"""Muon (https://kellerjordan.github.io/posts/muon) for matrices and AdamW for the rest."""

from collections import defaultdict
from dataclasses import dataclass

import torch
from torch import Tensor, nn


def orthogonalize(g: Tensor) -> Tensor:
    """Nearest semi-orthogonal matrices of [n, rows <= cols] by a quintic Newton-Schulz iteration in bfloat16."""
    a, b, c = 3.4445, -4.7750, 2.0315
    x = g.bfloat16()
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(5):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.to(g.dtype)


@dataclass
class Matrices:
    """A parameter as a stack of matrices, wide side last; an expert's gate and up count as two."""

    parameter: nn.Parameter
    split: int

    def view(self, value: Tensor) -> Tensor:
        """[n, rows <= cols] view of a tensor shaped like the parameter."""
        rows = value.shape[-2] // self.split
        stack = value.view(-1, rows, value.shape[-1])
        return stack.mT if rows > value.shape[-1] else stack


class Optimizer:
    """One step for every parameter of the model; matrices of one shape are updated as one batch."""

    def __init__(self, model: nn.Module, matrix_lr: float, other_lr: float, weight_decay: float) -> None:
        self.matrix_lr, self.other_lr, self.weight_decay = matrix_lr, other_lr, weight_decay
        self.groups: dict[torch.Size, list[Matrices]] = defaultdict(list)
        others = []
        for name, parameter in model.named_parameters():
            if parameter.dim() < 2 or "embed" in name or "gate.weight" in name:
                others.append(parameter)
            else:
                member = Matrices(parameter, 2 if name.endswith("gate_up_proj") else 1)
                self.groups[member.view(parameter).shape[1:]].append(member)
        self.momentum = {
            shape: torch.zeros_like(torch.cat([m.view(m.parameter) for m in members]))
            for shape, members in self.groups.items()
        }
        self.adam = torch.optim.AdamW(others, lr=other_lr, betas=(0.9, 0.95), weight_decay=0.01)

    @torch.no_grad()
    def step(self, schedule: float) -> None:
        """Update with both learning rates multiplied by ``schedule``, then clear the gradients."""
        for group in self.adam.param_groups:
            group["lr"] = self.other_lr * schedule
        self.adam.step()
        self.adam.zero_grad()
        lr = self.matrix_lr * schedule
        for shape, members in self.groups.items():
            gradient = torch.cat([m.view(m.parameter.grad) for m in members])  # type: ignore[arg-type]
            momentum = self.momentum[shape]
            momentum.lerp_(gradient, 0.05)
            update = orthogonalize(gradient.lerp(momentum, 0.95)) * (-lr * 0.2 * max(shape) ** 0.5)
            start = 0
            for member in members:
                weights = member.view(member.parameter)
                weights.mul_(1 - lr * self.weight_decay).add_(update[start : start + len(weights)])
                start += len(weights)
                member.parameter.grad = None
