"""Weights that their publisher quantized: bit for bit what they mean, one at a time, the same packed checkpoint."""

import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from packed import pack
from published import E4M3, FP8, PUBLISHED, compressed, expanded, fp8, mxfp4, nvfp4, packed_int, publish
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, FineGrainedFP8Config, Mxfp4Config
from transformers.integrations.finegrained_fp8 import Fp8Dequantize

from mxmoe_steps import check
from mxmoe_steps.errors import UserError
from mxmoe_steps.evaluations import read_manifest
from mxmoe_steps.models.families import open_model
from mxmoe_steps.models.raw import tensors_of
from mxmoe_steps.models.sources.format import SourceFormat
from mxmoe_steps.models.sources.formats import source_formats
from mxmoe_steps.models.sources.tensor import Dequantized
from mxmoe_steps.models.streaming import StreamedModel
from mxmoe_steps.models.weights import read_block
from mxmoe_steps.quantizers.gptq import gptq
from mxmoe_steps.quantizers.grid import round_to_nearest
from mxmoe_steps.quantizers.hessians import Hessians
from mxmoe_steps.schemes import parse_scheme

SCHEMES = ("w4a16", "w16a16", "w8a8")
THEIRS = {"fp8": FineGrainedFP8Config(dequantize=True), "mxfp4": Mxfp4Config(dequantize=True)}
PUBLISHED_BITS = {  # of Kimi's five experts here, the shared one stays in 16 bits
    "fp8": 8, "mxfp4": 4.25, "pack-quantized": (4 * 4.5 + 16) / 5, "float-quantized": 8, "nvfp4-pack-quantized": 4.5,
}  # fmt: skip
INT = {"num_bits": 4, "type": "int"}


def same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    views = [tensor.contiguous().view(torch.uint8) for tensor in (one, other)]
    return one.dtype == other.dtype and torch.equal(*views)


@pytest.mark.parametrize("format_", sorted(PUBLISHED))
def test_a_published_model_is_the_one_that_it_means(
    format_: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    published, plain = publish(format_, tmp_path)
    expected = AutoModelForCausalLM.from_pretrained(plain, dtype=torch.bfloat16).state_dict()
    streamed = StreamedModel(published, "auto", "cpu")
    assert streamed.dtype == torch.bfloat16
    seen = 0
    for module in ("model.embed_tokens", *map(streamed.layer_path, range(streamed.layers)), "model.norm", "lm_head"):
        with streamed.loaded(module):
            for name, tensor in streamed.model.get_submodule(module).state_dict().items():
                assert same_bits(tensor, expected[f"{module}.{name}"]), f"{module}.{name}"
                seen += 1
    assert seen == len(expected)

    if format_ in THEIRS:  # compressed-tensors is not installed here
        monkeypatch.setattr("transformers.quantizers.quantizer_finegrained_fp8.is_accelerate_available", lambda: True)
        theirs = AutoModelForCausalLM.from_pretrained(
            published, quantization_config=THEIRS[format_], dtype=torch.bfloat16
        )
        assert all(same_bits(tensor, expected[name]) for name, tensor in theirs.state_dict().items())

    packed = [pack(path, tmp_path / f"of-{path.name}", lambda *_: SCHEMES) for path in (published, plain)]
    files = [sorted(path.glob("*.safetensors")) for path in packed]
    assert [file.read_bytes() for file in files[0]] == [file.read_bytes() for file in files[1]]
    configs = [json.loads((path / "config.json").read_text()) for path in packed]
    assert configs[0] == configs[1]

    manifests = [read_manifest(path) for path in packed]
    assert [one["published"]["formats"] for one in manifests] == [[format_], []]
    assert manifests[1]["left_out"] == []
    listed = sum(one["count"] for one in manifests[0]["left_out"])
    source = open_model(published).stored
    assert listed == len(source.consumed) == sum(len(parts) for _, parts in source.quantized.values())
    sizes = [one["published"] for one in manifests]
    assert sizes[0]["bytes_16_bit"] == sizes[1]["bytes_16_bit"]
    assert sizes[1]["expert_bits"] == 16
    assert sizes[0]["expert_bits"] == pytest.approx(PUBLISHED_BITS[format_], abs=0.3), "small tensors have large scales"


def write(folder: Path, parts: dict[str, torch.Tensor], name: str = "x.weight") -> dict[str, Any]:
    save_file({f"{name}{tail}": tensor.contiguous() for tail, tensor in parts.items()}, folder / "x.safetensors")
    return tensors_of(folder / "x.safetensors")


def dequantized(stored: dict[str, Any], config: dict[str, Any], dtype: str = "bfloat16") -> Dequantized:
    (source,) = source_formats(config, Path("config.json"))
    ((weight, parts),) = source.find(stored).items()
    return Dequantized.of(weight, {part: stored[name] for part, name in parts.items()}, source, dtype)


def random(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


FP8_CHANNELS = compressed("float-quantized", num_bits=8, type="float", strategy="channel")
FP8_BLOCKS = compressed("float-quantized", num_bits=8, type="float", strategy="block", block_structure=[128, 128])


@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "float16"])
@pytest.mark.parametrize(
    ("config", "made"),
    [
        (FP8, fp8(random(576, 200), (128, 128), "_scale_inv")),  # as the latent projection of DeepSeek
        (FP8, fp8(random(128, 128), (128, 128), "_scale_inv", torch.bfloat16)),
        (FP8 | {"weight_block_size": None}, fp8(random(40, 72), (40, 72), "_scale_inv")),
        (FP8_BLOCKS, fp8(random(352, 736), (128, 128), "_scale")),
        (FP8_CHANNELS, fp8(random(33, 7), (1, 7), "_scale")),
        (compressed("pack-quantized", **INT), packed_int(random(16, 352), 4, 32)),
        (compressed("pack-quantized", **INT), packed_int(random(5, 20), 4, 20)),  # half a word is empty
        (compressed("pack-quantized", num_bits=8, type="int"), packed_int(random(6, 64), 8, 32)),
        (compressed("nvfp4-pack-quantized", num_bits=4, type="float"), nvfp4(random(9, 48))),
    ],
)
def test_every_number_is_what_the_format_says(
    config: dict[str, Any], made: tuple[Any, np.ndarray], dtype: str, tmp_path: Path
) -> None:
    parts, weight = made
    expected = torch.from_numpy(weight)
    if config["quant_method"] != "fp8":  # compressed-tensors computes in the precision of the scales, or in bfloat16
        expected = expected.to(torch.bfloat16 if "_global_scale" in parts else parts["_scale"].dtype)
    tensor = dequantized(write(tmp_path, parts), config, dtype)
    expected = expected.to(getattr(torch, dtype))
    assert same_bits(tensor[...], expected)
    assert tensor.read() == expected.contiguous().view(torch.uint8).numpy().tobytes()
    assert (tensor.shape, tensor.nbytes) == (tuple(expected.shape), expected.nbytes)


