"""``generate`` of our models looks for the end of a text one step late, so that the host does not wait for the GPU.

A step of few sequences takes the GPU 2 ms, and the host about as long to prepare. transformers lets the two overlap
where it defers the check for the end (`DeferredStopCheck`): the step too many that this costs leaves no trace in the
result. It does so on MPS; here it does for models that our quantizer loaded, on CUDA.
"""

import functools
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

import torch
from transformers.generation import utils

_ours: ContextVar[bool] = ContextVar("ours", default=False)


def defer_stop_checks(quantizer: type) -> None:
    """Once: for models whose quantizer is a ``quantizer``. A transformers without the deferred check stays as it is."""
    check: Any = getattr(utils, "DeferredStopCheck", None)
    model: Any = utils.GenerationMixin
    if hasattr(check, "is_supported") and hasattr(model, "_sample"):
        check.is_supported = staticmethod(_supported(check.is_supported))
        model._sample = _sampling(model._sample, quantizer)


def _supported(supported: Callable[..., bool]) -> Callable[..., bool]:
    @functools.wraps(supported)
    def is_supported(device: torch.device, *arguments: Any, **options: Any) -> bool:
        """Our models on CUDA count as models on MPS."""
        return supported(
            torch.device("mps") if _ours.get() and device.type == "cuda" else device, *arguments, **options
        )

    return is_supported


def _sampling(sample: Callable[..., Any], quantizer: type) -> Callable[..., Any]:
    @functools.wraps(sample)
    def _sample(self: Any, *arguments: Any, **options: Any) -> Any:
        token = _ours.set(isinstance(getattr(self, "hf_quantizer", None), quantizer))
        try:
            return sample(self, *arguments, **options)
        finally:
            _ours.reset(token)

    return _sample
