"""Telling models apart, so that nothing computed for one is used with another."""

import hashlib

from mxmoe_steps.models.families import ModelFolder
from mxmoe_steps.models.raw import RawTensor
from mxmoe_steps.schemes import BLOCKS, SHARED

_SAMPLE = 4096  # bytes: training changes weights everywhere


def fingerprint(folder: ModelFolder) -> str:
    """Hash of name, type, shape and first bytes of every tensor, and of a block of each kind in every layer.

    It is the same however the weights are spread over files, and whether experts are stored apart or stacked.
    """
    experts = [(layer, expert) for layer in folder.moe_layers for expert in folder.expert_ids()]
    stored = {folder.place(*key, block).tensor for key in experts for block in BLOCKS}
    samples: dict[str, RawTensor] = {name: folder.raw(name) for name in folder.files if name not in stored}
    for layer in folder.moe_layers:
        for expert in (layer % folder.experts, *([SHARED] if folder.family.shared is not None else [])):
            for block in BLOCKS:
                samples[folder.block_name(layer, expert, block)] = folder.raw_block(layer, expert, block)
    digest = hashlib.sha256()
    for name, tensor in sorted(samples.items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)} ".encode() + tensor.read(most=_SAMPLE))
    return digest.hexdigest()[:16]
