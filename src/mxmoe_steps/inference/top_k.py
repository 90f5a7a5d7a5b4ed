"""Top-k of a compiled router, in operations that inductor fuses with the softmax before it.

`torch.topk` is two kernels of its own, 9 us a layer on an H100 for 60 experts; k maxima are a part of the kernel of the
softmax.
"""

from typing import Any

import torch
from torch.overrides import TorchFunctionMode

MOST_COLUMNS, MOST_MAXIMA = 1024, 16


class TopKByMaxima(TorchFunctionMode):
    """Within it, a float32 `torch.topk` of few columns along the last dimension is `top_k_by_maxima`."""

    def __torch_function__(self, function: Any, _: Any, arguments: Any = (), options: Any = None) -> Any:
        """As `TorchFunctionMode`."""
        if function in (torch.topk, torch.Tensor.topk):
            return _top_k(*arguments, **(options or {}))
        return function(*arguments, **(options or {}))


def _top_k(
    input: torch.Tensor, k: int, dim: int = -1, largest: bool = True, sorted: bool = True
) -> tuple[torch.Tensor, torch.Tensor]:
    last = dim in (-1, input.dim() - 1)
    if largest and last and input.dtype == torch.float32 and input.shape[-1] <= MOST_COLUMNS and k <= MOST_MAXIMA:
        return top_k_by_maxima(input, k)
    return torch.topk(input, k, dim, largest, sorted)


def top_k_by_maxima(values: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The k largest of float32 [..., columns], in order, and their columns, int64; of equal ones the first.

    NaN is the largest, as in `torch.topk`.
    """
    bits = values.view(torch.int32)
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)  # order of int32 is that of the floats
    backwards = torch.arange(values.shape[-1] - 1, -1, -1, device=values.device)
    keys = (ordered.long() << 32) | backwards
    maxima = []
    for _ in range(k):
        maxima.append(keys.amax(-1, keepdim=True))
        keys = torch.where(keys == maxima[-1], torch.iinfo(torch.int64).min, keys)
    found = torch.cat(maxima, -1)
    ordered = (found >> 32).int()
    return (ordered ^ ((ordered >> 31) & 0x7FFFFFFF)).view(torch.float32), values.shape[-1] - 1 - (found & 0xFFFFFFFF)
