"""Every tensor of an original is in its packed checkpoint, in packed blocks or byte for byte, or named as left out."""

import fnmatch
import json
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
import torch
from checkpoints import make_checkpoint
from family_sizes import FAMILY_SIZES
from packed import pack
from published import PUBLISHED, publish
from safetensors.torch import load_file, save_file

from mxmoe_steps.evaluations import read_manifest
from mxmoe_steps.models.families import open_model

Tensors = dict[str, torch.Tensor]
MORE: Tensors = {  # of layers that predict tokens ahead, of other modalities, and of odd types
    "model.layers.61.mlp.experts.0.up_proj.weight": torch.randn(32, 64),
    "model.layers.61.eh_proj.weight": torch.randn(64, 128),
    "model.mtp.layers.0.norm.weight": torch.randn(64),
    "mtp.layers.0.mlp.experts.3.gate_proj.weight": torch.randn(32, 64),
    "model.visual.blocks.0.attn.qkv.weight": torch.randn(12, 4).half(),
    "model.visual.patch_embed.proj.bias": torch.randn(3).bfloat16(),
    "model.layers.0.self_attn.rotary_emb.inv_freq": torch.randn(16).double(),
    "model.position_ids": torch.arange(5),
    "model.mask": torch.tensor([True, False]),
    "model.scalar": torch.tensor(3, dtype=torch.int8),
}
UNNAMED = "model.forgotten.weight"


def stored(folder: Path) -> Tensors:
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def add(folder: Path, named: Tensors, unnamed: Tensors) -> None:
    """Put more tensors into the first shard; its index names some of them."""
    file, index = min(folder.glob("*.safetensors")), folder / "model.safetensors.index.json"
    save_file(load_file(file) | named | unnamed, file, metadata={"format": "pt"})
    content = json.loads(index.read_text())
    content["weight_map"] |= dict.fromkeys(named, file.name)
    index.write_text(json.dumps(content))


def same(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.dtype == other.dtype and torch.equal(one, other)


def numbers(tensors: Tensors, layer: int, names: Iterable[str]) -> np.ndarray:
    """All numbers of some of a layer's tensors, sorted."""
    found = [tensors[name].flatten().numpy() for name in names if f"layers.{layer}." in name]
    return np.sort(np.concatenate([np.zeros(1), *found]))


@pytest.mark.parametrize("family", sorted(FAMILY_SIZES))
def test_no_tensor_of_a_family_vanishes(family: str, tmp_path: Path) -> None:
    make_checkpoint(family, tmp_path / "model")
    prefix = next(name for name in stored(tmp_path / "model") if "layers.0." in name).partition("layers.0.")[0]
    more = {name.replace("model.", prefix): tensor for name, tensor in MORE.items()}
    add(tmp_path / "model", more, {UNNAMED: torch.ones(3)})
    original, folder = stored(tmp_path / "model"), open_model(tmp_path / "model")
    del original[UNNAMED]
    names = {folder.stored_name(name): name for name in folder.files}  # with the decoder's path in transformers
    original = {names.pop(name): tensor for name, tensor in original.items()}
    assert not names

    result = pack(tmp_path / "model", tmp_path / "plain", lambda *_: ("w16a16", "w16a16", "w16a16"))
    (left_out,) = read_manifest(result)["left_out"]
    assert (left_out["name"], left_out["count"]) == (UNNAMED, 1)
    plain = stored(result)
    assert all(same(plain[name], original[name]) for name in original.keys() & plain.keys())
    moved, new = original.keys() - plain.keys(), plain.keys() - original.keys()
    assert sum(plain[name].numel() for name in new) == sum(original[name].numel() for name in moved)
    for layer in folder.moe_layers:  # the same numbers under other names
        assert np.array_equal(numbers(original, layer, moved), numbers(plain, layer, new))

    result = pack(tmp_path / "model", tmp_path / "packed", lambda *_: ("w4a16", "w2a16", "w8a8"))
    packed, manifest = stored(result), read_manifest(result)
    blocks = {name.removesuffix(".qweight") for name in packed if name.endswith(".qweight")}
    assert len(blocks) == len(folder.family.own_blocks) * len(folder.expert_ids()) * len(folder.moe_layers)
    kept = {name for name in original if name.removesuffix(".weight") not in blocks} - moved
    assert {name for name in packed if name.rpartition(".")[0] not in blocks} == kept
    assert all(same(packed[name], original[name]) for name in kept)
    assert manifest["other_bytes"] == sum(original[name].nbytes for name in kept) == sum(manifest["others"].values())
    assert 4 * (32 * 64 + 64 * 128) in manifest["others"].values(), "of the layer that predicts tokens ahead"


@pytest.mark.parametrize("format_", sorted(PUBLISHED))
def test_no_tensor_of_a_published_model_vanishes(format_: str, tmp_path: Path) -> None:
    more = {name: tensor for name, tensor in MORE.items() if "layers.61." in name or "mtp" in name}
    published, plain = publish(format_, tmp_path, more)
    before, meant, folder = stored(published), stored(plain), open_model(published)
    out = pack(published, tmp_path / "packed", lambda *_: ("w4a16", "w2a16", "w8a8"))
    after = stored(out)
    blocks = {name.removesuffix(".qweight") for name in after if name.endswith(".qweight")}
    assert len(blocks) == 3 * len(folder.expert_ids()) * len(folder.moe_layers)
    kept = {name for name in after if name.rpartition(".")[0] not in blocks}
    assert more.keys() <= kept
    assert all(same(after[name], meant[name]) for name in kept), "what it means, where it is quantized"
    patterns = [one["name"] for one in read_manifest(out)["left_out"]]
    for name in before.keys() - kept:
        is_block = name.removesuffix(".weight") in blocks or name.endswith("_bias")
        assert is_block or any(fnmatch.fnmatchcase(name, one) for one in patterns), name