def test_every_fp8_code_and_exponent(tmp_path: Path) -> None:
    """Against transformers', which divides the tensor evenly, with scales that are bytes, numbers, or only one."""
    codes = torch.arange(256, dtype=torch.uint8).repeat(256, 1).view(torch.float8_e4m3fn)
    powers = torch.arange(0, 255, dtype=torch.uint8)[torch.randperm(255)[:4]].view(2, 2)
    exponents = {"bytes": powers, "numbers": torch.rand(2, 2), "one": torch.rand(1), "none": torch.rand(())}
    for kind, scales in exponents.items():
        config = FP8 | ({} if scales.dim() == 2 else {"weight_block_size": None})
        tensor = dequantized(write(tmp_path, {"": codes, "_scale_inv": scales}), config)
        theirs = Fp8Dequantize(None)._dequantize_one(codes, scales, torch.bfloat16)
        finite = ~torch.isnan(theirs)
        assert torch.equal(torch.isnan(tensor[...]), ~finite), kind
        assert same_bits(tensor[...][finite], theirs[finite]), kind
        values = torch.from_numpy(E4M3[codes.view(torch.uint8).numpy()])
        assert torch.equal(codes.float()[finite], values[finite])


def test_codes_in_the_order_of_compressed_tensors(tmp_path: Path) -> None:
    """Words that version 0.20.1 makes of the codes -8 .. 7 and of their reverse."""
    words = torch.tensor([[1985229328, -19088744], [-1985229329, 19088743]], dtype=torch.int32)
    stored = {"_packed": words, "_scale": torch.tensor([[0.5], [2.0]]).bfloat16(), "_shape": torch.tensor([2, 16])}
    tensor = dequantized(write(tmp_path, stored), compressed("pack-quantized", **INT))
    codes = torch.arange(-8, 8).bfloat16()
    assert torch.equal(tensor[...], torch.stack((codes * 0.5, codes.flip(0) * 2)))


