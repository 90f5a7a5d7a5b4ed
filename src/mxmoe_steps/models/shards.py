"""How a packed checkpoint names its tensors, and its files."""

from collections.abc import Sequence
from pathlib import Path

from mxmoe_steps.atomic import write_json
from mxmoe_steps.models.description import INDEX
from mxmoe_steps.models.families import ModelFolder
from mxmoe_steps.models.raw import RawTensor, write_tensors
from mxmoe_steps.schemes import SHARED

_SHARD_BYTES = 4 << 30


def packed_name(folder: ModelFolder, layer: int, expert: int, block: str, part: str) -> str:
    """Name of a packed tensor in our checkpoints: the module path in transformers, for every family."""
    inner = folder.family.shared if expert == SHARED else f"experts.{expert}"
    return f"{folder.family.moe_path(layer)}.{inner}.{block}_proj.{part}"


def write_shards(tensors: Sequence[tuple[str, RawTensor]], out: Path) -> None:
    """``model.safetensors``, or numbered shards with an index when the weights exceed one shard."""
    shards: list[list[tuple[str, RawTensor]]] = [[]]
    size = 0
    for name, tensor in sorted(tensors, key=lambda item: item[0]):
        size += tensor.nbytes
        if shards[-1] and size > _SHARD_BYTES:
            shards.append([])
            size = tensor.nbytes
        shards[-1].append((name, tensor))
    if len(shards) == 1:
        write_tensors(out / "model.safetensors", shards[0])
        return
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        write_tensors(out / file, shard)
        weight_map |= {name: file for name, _ in shard}
    write_json(out / INDEX, {"metadata": {}, "weight_map": weight_map})
