"""quantize: a packed checkpoint for one allocation.

Takes every block's quantized weights from what `calibrate` stored for the scheme that the allocation
names, and everything else from the original checkpoint. Writes a folder that
`mxmoe_steps.load_quantized` and, after ``import mxmoe_steps``, ``AutoModelForCausalLM.from_pretrained`` read.
Nothing compiled is inside, and no code but, with --trust-remote-code, the Python files that come with the model.
"""

import shutil
import sys
from collections.abc import Iterator
from itertools import islice
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
from mxmoe_steps.schemes import BLOCKS, parse_scheme

if TYPE_CHECKING:
    from mxmoe_steps.models.families import ModelFolder
    from mxmoe_steps.models.raw import RawTensor


class QuantizeOptions(OfModel, RemoteCode, StepOptions):
    """Options of the step."""

    allocation: InFile = Field(description="allocation.json that solve wrote")
    packed: InFolder = Field(description="folder of one quantizer that calibrate wrote")
    out: OutFolder = Field(description="checkpoint folder to write")


_LARGEST = 3  # kinds of tensors that are not experts, in the log

Assignment = dict[tuple[int, int], tuple[str, str, str]]


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
) -> "tuple[dict[str, RawTensor], list[tuple[str, RawTensor]]]":
    """What the new checkpoint takes over as it is, and (name, tensor) of its expert blocks."""
    from mxmoe_steps.models.shards import packed_name
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
    return original, replaced


def quantize(options: QuantizeOptions) -> None:
    """Write the checkpoint of one allocation; the folder appears when it is complete."""
    from mxmoe_steps.allocation.files import read_allocation
    from mxmoe_steps.models.families import EXPERTS_IMPLEMENTATION, open_model, resolve_model
    from mxmoe_steps.models.identity import fingerprint
    from mxmoe_steps.models.inventory import by_kind, left_out, published
    from mxmoe_steps.models.shards import write_shards

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
    others, experts = checkpoint_tensors(folder, assignment, options.packed, allocation["quantizer"], model)
    out = options.out
    with atomic_folder(out) as partial:
        write_shards([*others.items(), *experts], partial)
        packed_config = {
            "dtype": folder.dtype,  # where config.json names none, that of packed tensors would be taken for it
            "experts_implementation": EXPERTS_IMPLEMENTATION,
            "quantization_config": quantization_config(assignment, allocation["quantizer"]),
        }
        config = folder.config | packed_config
        if "quantization_config" in (inner := config.get("text_config") or {}):
            config["text_config"] = {key: value for key, value in inner.items() if key != "quantization_config"}
        if not options.trust_remote_code:
            config.pop("auto_map", None)  # it names code that is not in the new folder, and that nothing was run with
        write_json(partial / "config.json", config)
        for file in folder.copied_files(options.trust_remote_code):
            (partial / file.relative_to(folder.path)).parent.mkdir(exist_ok=True)
            shutil.copyfile(file, partial / file.relative_to(folder.path))
        manifest = {
            "allocation": {key: value for key, value in allocation.items() if key != "assignment"},
            "weights_bytes": sum(file.stat().st_size for file in partial.glob("*.safetensors")),
            "other_bytes": sum(tensor.nbytes for tensor in others.values()),
            "others": by_kind(others, folder.layers),
            "published": published(folder),
            "left_out": left_out(folder, options.trust_remote_code),
        }
        write_json(partial / "mxmoe.json", manifest)
    print("\n".join([f"quantize: {line}" for line in summary(manifest, out)]), file=sys.stderr)


def summary(manifest: dict[str, Any], out: Path) -> Iterator[str]:
    """What the log says of a new checkpoint: its size, what of it is not experts, and what is not in it."""
    size, others, original = manifest["weights_bytes"], manifest["other_bytes"], manifest["published"]
    largest = ", ".join(f"{kind} {amount / 1e6:.2f}" for kind, amount in islice(manifest["others"].items(), _LARGEST))
    yield f"{size / 1e6:.2f} MB of weights in {out}, {others / 1e6:.2f} MB of them not experts ({largest})"
    shares = f"{size / original['bytes_16_bit']:.1%} of 16 bits"
    if original["formats"]:
        shares += (
            f", {size / original['bytes']:.1%} of the published {', '.join(original['formats'])}"
            f" ({original['expert_bits']:.2f} bits an expert weight)"
        )
    yield f"that is {shares}"
    for one in manifest["left_out"]:
        yield f"left out: {one['name']} ({one['count']}): {one['why']}"


def main() -> None:
    """Command line."""
    options = parse(QuantizeOptions, __doc__)
    with recorded(options.made_from, [options.out]):
        quantize(options)


if __name__ == "__main__":
    run_cli(main)
