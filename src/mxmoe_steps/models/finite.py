"""Weights that are no numbers."""

from collections.abc import Callable, Iterable, Iterator

import torch
from torch import nn

from mxmoe_steps.errors import UserError

Check = Callable[[torch.Tensor], torch.Tensor]  # elements to whether they are bad

_TOGETHER = 2**22  # elements that are checked in one go, small tensors of them copied: memory for a few megabytes


class BadNumbersError(UserError):
    """A part of a packed block holds what is no number, or a scale that is not positive."""

    def __init__(self, part: str) -> None:
        super().__init__(f"{part} holds NaN or infinity, or a scale that is not positive; run the quantize step again")


def not_finite(values: torch.Tensor) -> torch.Tensor:
    """NaN and infinity."""
    return ~values.isfinite()


def bad_numbers(root: nn.Module) -> str | None:
    """Name of a tensor below ``root`` that holds NaN or infinity, or what its module's ``check_of`` calls bad.

    Small tensors are checked together: a GPU is waited for a few times, not once a tensor.
    """
    alike: dict[tuple[Check, torch.dtype, torch.device], list[tuple[str, torch.Tensor]]] = {}
    for path, module in root.named_modules():
        for name, tensor in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
            check = check_of(module, name, tensor)
            if check is not None and not tensor.is_meta and tensor.numel():
                key = (check, tensor.dtype, tensor.device)
                alike.setdefault(key, []).append((f"{path}.{name}" if path else name, tensor.detach()))
    for (check, _, _), tensors in alike.items():
        for batch in _batches(tensors):
            values = [tensor for _, tensor in batch]
            if any_bad(values[0] if len(values) == 1 else torch.cat([each.flatten() for each in values]), check):
                return next(name for name, tensor in batch if any_bad(tensor, check))
    return None


def any_bad(values: torch.Tensor, check: Check) -> bool:
    """Whether ``check`` calls an element bad."""
    return any(bool(_bad(part, check)) for part in values.flatten().split(_TOGETHER))


def _bad(values: torch.Tensor, check: Check) -> torch.Tensor:
    if check is not_finite:  # the extremes are NaN where an element is: 30 times faster on a CPU
        return ~torch.stack(values.aminmax()).isfinite().all()
    return check(values).any()


def check_of(module: nn.Module, name: str, tensor: torch.Tensor) -> Check | None:
    """What calls elements of a module's tensor bad; None if nothing does."""
    if (own := getattr(module, "check_of", None)) is not None:
        return own(name, tensor)  # type: ignore[no-any-return]
    return not_finite if tensor.is_floating_point() else None


def _batches(tensors: Iterable[tuple[str, torch.Tensor]]) -> Iterator[list[tuple[str, torch.Tensor]]]:
    """Of at most `_TOGETHER` elements, or of one tensor."""
    batch: list[tuple[str, torch.Tensor]] = []
    elements = 0
    for name, tensor in tensors:
        if batch and elements + tensor.numel() > _TOGETHER:
            yield batch
            batch, elements = [], 0
        batch.append((name, tensor))
        elements += tensor.numel()
    if batch:
        yield batch
