"""What a checkpoint folder says of itself: ``config.json`` and the index of its weights, checked. No PyTorch."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mxmoe_steps.errors import UserError
from mxmoe_steps.models.sources.format import FIX
from mxmoe_steps.models.sources.formats import source_formats

INDEX = "model.safetensors.index.json"
EXPERT_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")  # depends on the family
_SIZES = ("num_hidden_layers", "hidden_size", "vocab_size", "num_experts_per_tok", "max_position_embeddings")
_QUANTIZER_FILES = ("hf_quant_config.json", "quantize_config.json", "quant_config.json")  # ModelOpt, GPTQ, AWQ


def read_object(file: Path) -> dict[str, Any]:
    """A JSON object; `UserError` names the file that holds none."""
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{file}: not readable as JSON ({error}); download it again") from error
    if not isinstance(value, dict):
        raise UserError(f"{file}: must hold a JSON object, found {type(value).__name__}; download it again")
    return value


def read_config(folder: Path) -> dict[str, Any]:
    """``config.json`` of a model folder; `UserError` when either is missing."""
    if not folder.is_dir():
        raise UserError(f"model folder {folder} does not exist; set model.path to a local folder or a hub id")
    file = folder / "config.json"
    if not file.is_file():
        raise UserError(f"{folder}: no config.json; set model.path to a transformers checkpoint folder")
    return read_object(file)


def read_index(folder: Path) -> dict[str, str]:
    """Tensor name -> safetensors file inside the folder, from the index of a checkpoint in shards."""
    index = folder / INDEX
    if not index.is_file():
        raise UserError(f"{folder}: holds neither model.safetensors nor {INDEX}")
    weight_map = read_object(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError(f"{index}: weight_map must be an object that names a file for every tensor; download it again")
    for file in weight_map.values():
        inside = isinstance(file, str) and not Path(file).is_absolute() and ".." not in Path(file).parts
        if not inside or not file.endswith(".safetensors"):
            raise UserError(f"{index}: weight_map names {file!r}, which is no safetensors file inside the folder")
    return weight_map


def stated_quantization(config: Mapping[str, Any]) -> Any:
    """What a ``config.json`` says of how weights are quantized, itself or for the language model inside; or None."""
    inner = config.get("text_config")
    return config.get("quantization_config", inner.get("quantization_config") if isinstance(inner, dict) else None)


def check_precision(folder: Path, config: Mapping[str, Any]) -> None:
    """`UserError` for weights that something says are quantized in a format that is not read."""
    for name in _QUANTIZER_FILES:
        if (folder / name).is_file():
            raise UserError(
                f"{folder / name}: the weights are quantized already, says this file; {FIX}, or remove the file if the"
                " weights are that"
            )
    for key in ("quantization_config", "compression_config"):
        stated = stated_quantization(config) if key == "quantization_config" else config.get(key)
        if stated is None:
            continue
        method = stated.get("quant_method") if isinstance(stated, dict) else None
        if not isinstance(method, str):
            raise UserError(
                f"{folder}/config.json: {key} names no quant_method, so what the weights mean is not known; {FIX}, or"
                " remove the key if the weights are that"
            )
        if method == "mxmoe" and key == "quantization_config":
            if not isinstance(stated.get("blocks"), dict) or not stated["blocks"]:
                raise UserError(f"{folder}/config.json: {key} lists no blocks; run the quantize step again")
            continue
        if key == "compression_config":
            raise UserError(f"{folder}/config.json: the weights are quantized already ({method}), says {key}; {FIX}")
        source_formats(stated, folder / "config.json")


def layer_count(config: Mapping[str, Any]) -> int:
    """Decoder layers of a ``config.json`` that `check_sizes` has seen: their number, or that of their listed types."""
    return int(config["num_hidden_layers"] if "num_hidden_layers" in config else len(config["layers_block_type"]))


def check_sizes(folder: Path, config: Mapping[str, Any]) -> None:
    """`UserError` for a number of layers, experts or features that is missing or no number."""
    experts = [key for key in EXPERT_COUNTS if key in config]
    if not experts:
        raise UserError(
            f"{folder}/config.json: none of the keys {', '.join(EXPERT_COUNTS)} says how many experts there are"
        )
    if "num_hidden_layers" not in config and not isinstance(config.get("layers_block_type"), list):
        raise UserError(f"{folder}/config.json: num_hidden_layers is missing; download the file again")
    for key in (*_SIZES, *experts):
        value = config.get(key, 1)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise UserError(f"{folder}/config.json: {key} must be a positive whole number, found {value!r}")
    if config.get("num_experts_per_tok", 1) > config[experts[0]]:
        raise UserError(
            f"{folder}/config.json: num_experts_per_tok is {config['num_experts_per_tok']}, but there are only"
            f" {config[experts[0]]} experts"
        )
