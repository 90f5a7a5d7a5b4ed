"""Packed checkpoints: what is on disk, what transformers loads, and that it computes what was calibrated."""

import itertools
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from synthetic import allocation_of
from transformers import AutoModelForCausalLM

import mxmoe_steps
from mxmoe_steps import calibrate, capture, evaluate, quantize
from mxmoe_steps.allocation.files import write_allocation
from mxmoe_steps.atomic import canonical_json
from mxmoe_steps.errors import UserError
from mxmoe_steps.models import shards
from mxmoe_steps.models.raw import tensors_of, write_tensors
from mxmoe_steps.models.streaming import StreamedModel
from mxmoe_steps.quantizers.grid import from_tensors, quantize_activations
from mxmoe_steps.quantizers.hadamard import rotate
from mxmoe_steps.schemes import BLOCKS, SHARED, parse_scheme

RUNTIME = {"device": "cpu"}
SCHEMES = ["w2a16_g128_asym", "w3a16_g128_asym", "w8a8_g-1_sym_fp8", "w4a8_g128_sym", "w16a16"]


@pytest.fixture(scope="module")
def assignment() -> list[list]:
    schemes = itertools.cycle(SCHEMES)
    return [[layer, expert, *(next(schemes) for _ in BLOCKS)] for layer in range(2) for expert in [SHARED, 0, 1, 2, 3]]


@pytest.fixture(scope="module")
def sources(text_file: Path) -> str:
    return canonical_json({"words": {"files": [str(text_file)], "separator": "-----"}})


