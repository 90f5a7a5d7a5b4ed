"""The tokenizer of a checkpoint, its model without weights, the device to compute on, and PyTorch's settings."""

from pathlib import Path
from typing import Any

import torch

from mxmoe_steps.errors import UserError
from mxmoe_steps.models.families import ModelFolder
from mxmoe_steps.options.shared import Compute


def load_tokenizer(path: Path, trust_remote_code: bool = False) -> Any:
    """The checkpoint's tokenizer."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
        tokenizer("a")  # an odd value may show here only
        return tokenizer
    except Exception as error:  # whatever a broken file leads to inside transformers and tokenizers
        raise UserError(
            f"{path}: no tokenizer that transformers can load ({type(error).__name__}: {error}); copy tokenizer.json,"
            " tokenizer_config.json and whatever else belongs to it from the original model"
        ) from error


def auto_class(folder: ModelFolder) -> Any:
    """Which of transformers' classes loads the checkpoint: with its vision model where there is one."""
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    return AutoModelForImageTextToText if folder.family.is_wrapper else AutoModelForCausalLM


def empty_model(folder: ModelFolder, dtype: str, trust_remote_code: bool = False) -> Any:
    """The model that ``config.json`` describes, without weights (meta device); `UserError` if it describes none."""
    from transformers import AutoConfig

    precision = getattr(torch, dtype, None)
    if not isinstance(precision, torch.dtype) or not precision.is_floating_point:
        raise UserError(f"{folder.path}/config.json: dtype {dtype!r} is no floating type; set model.dtype")
    try:
        config = AutoConfig.from_pretrained(folder.path, trust_remote_code=trust_remote_code)
        with torch.device("meta"):
            return auto_class(folder).from_config(config, dtype=precision, trust_remote_code=trust_remote_code)
    except Exception as error:  # whatever a wrong value leads to inside transformers
        raise UserError(f"{folder.path}/config.json: transformers builds no model from it: {error}") from error


def resolve_device(device: str) -> torch.device:
    """``auto`` is the first GPU where there is one; asking for a GPU that is not there is an error."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise UserError(f"runtime.device is {device!r} but PyTorch sees no CUDA GPU; set runtime.device to cpu or auto")
    found = torch.device(device)
    if found.type == "cuda" and (found.index or 0) >= torch.cuda.device_count():
        raise UserError(
            f"runtime.device is {device!r} but PyTorch sees {torch.cuda.device_count()} GPUs; they count from cuda:0"
        )
    return found


def start_torch(options: Compute) -> None:
    """Fix what decides the bytes of a result: thread count, seed, deterministic kernels."""
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.backends.cuda.matmul.allow_tf32 = False
