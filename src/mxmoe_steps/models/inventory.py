"""What a checkpoint holds beside experts, how large its publisher made it, and what no packed checkpoint takes over.

Every stored tensor is in a packed checkpoint, as a packed block or as it is, or it is listed in `left_out`.
"""

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from math import prod
from pathlib import Path
from typing import Any

from mxmoe_steps.models.description import INDEX
from mxmoe_steps.models.families import ModelFolder, Parameter
from mxmoe_steps.models.hub import name_and_commit
from mxmoe_steps.models.raw import FLOATS, RawTensor, tensors_of
from mxmoe_steps.schemes import BLOCKS

_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".onnx", ".h5", ".msgpack", ".ckpt", ".index.json")
_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")


def expert_tensors(folder: ModelFolder) -> set[str]:
    """Names of the weights and biases of expert blocks."""
    parameters: tuple[Parameter, ...] = ("weight", "bias") if folder.family.biased else ("weight",)
    return {
        folder.place(layer, expert, block, parameter).tensor
        for layer in folder.moe_layers
        for expert in folder.expert_ids()
        for block in BLOCKS
        for parameter in parameters
    }


def published(folder: ModelFolder) -> dict[str, Any]:
    """What is known of an original: name and commit on the hub, source formats, sizes.

    ``bytes`` are those of its files, ``bytes_16_bit`` those of its tensors with every number of a floating type in 16
    bits, ``expert_bits`` what is stored for a weight of an expert block on average.
    """
    name, commit = name_and_commit(folder.path)
    experts = {folder.stored_name(name) for name in expert_tensors(folder)}
    all_bytes, expert_bits, expert_weights = 0, 0, 0
    for tensor in folder.files:
        raw, stored = folder.raw(tensor), folder.stored_name(tensor)
        all_bytes += 2 * prod(raw.shape) if raw.dtype in FLOATS else raw.nbytes
        if stored in experts and not tensor.endswith("bias"):
            expert_bits += 8 * folder.stored.nbytes(stored)
            expert_weights += prod(raw.shape)
    return {
        "name": name,
        "commit": commit,
        "formats": sorted({source.name for source, _ in folder.stored.quantized.values()}),
        "bytes": sum(file.stat().st_size for file in set(folder.stored.listed.values())),
        "bytes_16_bit": all_bytes,
        "expert_bits": expert_bits / expert_weights,
    }


def other_bytes(folder: ModelFolder) -> int:
    """Bytes of an original's files that are stored for other tensors than expert blocks."""
    experts = {folder.stored_name(name) for name in expert_tensors(folder)}
    others = (folder.stored_name(name) for name in folder.files)
    return sum(folder.stored.nbytes(name) for name in others if name not in experts)


def by_kind(tensors: Mapping[str, RawTensor], layers: int) -> dict[str, int]:
    """Kind of tensor -> bytes, the largest first: modules of the ``layers`` that run, and every other one whole."""
    sizes: Counter[str] = Counter()
    for name, tensor in tensors.items():
        match re.match(r"(.*\blayers)\.(\d+)\.(\w+)", name):
            case re.Match() as found if int(found[2]) < layers:
                kind = f"{found[1]}.*.{found[3]}"
            case re.Match() as found:
                kind = f"{found[1]}.{found[2]}"
            case _:
                kind = ".".join(name.split(".")[:2])
        sizes[kind] += tensor.nbytes
    return dict(sizes.most_common())


def left_out(folder: ModelFolder, code: bool) -> list[dict[str, Any]]:
    """Tensors and files of an original that a packed checkpoint does not hold: ``name``, ``count`` and ``why``.

    A `*` stands for the numbers of layers and experts. ``code``: whether Python files are taken over.
    """
    found = dict(folder.stored.consumed)
    for file in set(folder.stored.listed.values()):
        unnamed = tensors_of(file).keys() - folder.stored.listed.keys()
        found |= dict.fromkeys(unnamed, f"tensors of {file.name} that the index does not name")
    counts = Counter((_NUMBER.sub("*", name), why) for name, why in found.items())
    counts.update(_files_left_out(folder, code))
    return [{"name": name, "count": count, "why": why} for (name, why), count in sorted(counts.items())]


def _files_left_out(folder: ModelFolder, code: bool) -> Iterable[tuple[str, str]]:
    """(name, why) of files; those of a subfolder count as one name."""
    taken = {
        *folder.copied_files(code),
        *folder.stored.listed.values(),
        folder.path / "config.json",
        folder.path / INDEX,
    }
    for file in folder.path.rglob("*"):
        inner = file.relative_to(folder.path)
        if file in taken or not file.is_file() or inner.parts[0].startswith("."):
            continue
        if len(inner.parts) == 1:
            yield inner.name, _why(inner)
        else:
            yield f"{inner.parts[0]}/*", "a folder that transformers does not read"


def _why(file: Path) -> str:
    if file.suffix == ".py":
        return "code that comes with the model, which model.trust_remote_code takes over"
    if file.name.endswith(_WEIGHTS):
        return "weights that transformers does not read"
    return "says nothing that loading or using the model needs"
