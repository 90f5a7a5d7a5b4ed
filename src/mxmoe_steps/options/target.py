"""The option that names a class of GPUs."""

from typing import Annotated

from pydantic import AfterValidator

from mxmoe_steps.kernels.architectures import ARCHITECTURES, for_target
from mxmoe_steps.options.base import Flag


def _known_target(text: str) -> str:
    """A class of GPUs that there are kernels for."""
    if for_target(text) is None:
        known = ", ".join(f"{one.target} ({one.gpus})" for one in ARCHITECTURES)
        raise ValueError(f"no kernels for {text}; there are some for {known}")
    return text


Target = Annotated[str, AfterValidator(_known_target), Flag("TARGET")]
