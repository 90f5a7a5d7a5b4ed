"""Blocks that stay as published: the publisher's codes, no loss, true bits, and the refusals of what has none."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from checkpoints import capture_tokens
from published import FP8, PUBLISHED, compressed, fp8, packed_int, publish
from safetensors.torch import load_file, save_file
from synthetic import allocation_of

import mxmoe_steps
from mxmoe_steps import calibrate, check, quantize
from mxmoe_steps.allocation.blocks import read_losses
from mxmoe_steps.allocation.files import write_allocation
from mxmoe_steps.config.loading import load_config
from mxmoe_steps.errors import UserError
from mxmoe_steps.kernels.formats import kernel_format
from mxmoe_steps.models.families import ModelFolder, open_model
from mxmoe_steps.models.places import Place
from mxmoe_steps.models.published import kept_block, published_scheme, read_published
from mxmoe_steps.models.raw import tensors_of
from mxmoe_steps.models.sources.formats import source_formats
from mxmoe_steps.models.sources.tensor import Dequantized
from mxmoe_steps.models.streaming import StreamedModel
from mxmoe_steps.models.weights import read_block
from mxmoe_steps.quantizers.grid import from_tensors
from mxmoe_steps.schemes import BLOCKS, ORIGINAL, SHARED, parse_scheme
from mxmoe_steps.tables import LOSSES, read_table
from mxmoe_steps.tuning.blocks import is_tuned

ROOT = Path(__file__).parents[1]
BLOCKS_OF_32 = FP8 | {"weight_block_size": [32, 32]}  # the tiny model is too narrow for those of 128
SCHEMES = {
    "mxfp4": "w4a16_g32_sym_mxfp4_published",
    "fp8": "w8a16_g32_sym_fp8_published",
    "pack-quantized": "w4a16_g32_sym_published",
}
PARTS = {"mxfp4": ["_blocks", "_scales"], "fp8": ["", "_scale_inv"], "pack-quantized": ["_packed", "_scale"]}


def random(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


def run_calibrate(model: Path, out: Path, quantizer: str, scheme: str) -> None:
    paths = {"model": str(model), "capture": [str(model.parent / "capture")], "out": str(out)}
    calibrate.calibrate(calibrate.CalibrateOptions(**paths, quantizer=quantizer, scheme=scheme, device="cpu"))


@pytest.fixture(scope="module", params=sorted(SCHEMES))
def source(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path, Path]:
    """Format, the published model, and what calibrate made of it, by GPTQ."""
    root = tmp_path_factory.mktemp(request.param)
    with pytest.MonkeyPatch.context() as patch:
        family, _, chosen, _ = PUBLISHED["fp8"]
        made = (family, BLOCKS_OF_32, chosen, lambda weight: fp8(weight, (32, 32), "_scale_inv"))
        patch.setitem(PUBLISHED, "fp8", made)
        published, _ = publish(request.param, root)
    capture_tokens(
        published, torch.randint(3, 96, (4, 24), generator=torch.Generator().manual_seed(1)), root / "capture"
    )
    run_calibrate(published, root / "gptq", "gptq", SCHEMES[request.param])
    return request.param, published, root / "gptq"


def own(format_: str, folder: ModelFolder) -> list[tuple[int, int, str]]:
    """Blocks that have codes of their publisher."""
    experts = [expert for expert in folder.expert_ids() if format_ != "pack-quantized" or expert != SHARED]
    return [(layer, expert, block) for layer in folder.moe_layers for expert in experts for block in BLOCKS]


def test_codes_are_the_publishers_and_lose_nothing(source: tuple[str, Path, Path]) -> None:
    format_, published, out = source
    folder, name = open_model(published), SCHEMES[source[0]]
    scheme = parse_scheme(name)
    assert published_scheme(folder) == scheme
    packed = load_file(out / f"{name}.safetensors")
    blocks = own(format_, folder)
    for layer, expert, block in blocks:
        original = read_block(folder, layer, [expert], block)[0]
        key = f"{layer}.{expert}.{block}"
        parts = {part: packed[f"{key}.{part}"] for part in ("qweight", "scales")}
        restored = from_tensors(scheme, original.shape[1], parts).dequantize().bfloat16()
        assert torch.equal(restored, original)
        stored = {part: (tuple(tensor.shape), tensor.dtype) for part, tensor in parts.items()}
        types = {"U8": torch.uint8, "BF16": torch.bfloat16}
        assert stored == {part: (shape, types[kind]) for part, (kind, shape) in scheme.parts(*original.shape).items()}
        nbytes = sum(tensor.numel() * tensor.element_size() for tensor in parts.values())
        assert 8 * nbytes / original.numel() == scheme.bits(original.shape[1])
        own_parts = folder.raw(folder.place(layer, expert, block).tensor).parts.values()
        own_bytes = [tensor.read() for tensor in own_parts]
        if format_ != "mxfp4":  # not in one of all experts
            assert [parts[part].view(torch.uint8).numpy().tobytes() for part in parts] == own_bytes[:2]

    table, facts = read_table(LOSSES, out / f"{name}.parquet")
    assert facts["scheme"] == name
    losses = table.to_pandas()
    kept = np.array([key in blocks for key in zip(losses.layer, losses.expert, losses.block, strict=True)])
    assert (losses[kept][["out_sq", "fisher", "fallback"]] == 0).all(axis=None)
    assert (losses[~kept].out_sq > 0).all(), "experts in 16 bits are quantized to the same codes"
    assert kept.sum() == len(blocks) == len(losses) - (3 * len(folder.moe_layers)) * (format_ == "pack-quantized")
    assert read_losses([out / f"{name}.parquet"], "out_sq", original=True).schemes == (scheme, ORIGINAL)


def test_a_packed_checkpoint_means_what_the_published_one_does(source: tuple[str, Path, Path], tmp_path: Path) -> None:
    format_, published, out = source
    folder, name = open_model(published), SCHEMES[source[0]]
    kept = set(own(format_, folder))

    def chosen(layer: int, expert: int) -> list[str]:
        named = ["w16a16" if number == expert % 4 else name for number in range(3)]
        return [one if (layer, expert, block) in kept else "w16a16" for one, block in zip(named, BLOCKS, strict=True)]

    assignment = [[layer, e, *chosen(layer, e)] for layer in folder.moe_layers for e in folder.expert_ids()]
    write_allocation(str(tmp_path / "allocation.json"), allocation_of(assignment, "gptq", published))
    paths = {"allocation": str(tmp_path / "allocation.json"), "packed": str(out), "out": str(tmp_path / "out")}
    quantize.quantize(quantize.QuantizeOptions(trust_remote_code=False, model=str(published), **paths))
    tokens = torch.randint(3, 96, (2, 24), generator=torch.Generator().manual_seed(2))
    original, packed = (StreamedModel(path, "auto", "cpu") for path in (published, tmp_path / "out"))
    states = []
    for model in (original, packed):
        with model.loaded(model.embedding), torch.no_grad():
            hidden = model.embed(tokens)
        states.append([hidden])
        for layer in range(model.layers):
            with model.loaded(model.layer_path(layer)), torch.no_grad():
                states[-1].append(model.run_layer(layer, states[0][layer]))
    for ours, theirs in zip(*states, strict=True):
        assert (ours - theirs).norm() <= 1e-2 * theirs.norm(), "sums in another order, in bfloat16"
    loaded = mxmoe_steps.load_quantized(str(tmp_path / "out"), dtype=torch.bfloat16)
    loaded.save_pretrained(tmp_path / "again")
    for model in (loaded, mxmoe_steps.load_quantized(str(tmp_path / "again"), dtype=torch.bfloat16)):
        for layer, expert, *schemes in assignment:
            moe = model.get_submodule(folder.family.moe_path(layer))
            module = moe.get_submodule(folder.family.shared) if expert == SHARED else moe.experts[expert]
            for block, scheme in zip(BLOCKS, schemes, strict=True):
                linear = module.get_submodule(f"{block}_proj")
                weight = linear.weight if scheme == "w16a16" else linear.dequantize().bfloat16()
                assert torch.equal(weight, read_block(folder, layer, [expert], block)[0])


def test_check_says_what_stays(source: tuple[str, Path, Path]) -> None:
    format_, published, _ = source
    options: Any = SimpleNamespace(model="org/name", candidates=[SCHEMES[format_], "w3a16"])
    (line,) = check.of_published(options, open_model(published))
    assert line.startswith(f"blocks under {SCHEMES[format_]} keep the codes and scales of org/name, and lose nothing")
    assert line.endswith("1 experts in 1 layers that it has in 16 bits, quantized to the same codes") == (
        format_ == "pack-quantized"
    )
    kernels = list(check.without_kernels(options, open_model(published)))
    if format_ == "mxfp4":
        assert kernels == [], "its kernel carries them"
    else:
        assert f"scheme {SCHEMES[format_]}: no GPU kernel" in kernels[0]
        assert "will run reference arithmetic" in kernels[0]


def test_the_step_refuses_what_is_not_published_so(source: tuple[str, Path, Path], tmp_path: Path) -> None:
    format_, published, _ = source
    name = SCHEMES[format_]
    with pytest.raises(UserError, match=rf"^{name}: published codes are not rotated"):
        run_calibrate(published, tmp_path, "rtn+hadamard", name)
    with pytest.raises(UserError, match=f"is published as {name}, not as w4a16_g64_sym_published"):
        run_calibrate(published, tmp_path, "rtn", "w4a16_g64_sym_published")
    folder = open_model(published)
    layer, expert, block = own(format_, folder)[-1]
    codes, scales = PARTS[format_]
    place = folder.place(layer, expert, block).tensor
    file = folder.files[place]
    tensors = load_file(file)
    saved = dict(tensors)
    tensors[f"{place}{scales}"] = torch.zeros_like(tensors[f"{place}{scales}"])
    if format_ != "mxfp4":  # every exponent is a positive number
        save_file(tensors, file, metadata={"format": "pt"})
        weights, says = read_block(folder, layer, [expert], block), "has scales that are not positive"
        with pytest.raises(UserError, match=f"layer {layer}, expert {expert}, {block}: {says}"):
            read_published(open_model(published), layer, [expert], block, parse_scheme(name), weights)
        save_file(saved, file, metadata={"format": "pt"})
    assert f"{place}{codes}" in saved


@pytest.mark.parametrize(
    ("config", "name"),
    [
        (FP8, "w8a16_g128_sym_fp8_published"),
        ({"quant_method": "mxfp4"}, "w4a16_g32_sym_mxfp4_published"),
        (compressed("pack-quantized", num_bits=4, type="int", group_size=128), "w4a16_g128_sym_published"),
        (compressed("pack-quantized", num_bits=8, type="int", strategy="channel"), "w8a16_g-1_sym_published"),
        (
            compressed("float-quantized", num_bits=8, type="float", block_structure=[128, 128]),
            "w8a16_g128_sym_fp8_published",
        ),
    ],
)
def test_the_scheme_of_a_format(config: dict[str, Any], name: str) -> None:
    (source,) = source_formats(config, Path("config.json"))
    assert source.scheme() == parse_scheme(name)
    assert parse_scheme(name).name == name
    assert not is_tuned(parse_scheme(name)), "tune leaves it alone"
    plain = parse_scheme(name).kernel_scheme
    if plain.published:
        with pytest.raises(UserError, match="no GPU kernel"):
            kernel_format(plain)
    else:
        assert plain == parse_scheme(name.removesuffix("_published"))
        assert kernel_format(parse_scheme(name)) == kernel_format(plain)
        assert parse_scheme(name).bits(200) == plain.bits(200)


@pytest.mark.parametrize(
    ("config", "why"),
    [
        (
            FP8 | {"weight_block_size": None},
            r"only e4m3 with scales of square blocks \(weight_block_size\) has a scheme",
        ),
        (FP8 | {"weight_block_size": [1, 128]}, "only e4m3 with scales of square blocks"),
        (
            compressed("float-quantized", num_bits=8, type="float", strategy="channel"),
            "only e4m3 with scales of square",
        ),
        (compressed("int-quantized", num_bits=8, type="int", strategy="channel"), "only e4m3 with scales of square"),
        (compressed("nvfp4-pack-quantized", num_bits=4), "no scheme has groups of 16 whose scales are products of two"),
        (compressed("pack-quantized", num_bits=4, group_size=20), "group must be -1 .* or a multiple of 32"),
        (compressed("pack-quantized", num_bits=4, strategy="tensor"), "no scheme has one scale for a whole tensor"),
    ],
)
def test_what_no_scheme_has_is_refused_by_name(config: dict[str, Any], why: str) -> None:
    (source,) = source_formats(config, Path("config.json"))
    with pytest.raises(UserError, match=rf"^config\.json: {source.name} weights cannot stay as published: .*{why}"):
        source.scheme()


@pytest.mark.parametrize(
    ("config", "made", "why"),
    [
        (
            compressed("pack-quantized", num_bits=4, group_size=32),
            packed_int(random(16, 96), 4, 48),
            "stored otherwise",
        ),
        (
            compressed("pack-quantized", num_bits=4, group_size=32),
            packed_int(random(16, 96), 8, 32),
            "stored otherwise",
        ),
        (
            compressed("pack-quantized", num_bits=4, group_size=32),
            ({**packed_int(random(16, 96), 4, 32)[0], "_scale": torch.ones(16, 3)}, None),
            "scales of x.weight are F32, and those of w4a16_g32_sym_published bfloat16",
        ),
        (FP8, fp8(random(160, 96), (160, 96), "_scale_inv"), "stored otherwise"),
    ],
)
def test_headers_say_what_cannot_stay(config: dict[str, Any], made: Any, why: str, tmp_path: Path) -> None:
    save_file({f"x.weight{tail}": part for tail, part in made[0].items()}, tmp_path / "x.safetensors")
    stored = tensors_of(tmp_path / "x.safetensors")
    (source,) = source_formats(config, Path("config.json"))
    ((weight, parts),) = source.find(stored).items()
    tensor = Dequantized.of(weight, {part: stored[name] for part, name in parts.items()}, source, "bfloat16")
    with pytest.raises(UserError, match=why):
        tensor.check_kept(Place(weight), source.scheme())


def test_all_codes_of_words_and_blocks_that_are_cut(tmp_path: Path) -> None:
    for config, made in (
        (compressed("pack-quantized", num_bits=8, strategy="channel"), packed_int(random(6, 68), 8, 68)),
        (compressed("pack-quantized", num_bits=4, group_size=32), packed_int(random(9, 352), 4, 32)),
        (FP8, fp8(random(256, 200), (128, 128), "_scale_inv")),
        (FP8, fp8(random(128, 300), (128, 128), "_scale_inv", torch.bfloat16)),
    ):
        parts, weight = made
        save_file({f"x.weight{tail}": part for tail, part in parts.items()}, tmp_path / "x.safetensors")
        stored = tensors_of(tmp_path / "x.safetensors")
        (source,) = source_formats(config, Path("config.json"))
        ((name, own_parts),) = source.find(stored).items()
        tensor = Dequantized.of(name, {part: stored[one] for part, one in own_parts.items()}, source, "bfloat16")
        tensor.check_kept(Place(name), source.scheme())
        kept = kept_block(tensor, Place(name), source.scheme())
        assert np.array_equal(kept.dequantize().numpy(), weight)
        again = from_tensors(kept.scheme, weight.shape[1], kept.tensors())
        assert np.array_equal(again.dequantize().numpy(), weight)


def test_a_configuration_says_published(
    source: tuple[str, Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    format_, published, _ = source
    monkeypatch.chdir(ROOT)
    values = yaml.safe_load((ROOT / "config" / "config.yaml").read_text(encoding="utf-8"))
    values["model"]["path"] = str(published)
    values["calibrate"] |= {"schemes": ["w3a16", "published"], "quantizers": ["rtn", "gptq"]}
    values["sweep"] = [{"budget_bits": 8.5, "tokens": 64}]
    values["solve"] |= {"fix": ["layer:1/block:down=published"], "time_as": ["published=w4a16"]}
    config = load_config(values, "my.yaml")
    assert config.calibrate.schemes == ["w3a16_g128_asym", SCHEMES[format_]]
    assert config.solve.fix == [f"layer:1/block:down={SCHEMES[format_]}"]
    assert config.solve.time_as == [f"{SCHEMES[format_]}=w4a16"]
    assert values["calibrate"]["schemes"] == ["w3a16", "published"]

    turned = values | {"calibrate": values["calibrate"] | {"quantizers": ["rtn", "gptq", "rtn+hadamard"]}}
    with pytest.raises(
        UserError, match=rf"{SCHEMES[format_]}: published codes are not rotated; take it out, or rtn\+had"
    ):
        load_config(turned, "my.yaml")
    if format_ != "mxfp4":
        counted = values | {"solve": values["solve"] | {"time_as": []}}
        with pytest.raises(
            UserError, match=rf"scheme {SCHEMES[format_]}: no GPU kernel.*time_as: \[{SCHEMES[format_]}=w4a16"
        ):
            load_config(counted, "my.yaml")
    values["model"]["path"] = str(published.parent / "plain")
    with pytest.raises(UserError, match=r"plain/config\.json: no publisher quantized these weights, so none can stay"):
        load_config(values, "my.yaml")
    file = published / "config.json"
    config = json.loads(file.read_text())
    (tmp_path / "mixed").mkdir()
    stated = compressed("pack-quantized", num_bits=4, group_size=32)
    stated["config_groups"]["more"] = {"format": "float-quantized", "weights": {"block_structure": [128, 128]}}
    (tmp_path / "mixed" / "config.json").write_text(json.dumps(config | {"quantization_config": stated}))
    with pytest.raises(
        UserError, match=r"in several formats; .*: w4a16_g32_sym_published or w8a16_g128_sym_fp8_published"
    ):
        published_scheme(open_model(tmp_path / "mixed"))
