"""Experts as PyTorch operators: to `torch.compile` and CUDA graphs, the experts of a layer are one opaque call.

An operator takes tensors and numbers. What else it needs, weights in an order of their own for instance, belongs to an
object that is registered here under a number for as long as it lives.
"""

import itertools
from collections.abc import Callable, Sequence
from typing import Any
from weakref import WeakValueDictionary

import torch

_LIBRARY = torch.library.Library("mxmoe", "DEF")
_OBJECTS: WeakValueDictionary[int, Any] = WeakValueDictionary()
_numbers = itertools.count()


def register(owner: object) -> int:
    """The number under which operators find ``owner``; nothing else keeps it alive."""
    number = next(_numbers)
    _OBJECTS[number] = owner
    return number


def define(schema: str, run: Callable[..., torch.Tensor], tags: Sequence[torch.Tag] = ()) -> Any:
    """The operator ``mxmoe::schema``, hidden states first and a number last, to new hidden states of the same shape.

    It calls ``run`` with the object that has the number and the other arguments. It has no gradient.
    """
    name = schema.partition("(")[0]
    _LIBRARY.define(schema, tags=tuple(tags))

    def look_up(*arguments: Any) -> torch.Tensor:
        return run(_OBJECTS[arguments[-1]], *arguments[:-1])

    _LIBRARY.impl(name, look_up, "CompositeExplicitAutograd")
    torch.library.register_fake(f"mxmoe::{name}", lambda hidden, *_: torch.empty_like(hidden), lib=_LIBRARY)
    return getattr(torch.ops.mxmoe, name).default