def test_experts_of_a_stack_are_dequantized_one_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shapes: list[tuple[int, ...]] = []
    decode = {kind: kind.decode for kind in SourceFormat.__subclasses__()}
    for kind, original in decode.items():

        def counted(self: Any, parts: Any, original: Any = original) -> Any:
            weight = original(self, parts)
            shapes.append(tuple(weight.shape))
            return weight

        monkeypatch.setattr(kind, "decode", counted)
    published, plain = publish("mxfp4", tmp_path)
    folder, other = open_model(published), open_model(plain)
    for block in ("gate", "up", "down"):
        shapes.clear()
        assert torch.equal(read_block(folder, 1, [2], block), read_block(other, 1, [2], block))
        assert len(shapes) == 1
        raw, same = folder.raw_block(1, 2, block), other.raw_block(1, 2, block)
        assert (raw.dtype, raw.shape, raw.nbytes) == (same.dtype, same.shape, same.nbytes)
        assert raw.read() == same.read()
    shapes.clear()
    streamed = StreamedModel(published, "auto", "cpu")
    assert not shapes, "headers say what a model needs"
    with streamed.loaded(streamed.layer_path(0)):
        assert len(shapes) == 2 * 4
        assert {len(shape) for shape in shapes} == {2}


def test_a_stack_of_fp8_experts(tmp_path: Path) -> None:
    """As transformers saves them: a scale tensor for all."""
    made = [fp8(random(160, 96, seed=seed), (128, 128), "_scale_inv") for seed in range(3)]
    codes = torch.stack([stored[""].view(torch.uint8) for stored, _ in made]).view(torch.float8_e4m3fn)
    parts = {"": codes, "_scale_inv": torch.stack([stored["_scale_inv"] for stored, _ in made])}
    tensor = dequantized(write(tmp_path, parts, "x.gate_up_proj"), FP8)
    expected = torch.from_numpy(np.stack([weight for _, weight in made])).bfloat16()
    assert same_bits(tensor[...], expected)
    assert same_bits(tensor[1, 80:160], expected[1, 80:160])
    assert same_bits(tensor[2][..., ::2], expected[2][..., ::2])


def test_mxfp4_weights_stay_as_published_under_our_own_scheme() -> None:
    """Experts that keep w4a16_mxfp4 lose nothing: the same codes, groups and exponents, rounded or by GPTQ."""
    _, weight = mxfp4(random(2, 96, 24), seed=1)
    published, scheme = torch.from_numpy(weight.swapaxes(1, 2).copy()), parse_scheme("w4a16_mxfp4")
    assert torch.equal(round_to_nearest(published, scheme).dequantize(), published)
    inputs = torch.from_numpy(random(2, 200, 96, seed=2)).double()
    moments = inputs.mT @ inputs
    hessians = Hessians(moments, torch.tensor([200, 200]), moments.mean(0) / 200, 0.01)
    assert torch.equal(gptq(published, hessians, scheme).dequantize(), published)


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"quant_method": "gptq"}, r"quantized already \(gptq\), in a format that is not read; take a release"),
        (compressed("marlin-24", **INT), r"\(compressed-tensors, marlin-24\), in a format that is not read"),
        (compressed("pack-quantized", **INT | {"symmetric": False}), r"pack-quantized with zero points .*not read"),
        (compressed("pack-quantized", actorder="group"), r"reordered groups \(actorder: group\) is not read"),
        ({"quant_method": "compressed-tensors"}, r"config_groups do not say how compressed-tensors weights are stored"),
        ({"quant_method": "compressed-tensors", "config_groups": [3]}, r"config_groups do not say"),
    ],
)
def test_what_is_not_read_is_named(config: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=rf"^config\.json: .*{says}"):
        source_formats(config, Path("config.json"))


@pytest.mark.parametrize(
    ("config", "change", "says"),
    [
        (FP8, {"_scale_inv": torch.ones(2, 3)}, r"x\.weight: codes \[160, 96\] do not fit scales \[2, 3\].* of fp8"),
        (FP8, {"": torch.ones(160, 96)}, r"codes are F32, expected F8_E4M3"),
        (FP8, {"_scale_inv": torch.ones(2, 1, dtype=torch.int32)}, r"scales are I32, expected F64 or F32 or BF16"),
        (compressed("pack-quantized", **INT), {"_shape": torch.tensor([16, 99])}, r"a shape 16 x 99 does not fit"),
        (compressed("pack-quantized", **INT), {"_shape": torch.tensor([3])}, r"shape \[1\] are no matrix"),
        (compressed("pack-quantized", **INT), {"_scale": torch.ones(16, 5)}, r"and scales \[16, 5\], in a checkpoint"),
        (compressed("pack-quantized", **INT), {"_packed": torch.ones(16, 9).int()}, r"codes \[16, 9\] of 4 or 8 bits"),
        (compressed("nvfp4-pack-quantized"), {"_global_scale": torch.ones(2)}, r"fit scales \[16, 4\] and \[2\]"),
        ({"quant_method": "mxfp4"}, {"_scales": torch.ones(3, 24, 4).byte()}, r"do not fit scales \[3, 24, 4\]"),
    ],
)  # fmt: skip
def test_parts_that_do_not_fit_are_named(
    config: dict[str, Any], change: dict[str, torch.Tensor], says: str, tmp_path: Path
) -> None:
    made = {
        "fp8": lambda: fp8(random(160, 96), (128, 128), "_scale_inv"),
        "mxfp4": lambda: mxfp4(random(3, 96, 24), seed=0),
        "pack-quantized": lambda: packed_int(random(16, 64), 4, 32),
        "nvfp4-pack-quantized": lambda: nvfp4(random(16, 64)),
    }
    parts, _ = made[config.get("format", config["quant_method"])]()
    with pytest.raises(UserError, match=rf"x\.safetensors: .*{says}"):
        dequantized(write(tmp_path, parts | change), config)


