"""Packed checkpoints made straight from a model folder, no capture and no calibration: blocks are rounded to nearest,
or stay as published."""

from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save_file
from synthetic import allocation_of

from mxmoe_steps import quantize
from mxmoe_steps.allocation.files import write_allocation
from mxmoe_steps.atomic import canonical_json
from mxmoe_steps.models.families import open_model
from mxmoe_steps.models.identity import fingerprint
from mxmoe_steps.models.published import is_published, read_published
from mxmoe_steps.models.weights import read_block
from mxmoe_steps.quantizers.grid import round_to_nearest
from mxmoe_steps.quantizers.hadamard import rotate
from mxmoe_steps.quantizers.names import is_rotated
from mxmoe_steps.schemes import BLOCKS, parse_scheme


def pack(
    model: Path, folder: Path, schemes_of: Callable[[int, int], tuple[str, str, str]], quantizer: str = "rtn"
) -> Path:
    """A checkpoint of ``model`` in ``folder``; ``schemes_of(layer, expert)`` names the schemes of gate, up and down."""
    source = open_model(model)
    stores: dict[str, dict[str, torch.Tensor]] = {}
    assignment = []
    for layer in source.moe_layers:
        for expert in source.expert_ids():
            names = [parse_scheme(name).name for name in schemes_of(layer, expert)]
            assignment.append([layer, expert, *names])
            for block, name in zip(BLOCKS, names, strict=True):
                if name == "w16a16":
                    continue
                original, scheme = read_block(source, layer, [expert], block), parse_scheme(name)
                weight = rotate(original[0].float()) if is_rotated(quantizer) else original[0].float()
                if scheme.published and is_published(source, layer, [expert], scheme):
                    quantized = read_published(source, layer, [expert], block, scheme, original)[0]
                else:
                    quantized = round_to_nearest(weight, scheme)
                for part, tensor in quantized.tensors().items():
                    stores.setdefault(name, {})[f"{layer}.{expert}.{block}.{part}"] = tensor
    store, allocation = folder / "packed", folder / "allocation.json"
    store.mkdir(parents=True)
    for name, tensors in stores.items():
        facts = {"model": fingerprint(source), "quantizer": quantizer, "scheme": name}
        save_file(tensors, store / f"{name}.safetensors", metadata={"mxmoe": canonical_json(facts)})
    write_allocation(str(allocation), allocation_of(assignment, quantizer, model))
    out = folder / "checkpoint"
    quantize.quantize(
        quantize.QuantizeOptions(
            trust_remote_code=False, model=str(model), allocation=str(allocation), packed=str(store), out=str(out)
        )
    )
    return out
