"""Gradients that have the same bytes in every run, on a GPU too."""

import logging
from collections.abc import Sequence
from functools import cache

import torch

log = logging.getLogger("mxmoe_steps")


def gradients(output: torch.Tensor, inputs: Sequence[torch.Tensor], above: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """``torch.autograd.grad`` of ``output`` by ``inputs``, from the gradient ``above``.

    Backward passes of attention add in the order in which blocks of threads finish, unless PyTorch is told to raise
    errors for operations that have no deterministic form; to be told to warn is not enough. Where another operation of
    the layer has none the pass is done again without, and the log says so.
    """
    if output.device.type != "cuda":
        return torch.autograd.grad(output, inputs, above)
    torch.use_deterministic_algorithms(True)
    try:
        return torch.autograd.grad(output, inputs, above, retain_graph=True)
    except RuntimeError as error:
        if "deterministic" not in str(error).lower():
            raise
        _say(str(error).splitlines()[0])
    finally:
        torch.use_deterministic_algorithms(True, warn_only=True)
    return torch.autograd.grad(output, inputs, above)


@cache
def _say(why: str) -> None:
    """Once, not for every run of tokens of every layer."""
    log.warning("gradients may differ in their last bits between runs: %s", why)
