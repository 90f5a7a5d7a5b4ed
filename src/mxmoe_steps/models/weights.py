"""Reading expert weights from a checkpoint, one layer at a time."""

import contextlib
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from safetensors import safe_open

from mxmoe_steps.errors import UserError
from mxmoe_steps.models.families import ModelFolder


def read_tensors(files: dict[str, Path], names: Sequence[str]) -> dict[str, torch.Tensor]:
    """The named tensors; each file is opened once. `UserError` names a tensor that is missing."""
    for name in names:
        if name not in files:
            raise UserError(f"tensor {name} is missing from the checkpoint {next(iter(files.values())).parent}")
    tensors = {}
    with contextlib.ExitStack() as stack:
        opened = {file: stack.enter_context(safe_open(file, "pt")) for file in sorted({files[name] for name in names})}
        for name in names:
            tensors[name] = opened[files[name]].get_tensor(name)
    return tensors


def read_block(model: ModelFolder, layer: int, experts: Sequence[int], block: str) -> torch.Tensor:
    """float32 [E, N, K]: the same block of several experts, stacked.

    Raises `UserError` naming layer, expert and block where a weight is NaN or infinite.
    """
    names = [model.block_name(layer, expert, block) for expert in experts]
    tensors = read_tensors(model.files, names)
    for expert, name in zip(experts, names, strict=True):
        if not tensors[name].isfinite().all():
            raise UserError(
                f"{model.files[name]}: layer {layer}, expert {expert}, {block}: the weights hold NaN or infinity"
            )
    return torch.stack([tensors[name].float() for name in names])


_ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "silu": torch.nn.functional.silu,
    "swish": torch.nn.functional.silu,
    "gelu": torch.nn.functional.gelu,
    "gelu_pytorch_tanh": lambda x: torch.nn.functional.gelu(x, approximate="tanh"),
    "relu": torch.nn.functional.relu,
}


def activation_function(model: ModelFolder) -> Callable[[torch.Tensor], torch.Tensor]:
    """What stands between gate and down; spelled out here because importing transformers takes seconds."""
    function = _ACTIVATIONS.get(model.activation)
    if function is None:
        known = ", ".join(_ACTIVATIONS)
        raise UserError(f"{model.path}/config.json: hidden_act {model.activation!r} is not supported; known: {known}")
    return function