def test_a_weight_that_is_nan_is_named_and_so_is_one_without_scales(tmp_path: Path) -> None:
    published, _ = publish("fp8", tmp_path)
    name = "model.layers.1.mlp.experts.2.up_proj.weight"
    file = open_model(published).files[name]
    tensors = load_file(file)
    tensors[name].view(torch.uint8)[3, 5] = 0x7F
    save_file(tensors, file, metadata={"format": "pt"})
    folder = open_model(published)
    with pytest.raises(UserError, match="layer 1, expert 2, up: the weights hold NaN"):
        read_block(folder, 1, range(4), "up")
    index = published / "model.safetensors.index.json"
    named = {key: one.name for key, one in folder.stored.listed.items() if key != f"{name}_scale_inv"}
    index.write_text(json.dumps({"weight_map": named}))
    with pytest.raises(UserError, match=rf"{re.escape(name)} is stored as F8_E4M3: the weights are quantized already"):
        StreamedModel(published, "auto", "cpu")


def test_check_says_what_a_source_is_and_which_budgets_it_undercuts(tmp_path: Path) -> None:
    published, plain = publish("mxfp4", tmp_path)
    options: Any = SimpleNamespace(model="org/name", problems=["block=3.25", "layer=4.5"])
    lines = list(check.of_source(options, open_model(published)))
    assert lines == [
        "org/name is published in mxfp4, 4.25 bits an expert weight, dequantized to bfloat16 as they are read",
        "a budget of 4.5 bits per layer is no less than the 4.25 bits of the original",
    ]
    assert list(check.of_source(options, open_model(plain))) == []


def test_what_is_said_of_the_language_model_inside_counts(tmp_path: Path) -> None:
    """As Kimi K2.5 says it, whose other half sees."""
    published, _ = publish("pack-quantized", tmp_path)
    file = published / "config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps(config | {"text_config": {"quantization_config": config.pop("quantization_config")}}))
    assert [source.name for source in open_model(published).formats] == ["pack-quantized"]
    packed = pack(published, tmp_path / "packed", lambda *_: SCHEMES)
    written = json.loads((packed / "config.json").read_text())
    assert written["text_config"] == {}
    assert written["quantization_config"]["quant_method"] == "mxmoe"
    assert open_model(packed).is_packed
    assert open_model(packed).formats == []


def test_scales_of_activations_are_left_out_by_name(tmp_path: Path) -> None:
    published, _ = publish("fp8", tmp_path)
    folder = open_model(published)
    names = [f"model.layers.1.mlp.experts.{expert}.up_proj.activation_scale" for expert in range(3)]
    file = folder.files["lm_head.weight"]
    save_file(load_file(file) | {name: torch.ones(1) for name in names}, file, metadata={"format": "pt"})
    weight_map = {name: one.name for name, one in folder.stored.listed.items()} | dict.fromkeys(names, file.name)
    (published / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    out = pack(published, tmp_path / "packed", lambda *_: SCHEMES)
    (found,) = (one for one in read_manifest(out)["left_out"] if "activation" in one["name"])
    assert found["count"] == 3
    assert found["name"] == "model.layers.*.mlp.experts.*.up_proj.activation_scale"
    assert found["why"] == "scales of activations, which go with fp8 weights"


def test_the_reference_covers_blocks_that_are_cut() -> None:
    """What the other tests stand on."""
    scales = expanded(np.arange(6, dtype=np.float32).reshape(2, 3), (128, 128), (200, 300))
    assert (scales[127, 127], scales[128, 127], scales[199, 299], scales[0, 255]) == (0, 3, 5, 1)
