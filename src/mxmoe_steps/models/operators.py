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


def define(
    schema: str,
    run: Callable[..., torch.Tensor],
    tags: Sequence[torch.Tag] = (),
    find: Callable[[Any], Any] = _OBJECTS.__getitem__,
) -> Callable[..., torch.Tensor]:
    """A call of ``run`` with an object, tensors and the object's key, as the operator ``mxmoe::schema`` for graphs.

    The operator takes the tensors, hidden states first, and the key, a number or text by which ``find`` has the object;
    it makes hidden states of the same shape, and has no gradient. Outside of graphs ``run`` is called as it is:
    PyTorch's dispatcher costs a call tens of microseconds of the host.
    """
    name = schema.partition("(")[0]
    _LIBRARY.define(schema, tags=tuple(tags))
    _LIBRARY.impl(name, lambda *arguments: run(find(arguments[-1]), *arguments[:-1]), "CompositeExplicitAutograd")
    torch.library.register_fake(f"mxmoe::{name}", lambda hidden, *_: torch.empty_like(hidden), lib=_LIBRARY)
    operator = getattr(torch.ops.mxmoe, name).default

    def call(owner: object, *tensors: torch.Tensor | None, key: int | str) -> torch.Tensor:
        if torch.compiler.is_compiling():
            return operator(*tensors, key)
        return run(owner, *tensors)

    return call