@pytest.fixture(scope="module")
def packed(tiny_moe: Path, sources: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("packed")
    model = {"model": str(tiny_moe), "dtype": "float32", "trust_remote_code": False}
    text = {"sources": sources, "text": "words", "sequences": 4, "length": 64}
    capture.capture(
        capture.CaptureOptions(**model, **text, **RUNTIME, batch=4, gradient=False, out=str(root / "capture"))
    )
    for scheme in SCHEMES[:-1]:
        calibrate.calibrate(
            calibrate.CalibrateOptions(
                model=str(tiny_moe),
                capture=[str(root / "capture")],
                quantizer="rtn",
                scheme=scheme,
                damping=0.01,
                out=str(root / "rtn"),
                **RUNTIME,
            )
        )
    return root / "rtn"


@pytest.fixture(scope="module")
def checkpoint(tiny_moe: Path, packed: Path, assignment: list[list], tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("checkpoint")
    write_allocation(str(root / "allocation.json"), allocation_of(assignment, "rtn", tiny_moe))
    quantize.quantize(
        quantize.QuantizeOptions(
            trust_remote_code=False,
            model=str(tiny_moe),
            allocation=str(root / "allocation.json"),
            packed=str(packed),
            out=str(root / "out"),
        )
    )
    return root / "out"


def fake_quantized(tiny_moe: Path, packed: Path, assignment: list[list]) -> torch.nn.Module:
    """The original model with an experts forward that looks up each block's stored weights."""
    model = AutoModelForCausalLM.from_pretrained(tiny_moe, dtype=torch.float32)
    stores = {scheme: load_file(packed / f"{scheme}.safetensors") for scheme in SCHEMES[:-1]}

    def linear(layer: int, expert: int, number: int, name: str, x: torch.Tensor, original: torch.Tensor):
        scheme = parse_scheme(name)
        if scheme.is_original:
            return x @ original.T
        parts = {
            part: stores[name][key]
            for part in ("qweight", "scales", "zeros")
            if (key := f"{layer}.{expert}.{BLOCKS[number]}.{part}") in stores[name]
        }
        return quantize_activations(x, scheme) @ from_tensors(scheme, original.shape[1], parts).dequantize().T

    for layer, expert, *names in assignment:
        moe = model.model.layers[layer].mlp
        if expert == SHARED:
            weights = [moe.shared_expert.gate_proj, moe.shared_expert.up_proj, moe.shared_expert.down_proj]
            weights = [module.weight for module in weights]
        else:
            weights = [*moe.experts.gate_up_proj[expert].chunk(2), moe.experts.down_proj[expert]]

        def run(x, layer=layer, expert=expert, names=names, weights=weights):
            gate, up = (linear(layer, expert, n, names[n], x, weights[n]) for n in (0, 1))
            return linear(layer, expert, 2, names[2], torch.nn.functional.silu(gate) * up, weights[2])

        if expert == SHARED:
            moe.shared_expert.forward = run
        else:
            moe.experts.runs = {**getattr(moe.experts, "runs", {}), expert: run}
    for block in model.model.layers:
        experts = block.mlp.experts

        def forward(x, ids, weights, experts=experts):
            result = torch.zeros_like(x)
            for expert, run in experts.runs.items():
                result += run(x) * ((ids == expert) * weights).sum(-1, keepdim=True)
            return result

        experts.forward = forward
    return model


def test_packed_checkpoint_computes_what_was_calibrated(
    tiny_moe: Path, packed: Path, assignment: list[list], checkpoint: Path
) -> None:
    tokens = torch.randint(0, 300, (3, 40), generator=torch.Generator().manual_seed(0))
    model = mxmoe_steps.load_quantized(str(checkpoint))
    with torch.no_grad():
        got = model(tokens).logits
        expected = fake_quantized(tiny_moe, packed, assignment)(tokens).logits
        original = AutoModelForCausalLM.from_pretrained(tiny_moe, dtype=torch.float32)(tokens).logits
    assert (got - original).abs().max() > 0.05
    # e4m3 and int8 codes flip on last-bit differences of the activations; the rest is float32 rounding.
    assert (got - expected).norm() / (expected - original).norm() < 0.02


def test_a_rotated_checkpoint_computes_the_rotated_weights(tiny_moe: Path, packed: Path, tmp_path: Path) -> None:
    for scheme in ("w3a16_g32_asym", "w8a8_g-1_sym"):
        options = {"capture": [str(packed.parent / "capture")], "quantizer": "rtn+hadamard", "damping": 0.01}
        calibrate.calibrate(
            calibrate.CalibrateOptions(
                model=str(tiny_moe), scheme=scheme, out=str(tmp_path / "packed"), **options, **RUNTIME
            )
        )
    choice = ["w3a16_g32_asym", "w8a8_g-1_sym", "w16a16"]
    assignment = [[layer, expert, *choice] for layer in range(2) for expert in [SHARED, 0, 1, 2, 3]]
    allocation = allocation_of(assignment, "rtn+hadamard", tiny_moe)
    write_allocation(str(tmp_path / "allocation.json"), allocation)
    paths = {"allocation": str(tmp_path / "allocation.json"), "packed": str(tmp_path / "packed")}
    quantize.quantize(
        quantize.QuantizeOptions(trust_remote_code=False, model=str(tiny_moe), out=str(tmp_path / "out"), **paths)
    )

    expected = AutoModelForCausalLM.from_pretrained(tiny_moe, dtype=torch.float32)
    store = load_file(tmp_path / "packed" / "w3a16_g32_asym.safetensors")
    with torch.no_grad():  # 8-bit blocks stay as they were; the 3-bit ones carry nearly all of the damage
        for layer in range(2):
            moe = expected.model.layers[layer].mlp
            weights = [moe.shared_expert.gate_proj.weight, *(expert.chunk(2)[0] for expert in moe.experts.gate_up_proj)]
            for expert, weight in zip([SHARED, 0, 1, 2, 3], weights, strict=True):
                parts = {part: store[f"{layer}.{expert}.gate.{part}"] for part in ("qweight", "scales", "zeros")}
                weight.copy_(rotate(from_tensors(parse_scheme(choice[0]), 64, parts).dequantize()))
        tokens = torch.randint(0, 300, (3, 40), generator=torch.Generator().manual_seed(0))
        got = mxmoe_steps.load_quantized(str(tmp_path / "out"))(tokens).logits
        original = AutoModelForCausalLM.from_pretrained(tiny_moe, dtype=torch.float32)(tokens).logits
        expected = expected(tokens).logits
    assert (got - expected).norm() / (expected - original).norm() < 0.1


def test_weights_on_disk_are_as_small_as_the_bits_say(checkpoint: Path, assignment: list[list]) -> None:
    tensors = load_file(checkpoint / "model.safetensors")
    for layer, expert, *names in assignment:
        inner = "shared_expert" if expert == SHARED else f"experts.{expert}"
        for block, name in zip(BLOCKS, names, strict=True):
            prefix = f"model.layers.{layer}.mlp.{inner}.{block}_proj."
            stored = {key: value for key, value in tensors.items() if key.startswith(prefix)}
            rows, columns = (64, 160 if expert == SHARED else 96) if block == "down" else (
                160 if expert == SHARED else 96, 64)  # fmt: skip
            bits = sum(8 * tensor.nbytes for tensor in stored.values())
            expected = 32 if name == "w16a16" else parse_scheme(name).bits(columns)  # the fixture is float32
            assert bits == pytest.approx(rows * columns * expected)


def test_saving_the_loaded_model_again_changes_nothing(checkpoint: Path, tmp_path: Path) -> None:
    model = mxmoe_steps.load_quantized(str(checkpoint))
    model.save_pretrained(tmp_path)
    before, after = load_file(checkpoint / "model.safetensors"), load_file(tmp_path / "model.safetensors")
    assert {name for name in before if name != "lm_head.weight"} == {n for n in after if n != "lm_head.weight"}
    assert all(torch.equal(before[name], after[name]) for name in after)
    tokens = torch.arange(20).unsqueeze(0)
    with torch.no_grad():
        again = mxmoe_steps.load_quantized(str(tmp_path))
        assert torch.equal(model(tokens).logits, again(tokens).logits)


def test_generation_runs(checkpoint: Path) -> None:
    model = mxmoe_steps.load_quantized(str(checkpoint))
    out = model.generate(torch.arange(5).unsqueeze(0), max_new_tokens=4, do_sample=False)
    assert out.shape == (1, 9)


def test_the_same_allocation_gives_the_same_bytes(
    tiny_moe: Path, packed: Path, assignment: list[list], checkpoint: Path, tmp_path: Path
) -> None:
    write_allocation(str(tmp_path / "allocation.json"), allocation_of(assignment[::-1], "rtn", tiny_moe))
    quantize.quantize(
        quantize.QuantizeOptions(
            trust_remote_code=False,
            model=str(tiny_moe),
            allocation=str(tmp_path / "allocation.json"),
            packed=str(packed),
            out=str(tmp_path / "out"),
        )
    )
    for file in checkpoint.iterdir():
        assert file.read_bytes() == (tmp_path / "out" / file.name).read_bytes(), file.name


def test_large_checkpoints_are_sharded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "_SHARD_BYTES", 1000)
    tensors = {f"t{number}": torch.full((60,), float(number)) for number in range(10)}  # 240 bytes each
    save_file(tensors, tmp_path / "source.safetensors")
    shards.write_shards(list(tensors_of(tmp_path / "source.safetensors").items()), tmp_path)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"]
    assert sorted(index) == sorted(tensors)
    assert sorted(set(index.values())) == [f"model-{n:05d}-of-00003.safetensors" for n in (1, 2, 3)]
    for name, file in index.items():
        assert torch.equal(load_file(tmp_path / file)[name], tensors[name])


def test_copied_tensors_keep_their_bytes_and_alignment(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    tensors = {
        "bytes": torch.randint(0, 256, (3, 7), generator=generator, dtype=torch.uint8),
        "halves": torch.randn(5, 3, generator=generator).bfloat16(),
        "empty": torch.zeros(0, 4),
        "scalar": torch.tensor(2.5, dtype=torch.float64),
    }
    save_file(tensors, tmp_path / "source.safetensors")
    write_tensors(tmp_path / "copy.safetensors", tensors_of(tmp_path / "source.safetensors").items())
    copied = load_file(tmp_path / "copy.safetensors")
    assert {name: (t.dtype, t.shape) for name, t in copied.items()} == {
        name: (t.dtype, t.shape) for name, t in tensors.items()
    }
    assert all(torch.equal(copied[name], tensors[name]) for name in tensors)
    for tensor in tensors_of(tmp_path / "copy.safetensors").values():
        assert tensor.start % {"U8": 1, "BF16": 2, "F32": 4, "F64": 8}[tensor.dtype] == 0


def test_a_truncated_checkpoint_is_named(tmp_path: Path) -> None:
    (tmp_path / "broken.safetensors").write_bytes(b"\xff" * 12)
    with pytest.raises(UserError, match=r"broken.safetensors: not a readable safetensors file"):
        tensors_of(tmp_path / "broken.safetensors")


def test_stacked_experts_give_the_same_checkpoint(
    tiny_moe: Path, packed: Path, checkpoint: Path, assignment: list[list], tmp_path: Path
) -> None:
    """transformers 5 may save gate and up of all experts as one tensor, and down as another."""
    shutil.copytree(tiny_moe, tmp_path / "stacked")
    model = AutoModelForCausalLM.from_pretrained(tiny_moe, dtype=torch.float32)
    model.save_pretrained(tmp_path / "stacked", save_original_format=False)
    assert "model.layers.0.mlp.experts.gate_up_proj" in tensors_of(tmp_path / "stacked" / "model.safetensors")
    for quantizer, scheme in (("rtn", "w3a16_g128_asym"), ("gptq", "w8a8_fp8"), ("gptq", "w4a16_mxfp4")):
        options = {"quantizer": quantizer, "scheme": scheme}
        for name, folder in (("one", tiny_moe), ("other", tmp_path / "stacked")):
            capture_folder, out = [str(packed.parent / "capture")], str(tmp_path / name)
            calibrate.calibrate(
                calibrate.CalibrateOptions(
                    model=str(folder), capture=capture_folder, damping=0.01, out=out, **options, **RUNTIME
                )
            )
    for file in (tmp_path / "one").iterdir():
        assert file.read_bytes() == (tmp_path / "other" / file.name).read_bytes()
    allocation = allocation_of(assignment, "rtn", tiny_moe)
    write_allocation(str(tmp_path / "allocation.json"), allocation)
    paths = {"allocation": str(tmp_path / "allocation.json"), "packed": str(packed), "out": str(tmp_path / "out")}
    quantize.quantize(quantize.QuantizeOptions(trust_remote_code=False, model=str(tmp_path / "stacked"), **paths))
    name = "model.safetensors"
    assert (tmp_path / "out" / name).read_bytes() == (checkpoint / name).read_bytes()


REMOTE = """
from transformers import Qwen2MoeForCausalLM

class Doubled(Qwen2MoeForCausalLM):
    def __init__(self, config):
        super().__init__(config)
        self.model.norm.variance_epsilon = 1.0
"""


@pytest.mark.parametrize("trusted", [False, True])
def test_code_that_comes_with_the_model_goes_with_it_if_it_is_trusted(
    tiny_moe: Path, packed: Path, checkpoint: Path, tmp_path: Path, trusted: bool
) -> None:
    shutil.copytree(tiny_moe, tmp_path / "model")
    (tmp_path / "model" / "remote.py").write_text(REMOTE)
    config = json.loads((tiny_moe / "config.json").read_text())
    config |= {"auto_map": {"AutoModelForCausalLM": "remote.Doubled"}}
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    paths = {
        "allocation": str(checkpoint.parent / "allocation.json"),
        "packed": str(packed),
        "out": str(tmp_path / "out"),
    }
    quantize.quantize(quantize.QuantizeOptions(trust_remote_code=trusted, model=str(tmp_path / "model"), **paths))
    assert (tmp_path / "out" / "remote.py").is_file() == trusted
    assert ("auto_map" in json.loads((tmp_path / "out" / "config.json").read_text())) == trusted
    model = StreamedModel(tmp_path / "out", "float32", "cpu", trusted)
    assert type(model.model).__name__ == ("Doubled" if trusted else "Qwen2MoeForCausalLM")
    assert model.decoder.norm.variance_epsilon == (1.0 if trusted else 1e-6)
    loaded = mxmoe_steps.load_quantized(str(tmp_path / "out"), trust_remote_code=trusted)
    assert type(loaded).__name__ == type(model.model).__name__


def test_a_packed_checkpoint_keeps_the_dtype_of_the_weights(
    tiny_moe: Path, packed: Path, checkpoint: Path, tmp_path: Path
) -> None:
    """Where config.json names none, scales, which are bfloat16, would decide."""
    shutil.copytree(tiny_moe, tmp_path / "model")
    config = json.loads((tiny_moe / "config.json").read_text())
    del config["dtype"]
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    paths = {
        "allocation": str(checkpoint.parent / "allocation.json"),
        "packed": str(packed),
        "out": str(tmp_path / "out"),
    }
    quantize.quantize(quantize.QuantizeOptions(trust_remote_code=False, model=str(tmp_path / "model"), **paths))
    assert StreamedModel(tmp_path / "out", "auto", "cpu").dtype == torch.float32
    assert mxmoe_steps.load_quantized(tmp_path / "out").dtype == torch.float32


def test_an_allocation_of_another_model_is_refused(
    tiny_moe: Path, packed: Path, assignment: list[list], tmp_path: Path
) -> None:
    write_allocation(str(tmp_path / "allocation.json"), allocation_of(assignment[:-1], "rtn", tiny_moe))
    options = {"allocation": str(tmp_path / "allocation.json"), "packed": str(packed), "out": str(tmp_path / "out")}
    with pytest.raises(UserError, match="layer 1, expert 3 is not in both"):
        quantize.quantize(quantize.QuantizeOptions(trust_remote_code=False, model=str(tiny_moe), **options))
    assert [path.name for path in tmp_path.iterdir()] == ["allocation.json"]


def test_evaluation_matches_the_models_own_loss(tiny_moe: Path, checkpoint: Path, sources: str, tmp_path: Path) -> None:
    text = {"sources": sources, "texts": ["words"], "sequences": 6, "length": 48}
    options = {"dtype": "float32", "batch": 4, **RUNTIME}
    kept = str(tmp_path / "reference.safetensors")
    evaluate.evaluate(
        evaluate.EvaluateOptions(
            model=str(tiny_moe),
            save_reference=kept,
            out=str(tmp_path / "original.json"),
            **text,
            **options,
        )
    )
    evaluate.evaluate(
        evaluate.EvaluateOptions(
            model=str(checkpoint),
            reference=kept,
            out=str(tmp_path / "packed.json"),
            **options,
        )
    )
    original, result = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("original", "packed"))
    assert original["overall"]["kl"] == 0
    from mxmoe_steps.data.parsing import parse_sources
    from mxmoe_steps.data.tokens import load_sequences
    from mxmoe_steps.models.loading import load_tokenizer

    tokens = load_sequences(parse_sources(json.loads(sources)), "words", "test", load_tokenizer(tiny_moe), 48, 6, 0)
    tokens = torch.from_numpy(tokens)
    with torch.no_grad():
        p = torch.log_softmax(
            AutoModelForCausalLM.from_pretrained(tiny_moe, dtype=torch.float32)(tokens).logits[:, :-1].double(), -1
        )
        model = mxmoe_steps.load_quantized(str(checkpoint), dtype="float32")
        output = model(tokens, labels=tokens)
        q = torch.log_softmax(output.logits[:, :-1].double(), -1)
    assert result["overall"]["nll"] == pytest.approx(float(output.loss), rel=1e-5)
    assert result["overall"]["kl"] == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), rel=1e-4)
    assert result["weights_bytes"] == (checkpoint / "model.safetensors").stat().st_size
