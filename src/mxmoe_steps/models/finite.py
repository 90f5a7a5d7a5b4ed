"""Weights that are no numbers."""

import torch
from torch import nn


def bad_numbers(root: nn.Module) -> str | None:
    """Name of the first tensor below ``root`` that holds NaN or infinity, or that its module calls bad."""
    for path, module in root.named_modules():
        is_bad = getattr(module, "is_bad", is_not_finite)
        for name, tensor in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
            if not tensor.is_meta and is_bad(name, tensor):
                return f"{path}.{name}" if path else name
    return None


def is_not_finite(_name: str, tensor: torch.Tensor) -> bool:
    """Whether a tensor holds NaN or infinity."""
    return tensor.is_floating_point() and not bool(tensor.isfinite().all())
