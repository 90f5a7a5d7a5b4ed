"""How quantizers are named: ``rtn``, ``gptq`` or that of a user's class, and ``+hadamard`` after it."""

from typing import Annotated

from pydantic import Field

from mxmoe_steps.registry import NAME

DAMPING = 0.01  # fraction of its mean diagonal that is added to a Hessian
ROTATED = "+hadamard"
QuantizerName = Annotated[str, Field(pattern=rf"^{NAME}(\+hadamard)?$")]


def is_rotated(name: str) -> bool:
    """Whether weights and activations are rotated before they are quantized (`hadamard.rotate`)."""
    return name.endswith(ROTATED)
