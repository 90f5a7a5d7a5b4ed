"""Whether a packed checkpoint is whole: the experts that ``config.json`` names and the headers of its files.

transformers warns of tensors that are missing and leaves memory as it finds it in their place. Here every tensor of
every block has to be in the files, in its shape and type.
"""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from mxmoe_steps.errors import UserError
from mxmoe_steps.models.adapters import Family
from mxmoe_steps.models.packed import PackedLinear
from mxmoe_steps.models.raw import FLOATING, RawTensor, tensors_of
from mxmoe_steps.schemes import SHARED

_FIX = "run the quantize step again"
_STORED = {torch.uint8: ("U8",), torch.bfloat16: ("BF16",)}  # of packed blocks; others are floating


def check_experts(model: Any, family: Family, blocks: Mapping[str, Mapping[str, Any]]) -> None:
    """`UserError` unless ``blocks`` names the MoE layers of ``model`` and their experts, each once."""
    place = f"{model.name_or_path}/config.json: quantization_config"
    layers = len(model.get_submodule(family.decoder).layers)
    for layer in range(layers):
        moe = model.get_submodule(family.moe_path(layer))
        experts = {str(expert) for expert in range(len(moe.experts.down_proj))} if hasattr(moe, "experts") else set()
        if experts and family.shared is not None:
            experts.add(str(SHARED))
        differing = experts ^ set(blocks.get(str(layer), ()))
        if differing:
            expert = min(differing, key=int)
            verb = "lacks" if expert in experts else "names"
            raise UserError(
                f"{place}: {verb} layer {layer}, expert {expert}, which the model"
                f" {'has' if expert in experts else 'does not have'}; {_FIX}"
            )
    unknown = sorted(set(blocks) - {str(layer) for layer in range(layers)}, key=int)
    if unknown:
        raise UserError(f"{place}: names layer {unknown[0]}, which the model does not have; {_FIX}")


def packed_blocks(model: Any, family: Family, layers: Iterable[int]) -> Iterator[tuple[int, int, str, str, Any]]:
    """(layer, expert, block, path, module) of every linear block of the expert modules."""
    for layer in layers:
        moe = model.get_submodule(family.moe_path(layer))
        experts = [(expert, f"experts.{expert}") for expert in range(len(moe.experts))]
        for expert, name in [*experts, *([(SHARED, family.shared)] if family.shared is not None else [])]:
            for block in family.own_blocks:
                path = f"{name}.{block}_proj"
                yield layer, expert, block, f"{family.moe_path(layer)}.{path}", moe.get_submodule(path)


def check_tensors(model: Any, family: Family, layers: Sequence[int], files: Sequence[str | Path]) -> dict[str, str]:
    """Name of every tensor of an expert block in ``model`` -> in ``files``.

    `UserError` unless the headers of these hold every one of them, and no other.
    """
    found: dict[str, RawTensor] = {}
    for file in files:
        found |= tensors_of(Path(file))
    prefix = family.prefix_of(found)
    stored_names = {family.own_name(name, prefix): name for name in found}
    folder = Path(files[0]).parent
    known: dict[str, str] = {}
    for layer, expert, block, path, module in packed_blocks(model, family, layers):
        for name, expected in module.state_dict().items():
            where = f"{folder}: layer {layer}, expert {expert}, {block}: {name}"
            stored_name = stored_names.get(f"{path}.{name}")
            if stored_name is None:
                raise UserError(f"{where} is missing, no tensor {path}.{name}; {_FIX}")
            stored = found[stored_name]
            dtypes = _STORED[expected.dtype] if isinstance(module, PackedLinear) and name != "bias" else FLOATING
            if stored.shape != tuple(expected.shape) or stored.dtype not in dtypes:
                raise UserError(
                    f"{where} is {stored.dtype} {list(stored.shape)} in {stored.file.name}, expected"
                    f" {' or '.join(dtypes)} {list(expected.shape)}; {_FIX}"
                )
            known[f"{path}.{name}"] = stored_name
    inner = "|".join(
        [r"experts\.(?:\d+\.|gate_up_proj|down_proj)", *([rf"{family.shared}\."] if family.shared else [])]
    )
    inside = re.compile("|".join(rf"{re.escape(family.moe_path(layer))}\.(?:{inner})" for layer in layers))
    for name in sorted(stored_names.keys() - known):
        if inside.match(name):
            file = found[stored_names[name]].file
            raise UserError(f"{file}: {name} belongs to no block of quantization_config; {_FIX}")
    return known
