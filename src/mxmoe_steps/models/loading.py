"""Loading a whole model with transformers, and hooks that see its experts at work."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mxmoe_steps.errors import UserError
from mxmoe_steps.models.families import ModelFolder, moe_path, open_model

Routing = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def load_model(path: Path, dtype: str, device: str, trust_remote_code: bool = False) -> tuple[ModelFolder, Any]:
    """The checkpoint's folder facts and its causal LM in evaluation mode without gradients.

    Raises `UserError` for weights that are NaN or infinite, before any of them is used.
    """
    from transformers import AutoModelForCausalLM
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    folder = open_model(path)
    model: Any = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, trust_remote_code=trust_remote_code)
    _check_finite(path, model)
    return folder, model.to(resolve_device(device)).eval().requires_grad_(False)


def _check_finite(path: Path, model: nn.Module) -> None:
    """`UserError` names the first parameter (and the expert of a stacked one) with NaN or infinity."""
    for name, parameter in model.named_parameters():
        finite = parameter.isfinite()
        if not finite.all():
            bad = (~finite.flatten(1).all(1)).nonzero().flatten().tolist() if parameter.dim() == 3 else []
            where = f", expert {bad[0]}" if bad else ""
            raise UserError(f"{path}: {name}{where}: the weights hold NaN or infinity; download the checkpoint again")


def load_tokenizer(path: Path, trust_remote_code: bool = False) -> Any:
    """The checkpoint's tokenizer."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: no tokenizer that transformers can load ({error})") from error


def resolve_device(device: str) -> torch.device:
    """``auto`` is the first GPU where there is one; asking for a GPU that is not there is an error."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise UserError(f"runtime.device is {device!r} but PyTorch sees no CUDA GPU; set runtime.device to cpu or auto")
    return torch.device(device)


def moe_module(folder: ModelFolder, model: nn.Module, layer: int) -> nn.Module:
    """The MoE module (router, experts, shared expert) of a decoder layer."""
    return model.get_submodule(moe_path(layer))


@contextmanager
def expert_hooks(folder: ModelFolder, model: nn.Module, seen: Callable[[int, Routing], None]) -> Iterator[None]:
    """Call ``seen(layer, (hidden [T, H], expert ids [T, k], router weights [T, k]))`` on every forward.

    Hooks sit on the experts module, whose call is the same in every transformers family; routers
    differ.
    """
    handles = []
    for layer in folder.moe_layers:

        def hook(_module: nn.Module, args: tuple[Any, ...], layer: int = layer) -> None:
            hidden, ids, weights = args
            seen(layer, (hidden, ids, weights))

        experts = moe_module(folder, model, layer).get_submodule("experts")
        handles.append(experts.register_forward_pre_hook(hook))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def shared_weights(folder: ModelFolder, model: nn.Module, layer: int, hidden: torch.Tensor) -> torch.Tensor:
    """[T] factor of the shared expert's output for ``hidden`` [T, H]: its sigmoid gate, or ones."""
    gate = folder.family.shared_gate
    if gate is None:
        return torch.ones(hidden.shape[0], dtype=hidden.dtype, device=hidden.device)
    return torch.sigmoid(moe_module(folder, model, layer).get_submodule(gate)(hidden)).squeeze(-1)
