"""Whether a checkpoint is what its model class expects, told from the headers of its files alone.

A tensor that is missing, misshapen or of a type that says nothing by itself, and one beside the weights that changes
their meaning, such as the scales of fp8 or int8, are errors before anything is computed.
"""

import copy
import re
from collections.abc import Iterable
from typing import Any

from mxmoe_steps.errors import UserError
from mxmoe_steps.models.families import ModelFolder
from mxmoe_steps.models.headers import Header
from mxmoe_steps.models.raw import FLOATS, RawTensor

_MEANING = re.compile(r"scale|zero|quant|absmax|g_idx|blocks", re.IGNORECASE)  # in names of what decodes weights
_NAMED = 3  # names in a message


def audit(folder: ModelFolder, model: Any, conversions: Any, quantizer: Any) -> dict[str, str]:
    """Tensors of the checkpoint that ``model``, a causal LM without weights, is made of -> their parameter in it.

    `UserError` where they do not fit. ``conversions`` and ``quantizer`` are what transformers would load it with; the
    quantizer has compared its packed blocks by itself.
    """
    raw = {name: folder.raw(name) for name in folder.files}
    renamed = _renamed(model, raw, conversions)
    expected = set(model.state_dict())
    used = [name for name in raw if renamed[name][0] in expected]
    if not folder.is_packed:
        _check_blocks(folder, raw)
        for name in used:
            if raw[name].dtype not in FLOATS:
                raise UserError(
                    f"{raw[name].file}: {name} is stored as {raw[name].dtype}: the weights are quantized already; take"
                    f" a release in one of {', '.join(FLOATS.values())}"
                )
    _check_complete(folder, model, {parameter for name in used for parameter in renamed[name]})
    _check_company(folder, used, set(raw) - set(used))
    others = [name for name in used if quantizer is None or renamed[name][0] not in quantizer.packed_names]
    _check_shapes(folder, model, {name: Header(raw[name]) for name in others}, conversions, quantizer)
    return {name: renamed[name][0] for name in used}


def _renamed(model: Any, names: Iterable[str], conversions: Any) -> dict[str, list[str]]:
    """Checkpoint name -> the parameters that transformers makes of it, or the one of which it becomes a part."""
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    mapping = copy.deepcopy(conversions or [])
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    state = model.state_dict()
    found = {}
    for name in sorted(names):  # as transformers does: some of its renamings depend on names before
        first, pattern = rename_source_key(name, renamings, converters, model.base_model_prefix, state)
        targets = next((one.target_patterns for one in converters if pattern in one.source_patterns), [""])
        found[name] = [first.replace(targets[0], target, 1) for target in targets]
    return found


def _check_blocks(folder: ModelFolder, raw: dict[str, RawTensor]) -> None:
    """Every block of every expert: a layer of which some are missing would be read as one of fewer experts."""
    for layer in folder.moe_layers:
        for expert in folder.expert_ids():
            for block in folder.family.own_blocks:
                if (name := folder.place(layer, expert, block).tensor) not in raw:
                    raise UserError(
                        f"{folder.path}: the checkpoint holds no weights for layer {layer}, expert {expert}, {block}"
                        f" ({name}); download it again"
                    )


def _check_complete(folder: ModelFolder, model: Any, found: set[str]) -> None:
    tied = {target for target, source in model.all_tied_weights_keys.items() if source in found}
    missing = sorted(set(model.state_dict()) - found - tied)
    if missing:
        head = missing == [f"{folder.family.head}.weight"]
        advice = "set tie_word_embeddings in config.json if the head is the embedding" if head else "download it again"
        raise UserError(f"{folder.path}: the checkpoint holds no weights for {_some(missing)}; {advice}")


def _check_company(folder: ModelFolder, used: list[str], others: set[str]) -> None:
    """Tensors that the model class does not know are harmless unless they belong to a weight that it does."""
    stems = {name.removesuffix(".weight") for name in used}
    for name in sorted(others):
        for cut in (at.start() for at in re.finditer(r"[._]", name)):
            if name[:cut] in stems and (name[cut] == "." or _MEANING.search(name[cut:])):
                raise UserError(
                    f"{folder.files[name]}: {name} belongs to the weights {name[:cut]} and the model class does not"
                    " know it: they are quantized or altered, and mean something else without it; take a release in"
                    " 16 or 32 bits"
                )


def _check_shapes(
    folder: ModelFolder, model: Any, headers: dict[str, Header], conversions: Any, quantizer: Any
) -> None:
    from transformers.core_model_loading import convert_and_load_state_dict_in_model
    from transformers.modeling_utils import LoadStateDictConfig

    loading = LoadStateDictConfig(
        device_map={"": "meta"}, hf_quantizer=quantizer, weight_mapping=copy.deepcopy(conversions)
    )
    info, _ = convert_and_load_state_dict_in_model(model, headers, loading)
    for name, found, expected in sorted(info.mismatched_keys):
        raise UserError(
            f"{folder.path}: {name} is {list(found)} in the checkpoint, which does not fit what config.json describes:"
            f" {list(expected)}"
        )
    for name in (*info.conversion_errors, *info.error_msgs):
        raise UserError(f"{folder.path}: the tensors of {name} do not fit what config.json describes")


def _some(names: list[str]) -> str:
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(names[:_NAMED]) + more
