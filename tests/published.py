"""Tiny checkpoints as publishers quantize them, with what their numbers mean, written out from the formats' texts."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from checkpoints import make_checkpoint
from safetensors.torch import load_file, save_file

Tensors = dict[str, torch.Tensor]
Quantized = tuple[Tensors, np.ndarray]  # stored parts by what follows the weight's name, and the float32 weight


def e2m1(code: int) -> float:
    exponent, mantissa = code >> 1 & 3, code & 1
    magnitude = mantissa / 2 if exponent == 0 else (1 + mantissa / 2) * 2.0 ** (exponent - 1)
    return -magnitude if code & 8 else magnitude


def e4m3(code: int) -> float:
    exponent, mantissa = code >> 3 & 15, code & 7
    if code & 127 == 127:
        return math.nan
    magnitude = mantissa / 8 * 2.0**-6 if exponent == 0 else (1 + mantissa / 8) * 2.0 ** (exponent - 7)
    return -magnitude if code & 128 else magnitude


E2M1 = np.array([e2m1(code) for code in range(16)], np.float32)
E4M3 = np.array([e4m3(code) for code in range(256)], np.float32)


def expanded(scales: np.ndarray, block: tuple[int, int], shape: tuple[int, int]) -> np.ndarray:
    """The scale of every weight."""
    rows, columns = (np.arange(size) // one for size, one in zip(shape, block, strict=True))
    return scales[rows[:, None], columns[None, :]]


def blocked(weight: np.ndarray, block: tuple[int, int]) -> np.ndarray:
    """The largest magnitude of every block."""
    starts = [range(0, size, one) for size, one in zip(weight.shape, block, strict=True)]
    cells = [[np.abs(weight[r : r + block[0], c : c + block[1]]).max() for c in starts[1]] for r in starts[0]]
    return np.array(cells, np.float32)


def fp8(weight: np.ndarray, block: tuple[int, int], suffix: str, kind: torch.dtype = torch.float32) -> Quantized:
    """Codes with a scale for every block, the scales stored as ``kind``."""
    scales = torch.from_numpy(blocked(weight, block) / 448).to(kind)
    every = expanded(scales.float().numpy(), block, weight.shape)
    codes = torch.from_numpy(weight / every).to(torch.float8_e4m3fn)
    values = E4M3[codes.view(torch.uint8).numpy()]
    return {"": codes, suffix: scales}, values * every


def nibbles(codes: np.ndarray) -> torch.Tensor:
    """Two codes a byte, the first in the lower bits."""
    return torch.from_numpy((codes[..., ::2] | codes[..., 1::2] << 4).astype(np.uint8))


def mxfp4(weight: np.ndarray, seed: int) -> Quantized:
    """Random codes and exponents of the right size for a stack [E, K, N]."""
    experts, inputs, outputs = weight.shape
    rng = np.random.default_rng(seed)
    codes = rng.integers(0, 16, (experts, outputs, inputs // 32, 32))
    exponents = rng.integers(121, 125, codes.shape[:3])
    values = E2M1[codes] * np.exp2(exponents - 127).astype(np.float32)[..., None]
    stored = {"_blocks": nibbles(codes), "_scales": torch.from_numpy(exponents.astype(np.uint8))}
    return stored, values.reshape(experts, outputs, inputs).swapaxes(1, 2)


def packed_int(weight: np.ndarray, bits: int, group: int) -> Quantized:
    """Words of signed codes with an offset, bfloat16 scales of groups."""
    top = 2 ** (bits - 1)
    scales = torch.from_numpy(blocked(weight, (1, group)) / (top - 0.5)).bfloat16()
    every = expanded(scales.float().numpy(), (1, group), weight.shape)
    codes = np.clip(np.rint(weight / every), -top, top - 1).astype(int)
    words = np.zeros((len(weight), -(-weight.shape[1] * bits // 32)), np.uint32)
    for column in range(weight.shape[1]):
        word, place = divmod(column * bits, 32)
        words[:, word] |= (codes[:, column] + top).astype(np.uint32) << np.uint32(place)
    shape = torch.tensor(weight.shape)
    stored = {"_packed": torch.from_numpy(words.view(np.int32)), "_scale": scales, "_shape": shape}
    return stored, codes.astype(np.float32) * every


def nvfp4(weight: np.ndarray) -> Quantized:
    """Codes with e4m3 scales of 16 and one of all."""
    overall = np.float32(448 * 6 / np.abs(weight).max())
    scales = torch.from_numpy(blocked(weight, (1, 16)) / 6 * overall).to(torch.float8_e4m3fn)
    every = expanded(E4M3[scales.view(torch.uint8).numpy()] / overall, (1, 16), weight.shape)
    codes = np.abs((weight / np.maximum(every, 1e-9))[..., None] - E2M1).argmin(-1)
    stored = {"_packed": nibbles(codes), "_scale": scales, "_global_scale": torch.tensor([overall])}
    return stored, E2M1[codes] * every


def compressed(format_: str, **weights: Any) -> dict[str, Any]:
    """A ``quantization_config`` of compressed-tensors."""
    groups = {"group_0": {"targets": ["Linear"], "weights": {"symmetric": True, **weights}}}
    return {"quant_method": "compressed-tensors", "format": format_, "config_groups": groups, "ignore": ["lm_head"]}


def is_projection(name: str) -> bool:
    return name.endswith("proj.weight") or ".experts." in name or "shared_expert" in name


def is_expert(name: str) -> bool:
    return ".experts." in name and "bias" not in name


FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic", "fmt": "e4m3", "weight_block_size": [128, 128]}
PUBLISHED: dict[str, tuple[str, dict[str, Any], Callable[[str], bool], Callable[[np.ndarray], Quantized]]] = {
    # family, quantization_config, which weights, how
    "fp8": ("deepseek_v3", FP8, is_projection, lambda weight: fp8(weight, (128, 128), "_scale_inv")),
    "mxfp4": ("gpt_oss", {"quant_method": "mxfp4"}, lambda n: n.endswith(("up_proj", "experts.down_proj")),
              lambda weight: mxfp4(weight, weight.shape[2])),
    "pack-quantized": ("deepseek_v3", compressed("pack-quantized", num_bits=4, type="int", group_size=32), is_expert,
                       lambda weight: packed_int(weight, 4, 32)),
    "float-quantized": ("glm4_moe", compressed("float-quantized", num_bits=8, type="float", strategy="channel"),
                        is_projection, lambda weight: fp8(weight, (1, weight.shape[1]), "_scale", torch.bfloat16)),
    "nvfp4-pack-quantized": ("mixtral", compressed("nvfp4-pack-quantized", num_bits=4, type="float", group_size=16),
                             is_expert, nvfp4),
}  # fmt: skip


def publish(format_: str, folder: Path, more: Tensors | None = None, **sizes: Any) -> tuple[Path, Path]:
    """A tiny model as ``published`` in a source format, and in ``plain`` bfloat16 with the weights that it means.

    ``more``: tensors that it has besides, quantized like the others where their names are like theirs. ``sizes``: other
    ones than `checkpoints.SIZES`.
    """
    family, config, chosen, quantized = PUBLISHED[format_]
    make_checkpoint(family, folder / "plain", dtype=torch.bfloat16, **sizes)
    first = min((folder / "plain").glob("*.safetensors"))
    save_file(load_file(first) | (more or {}), first, metadata={"format": "pt"})
    (folder / "published").mkdir()
    settings = json.loads((folder / "plain" / "config.json").read_text())
    (folder / "published" / "config.json").write_text(json.dumps(settings | {"quantization_config": config}))
    index = folder / "plain" / "model.safetensors.index.json"
    weight_map = {}
    for file in sorted((folder / "plain").glob("*.safetensors")):
        stored, plain = {}, load_file(file)
        for name, tensor in plain.items():
            if not chosen(name):
                stored[name] = tensor
                continue
            parts, weight = quantized(tensor.float().numpy())
            plain[name] = torch.from_numpy(np.ascontiguousarray(weight)).bfloat16()
            stored |= {f"{name}{tail}": part.contiguous() for tail, part in parts.items()}
        save_file(plain, file, metadata={"format": "pt"})
        save_file(stored, folder / "published" / file.name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(stored, file.name)
    if index.is_file():
        (folder / "published" / index.name).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
        named = json.loads(index.read_text())["weight_map"] | dict.fromkeys(more or {}, first.name)
        index.write_text(json.dumps({"metadata": {}, "weight_map": named}))
    return folder / "published", folder / "plain"
