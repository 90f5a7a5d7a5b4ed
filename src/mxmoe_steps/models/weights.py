"""Reading expert weights from a checkpoint, one layer at a time."""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from mxmoe_steps.errors import UserError
from mxmoe_steps.models.families import ModelFolder, Parameter
from mxmoe_steps.models.gating import Gating, gating_of
from mxmoe_steps.schemes import BLOCKS


@contextlib.contextmanager
def open_tensors(model: ModelFolder, names: Sequence[str]) -> Iterator[dict[str, Any]]:
    """The named tensors, unread (safetensors' ``get_slice``, or `Dequantized`); each file is opened once.

    `UserError` names a tensor that is missing, or a file that is missing, truncated or not safetensors.
    """
    files = model.files
    for name in names:
        if name not in files:
            raise UserError(f"tensor {name} is missing from the checkpoint {model.path}")
    tensors: dict[str, Any] = {
        name: model.raw(name) for name in names if model.stored_name(name) in model.stored.quantized
    }
    plain = [name for name in names if name not in tensors]
    with contextlib.ExitStack() as stack:
        opened = {}
        for file in sorted({files[name] for name in plain}):
            try:
                opened[file] = stack.enter_context(safe_open(file, "pt"))
            except (OSError, SafetensorError) as error:
                raise UserError(
                    f"{file}: missing, truncated or not a safetensors file ({error}); download it again"
                ) from error
        for name in plain:
            try:
                tensors[name] = opened[files[name]].get_slice(model.stored_name(name))
            except SafetensorError as error:
                raise UserError(
                    f"{files[name]}: holds no tensor {name}, which the checkpoint's index says it does"
                ) from error
        yield tensors


def read_block(
    model: ModelFolder,
    layer: int,
    experts: Sequence[int],
    block: str,
    device: torch.device | str = "cpu",
    parameter: Parameter = "weight",
) -> torch.Tensor:
    """Weights [E, N, K], or biases [E, N], on ``device``: the same block of several experts, stacked.

    In the checkpoint's precision. Raises `UserError` naming layer, expert and block where one is NaN or infinite.
    """
    places = [model.place(layer, expert, block, parameter) for expert in experts]
    with open_tensors(model, sorted({place.tensor for place in places})) as tensors:
        blocks = [place.read(tensors[place.tensor]) for place in places]
    if not all(tensor.is_floating_point() and tensor.element_size() > 1 for tensor in blocks):
        raise UserError(
            f"{model.path}: layer {layer}, {block}: the weights are stored as {blocks[0].dtype}, so they are quantized"
            " already; take a release in 16 or 32 bits"
        )
    stacked = torch.stack(blocks).to(device)
    for expert, place, finite in zip(experts, places, stacked.isfinite().flatten(1).all(1).tolist(), strict=True):
        if not finite:
            where = f"{model.files[place.tensor]}: layer {layer}, expert {expert}, {block}"
            raise UserError(f"{where}: the {'weights' if parameter == 'weight' else 'biases'} hold NaN or infinity")
    return stacked


def check_block_weights(model: ModelFolder, layer: int, block: str) -> None:
    """`UserError` of `read_block` for the first expert of a layer whose weights are NaN or infinite."""
    for expert in model.expert_ids():
        read_block(model, layer, [expert], block)


def read_gating(model: ModelFolder, layer: int, experts: Sequence[int], device: torch.device | str = "cpu") -> Gating:
    """Gating of a stack of experts, with their biases in float32 where the family has them."""
    gating = gating_of(model.family, model.text)
    if not model.family.biased:
        return gating
    gate, up = (read_block(model, layer, experts, block, device, "bias").float() for block in BLOCKS[:2])
    return replace(gating, biases=(gate, up))
