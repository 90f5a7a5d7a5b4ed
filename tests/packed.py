"""Packed checkpoints made straight from a model folder by rounding to nearest: no capture, no calibration."""

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
                weight = read_block(source, layer, [expert], block)[0].float()
                weight = rotate(weight) if is_rotated(quantizer) else weight
                for part, tensor in round_to_nearest(weight, parse_scheme(name)).tensors().items():
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
