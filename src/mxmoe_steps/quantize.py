"""quantize: a packed checkpoint for one allocation.

Takes every block's quantized weights from what `calibrate` stored for the scheme that the allocation
names, and everything else from the original checkpoint. Writes a folder that
`mxmoe_steps.load_quantized` and, after ``import mxmoe_steps``, ``AutoModelForCausalLM.from_pretrained`` read.
Nothing compiled is inside, and no code but, with --trust-remote-code, the Python files that come with the model.
"""

import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field

from mxmoe_steps.atomic import atomic_folder, write_json
from mxmoe_steps.errors import UserError, run_cli
from mxmoe_steps.made_from import recorded
from mxmoe_steps.options.base import InFile, InFolder, OutFolder, StepOptions
from mxmoe_steps.options.command_line import parse
from mxmoe_steps.options.shared import OfModel, RemoteCode
from mxmoe_steps.quantizers.names import is_rotated
from mxmoe_steps.schemes import BLOCKS, SHARED, parse_scheme

if TYPE_CHECKING:
    from mxmoe_steps.models.families import ModelFolder
    from mxmoe_steps.models.raw import RawTensor


class QuantizeOptions(OfModel, RemoteCode, StepOptions):
    """Options of the step."""

    allocation: InFile = Field(description="allocation.json that solve wrote")
    packed: InFolder = Field(description="folder of one quantizer that calibrate wrote")
    out: OutFolder = Field(description="checkpoint folder to write")


_SHARD_BYTES = 4 << 30

Assignment = dict[tuple[int, int], tuple[str, str, str]]


def packed_name(folder: "ModelFolder", layer: int, expert: int, block: str, part: str) -> str:
    """Name of a packed tensor in our checkpoints: the module path in transformers, for every family."""
    inner = folder.family.shared if expert == SHARED else f"experts.{expert}"
    return f"{folder.family.moe_path(layer)}.{inner}.{block}_proj.{part}"


def quantization_config(assignment: Assignment, quantizer: str) -> dict[str, Any]:
    """The ``quantization_config`` entry of ``config.json``; see `mxmoe_steps.models.quantizer`."""
    schemes = sorted({scheme for blocks in assignment.values() for scheme in blocks})
    blocks: dict[str, dict[str, list[int]]] = {}
    for (layer, expert), names in sorted(assignment.items()):
        blocks.setdefault(str(layer), {})[str(expert)] = [schemes.index(name) for name in names]
    rotation = {"rotation": "hadamard"} if is_rotated(quantizer) else {}
    return {"quant_method": "mxmoe", "version": 1, "schemes": schemes, "blocks": blocks, **rotation}


def checkpoint_tensors(
    folder: "ModelFolder", assignment: Assignment, packed: Path, quantizer: str, model: str
) -> "list[tuple[str, RawTensor]]":
    """(name, `RawTensor`) of the whole new checkpoint."""
    from mxmoe_steps.models.store import PackedStore

    stores: dict[str, PackedStore] = {}
    original = {name: folder.raw(name) for name in folder.files}
    replaced: list[tuple[str, RawTensor]] = []
    for (layer, expert), schemes in assignment.items():
        for block, scheme in zip(BLOCKS, schemes, strict=True):
            if block not in folder.family.own_blocks:
                continue
            original.pop(folder.place(layer, expert, block).tensor, None)  # one of all experts goes with the first
            if folder.family.biased:
                original.pop(folder.place(layer, expert, block, "bias").tensor, None)
                bias = folder.raw_block(layer, expert, block, "bias")
                replaced.append((packed_name(folder, layer, expert, block, "bias"), bias))
            if scheme == "w16a16":
                weight = folder.raw_block(layer, expert, block)
                replaced.append((packed_name(folder, layer, expert, block, "weight"), weight))
                continue
            if scheme not in stores:
                stores[scheme] = PackedStore(packed, parse_scheme(scheme), quantizer, model)
            rows, columns = folder.raw_block(layer, expert, block).shape
            for part, tensor in stores[scheme].block(layer, expert, block, (rows, columns)).items():
                replaced.append((packed_name(folder, layer, expert, block, part), tensor))
    return [*original.items(), *replaced]


def write_shards(tensors: "list[tuple[str, RawTensor]]", out: Path) -> None:
    """``model.safetensors``, or numbered shards with an index when the weights exceed one shard."""
    from mxmoe_steps.models.raw import write_tensors

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
    write_json(out / "model.safetensors.index.json", {"metadata": {}, "weight_map": weight_map})


def quantize(options: QuantizeOptions) -> None:
    """Write the checkpoint of one allocation; the folder appears when it is complete."""
    from mxmoe_steps.allocation.files import read_allocation
    from mxmoe_steps.models.families import EXPERTS_IMPLEMENTATION, open_model, resolve_model
    from mxmoe_steps.models.identity import fingerprint

    folder = open_model(resolve_model(options.model, code=options.trust_remote_code))
    allocation = read_allocation(options.allocation)
    assignment = {(layer, expert): tuple(schemes) for layer, expert, *schemes in allocation["assignment"]}
    expected = {(layer, expert) for layer in folder.moe_layers for expert in folder.expert_ids()}
    if set(assignment) != expected:
        layer, expert = min(set(assignment) ^ expected)
        raise UserError(
            f"{options.allocation}: layer {layer}, expert {expert} is not in both the allocation and {options.model};"
            " solve again for this model"
        )
    model = fingerprint(folder)
    if allocation["model"] != model:
        raise UserError(
            f"{options.allocation}: was solved for another model than {options.model}; solve again for this one"
        )
    tensors = checkpoint_tensors(folder, assignment, options.packed, allocation["quantizer"], model)
    out = options.out
    with atomic_folder(out) as partial:
        write_shards(tensors, partial)
        packed_config = {
            "dtype": folder.dtype,  # where config.json names none, that of packed tensors would be taken for it
            "experts_implementation": EXPERTS_IMPLEMENTATION,
            "quantization_config": quantization_config(assignment, allocation["quantizer"]),
        }
        config = folder.config | packed_config
        if not options.trust_remote_code:
            config.pop("auto_map", None)  # it names code that is not in the new folder, and that nothing was run with
        write_json(partial / "config.json", config)
        for file in folder.copied_files(options.trust_remote_code):
            (partial / file.relative_to(folder.path)).parent.mkdir(exist_ok=True)
            shutil.copyfile(file, partial / file.relative_to(folder.path))
        summary = {key: value for key, value in allocation.items() if key != "assignment"}
        weights_bytes = sum(file.stat().st_size for file in partial.glob("*.safetensors"))
        write_json(partial / "mxmoe.json", {"allocation": summary, "weights_bytes": weights_bytes})
    print(f"quantize: {weights_bytes / 1e6:.2f} MB of weights in {out}", file=sys.stderr)


def main() -> None:
    """Command line."""
    options = parse(QuantizeOptions, __doc__)
    with recorded(options.made_from, [options.out]):
        quantize(options)


if __name__ == "__main__":
    run_cli(main)
