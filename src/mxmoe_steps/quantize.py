"""quantize: a packed checkpoint for one allocation.

Takes every block's quantized weights from what `calibrate` stored for the scheme that the allocation
names, and everything else from the original checkpoint. Writes a folder that
`mxmoe_steps.load_quantized` and, after that import, ``AutoModelForCausalLM.from_pretrained`` read.
Nothing compiled and no code is inside.
"""

import argparse
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mxmoe_steps.arguments import parser_for
from mxmoe_steps.atomic import atomic_path, write_json
from mxmoe_steps.errors import UserError, run_cli
from mxmoe_steps.schemes import BLOCKS, SHARED

_SHARD_BYTES = 4 << 30
_COPIED = ("generation_config.json", "tokenizer*", "special_tokens_map.json", "vocab.*", "merges.txt", "chat_template*")

Assignment = dict[tuple[int, int], tuple[str, str, str]]


def packed_name(folder: Any, layer: int, expert: int, block: str, part: str) -> str:
    """Name of a packed tensor in our checkpoints: the module path in transformers, for every family."""
    inner = folder.family.shared if expert == SHARED else f"experts.{expert}"
    return f"model.layers.{layer}.{folder.family.module}.{inner}.{block}_proj.{part}"


def quantization_config(assignment: Assignment) -> dict[str, Any]:
    """The ``quantization_config`` entry of ``config.json``; see `mxmoe_steps.inference.plugin`."""
    schemes = sorted({scheme for blocks in assignment.values() for scheme in blocks})
    blocks: dict[str, dict[str, list[int]]] = {}
    for (layer, expert), names in sorted(assignment.items()):
        blocks.setdefault(str(layer), {})[str(expert)] = [schemes.index(name) for name in names]
    return {"quant_method": "mxmoe", "version": 1, "schemes": schemes, "blocks": blocks}


def checkpoint_tensors(folder: Any, assignment: Assignment, packed_folder: Path) -> Iterator[tuple[str, Any]]:
    """(name, tensor) of the whole new checkpoint, in a fixed order."""
    from mxmoe_steps.models.weights import read_tensors

    replaced = {}
    for (layer, expert), schemes in sorted(assignment.items()):
        for block, scheme in zip(BLOCKS, schemes, strict=True):
            replaced[folder.block_name(layer, expert, block)] = (layer, expert, block, scheme)
    for name in sorted(folder.files):
        if name not in replaced:
            yield name, read_tensors(folder.files, [name])[name]
    stores = _PackedStores(packed_folder)
    for name, (layer, expert, block, scheme) in replaced.items():
        if scheme == "w16a16":
            yield packed_name(folder, layer, expert, block, "weight"), read_tensors(folder.files, [name])[name]
            continue
        for part, tensor in stores.read(scheme, f"{layer}.{expert}.{block}").items():
            yield packed_name(folder, layer, expert, block, part), tensor


class _PackedStores:
    """The per-scheme files of `calibrate`, opened when first needed."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.open: dict[str, tuple[Any, set[str]]] = {}

    def read(self, scheme: str, prefix: str) -> dict[str, Any]:
        from safetensors import safe_open

        path = self.folder / f"{scheme}.safetensors"
        if scheme not in self.open:
            if not path.is_file():
                raise UserError(f"{path}: no packed weights for {scheme}; calibrate that scheme first")
            file = safe_open(path, "pt")
            self.open[scheme] = (file, set(file.keys()))
        file, names = self.open[scheme]
        parts = {part: f"{prefix}.{part}" for part in ("qweight", "scales", "zeros")}
        if parts["qweight"] not in names:
            raise UserError(f"{path}: holds no block {prefix}; calibrate {scheme} again for this model")
        return {part: file.get_tensor(name) for part, name in parts.items() if name in names}


def write_shards(tensors: Iterator[tuple[str, Any]], out: Path) -> None:
    """``model.safetensors``, or numbered shards with an index when the weights exceed one shard."""
    from safetensors.torch import save_file

    written: list[list[str]] = []  # tensor names of each shard
    shard: dict[str, Any] = {}

    def flush() -> None:
        with atomic_path(out / f"shard-{len(written)}.safetensors") as temporary:
            save_file(shard, temporary, metadata={"format": "pt"})
        written.append(list(shard))
        shard.clear()

    size = 0
    for name, tensor in tensors:
        size += tensor.nbytes
        if shard and size > _SHARD_BYTES:
            flush()
            size = tensor.nbytes
        shard[name] = tensor.contiguous()
    flush()
    if len(written) == 1:
        (out / "shard-0.safetensors").rename(out / "model.safetensors")
        return
    weight_map: dict[str, str] = {}
    for number, names in enumerate(written):
        file = f"model-{number + 1:05d}-of-{len(written):05d}.safetensors"
        (out / f"shard-{number}.safetensors").rename(out / file)
        weight_map |= dict.fromkeys(names, file)
    write_json(out / "model.safetensors.index.json", {"metadata": {}, "weight_map": weight_map})


def quantize(args: argparse.Namespace) -> None:
    """Write the checkpoint of one allocation; the folder appears when it is complete."""
    from mxmoe_steps.allocation.files import read_allocation
    from mxmoe_steps.models.families import open_model, resolve_model

    folder = open_model(resolve_model(args.model))
    allocation = read_allocation(args.allocation)
    assignment = {(layer, expert): tuple(schemes) for layer, expert, *schemes in allocation["assignment"]}
    expected = {(layer, expert) for layer in folder.moe_layers for expert in folder.expert_ids()}
    if set(assignment) != expected:
        layer, expert = min(set(assignment) ^ expected)
        raise UserError(
            f"{args.allocation}: layer {layer}, expert {expert} is not in both the allocation and {args.model};"
            " solve again for this model"
        )
    out = Path(args.out)
    partial = out.with_name(f".{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        write_shards(checkpoint_tensors(folder, assignment, Path(args.packed)), partial)
        write_json(partial / "config.json", folder.config | {"quantization_config": quantization_config(assignment)})
        for pattern in _COPIED:
            for file in sorted(folder.path.glob(pattern)):
                shutil.copyfile(file, partial / file.name)
        summary = {key: value for key, value in allocation.items() if key != "assignment"}
        weights_bytes = sum(file.stat().st_size for file in partial.glob("*.safetensors"))
        write_json(partial / "mxmoe.json", {"allocation": summary, "weights_bytes": weights_bytes})
        shutil.rmtree(out, ignore_errors=True)
        partial.rename(out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    print(f"quantize: {weights_bytes / 1e6:.2f} MB of weights in {out}", file=sys.stderr)


def main() -> None:
    """Command line."""
    parser = parser_for(__doc__)
    parser.add_argument("--model", required=True, help="local checkpoint folder or hub id")
    parser.add_argument("--allocation", required=True, help="allocation.json that solve wrote")
    parser.add_argument("--packed", required=True, help="folder of one quantizer that calibrate wrote")
    parser.add_argument("--out", required=True, help="checkpoint folder to write")
    quantize(parser.parse_args())


if __name__ == "__main__":
    run_cli(main)
