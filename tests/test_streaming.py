"""Models run one layer at a time: what transformers computes whole, resumed or in ranges; and bad weights."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import capture_tokens, make_checkpoint, make_model, moe_of
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers.core_model_loading import MergeModulelist

from mxmoe_steps import capture, evaluate, trace
from mxmoe_steps.atomic import canonical_json
from mxmoe_steps.errors import UserError
from mxmoe_steps.gating import CLAMPED, SWIGLU, Gating
from mxmoe_steps.models.adapters import FAMILIES
from mxmoe_steps.models.families import open_model
from mxmoe_steps.models.loading import auto_class
from mxmoe_steps.models.rows import read_rows, write_rows
from mxmoe_steps.models.streaming import StreamedModel
from mxmoe_steps.timing.traffic import sample_traffic

RUNTIME = {"device": "cpu", "threads": 1, "seed": 0, "batch": 3}
WINDOWS: dict[str, dict[str, Any]] = {  # attention that differs from layer to layer
    "mixtral": {"sliding_window": 8},
    "phimoe": {"sliding_window": 8},
    "qwen2_moe": {"use_sliding_window": True, "max_window_layers": 1, "sliding_window": 8},
    "qwen3_moe": {"use_sliding_window": True, "max_window_layers": 1, "sliding_window": 8},
    "gpt_oss": {"sliding_window": 8},
    "minimax": {"layer_types": ["linear_attention", "full_attention"]},
}


def whole_model(
    family: str, checkpoint: Path, tokens: torch.Tensor
) -> tuple[dict[int, dict[str, Any]], list[torch.Tensor]]:
    """transformers' own forward and backward of everything: captured tensors by layer, and log-probabilities."""
    folder = open_model(checkpoint)
    model = auto_class(folder).from_pretrained(checkpoint, dtype=torch.float32).requires_grad_(False)
    found: dict[int, dict[str, Any]] = {layer: {} for layer in folder.moe_layers}
    for layer in folder.moe_layers:
        moe = moe_of(model, family, layer)

        def chose(_module: Any, args: Any, output: Any, layer: int = layer) -> None:
            weights, ids = output[0].max(-1, keepdim=True)
            enter(None, (args[0], ids, weights), layer)

        factor = getattr(moe, FAMILIES[family].routed_factor or "", 1.0)

        def enter(_module: Any, args: Any, layer: int = layer, factor: float = factor) -> None:
            args = (*args[:2], args[2] * factor)
            for name, tensor in zip(("hidden", "ids", "weights"), args, strict=True):
                found[layer].setdefault(name, []).append(tensor.detach())

        def leave(_module: Any, _args: Any, output: Any, layer: int = layer) -> Any:
            first = output[0] if isinstance(output, tuple) else output
            probe = torch.zeros_like(first, requires_grad=True)
            found[layer].setdefault("probes", []).append(probe)
            return (first + probe, *output[1:]) if isinstance(output, tuple) else first + probe

        if FAMILIES[family].scales_inputs:
            moe.router.register_forward_hook(chose)
        else:
            moe.experts.register_forward_pre_hook(enter)
        (moe.experts if not FAMILIES[family].moe else moe).register_forward_hook(leave)
    generator = torch.Generator().manual_seed(2)
    results = []
    for run in tokens.split(2):
        log_probs = torch.log_softmax(model(run, use_cache=False).logits.float(), -1).flatten(0, 1)
        labels = torch.multinomial(log_probs.detach().exp(), 1, generator=generator)
        (-log_probs.gather(-1, labels).sum()).backward()
        results.append(log_probs.detach())
    for tensors in found.values():
        tensors["gradient"] = [probe.grad.reshape(-1, probe.shape[-1]) for probe in tensors.pop("probes")]
    return {layer: {name: torch.cat(v) for name, v in found[layer].items()} for layer in found}, results


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_a_streamed_model_equals_the_whole_one(family: str, tmp_path: Path) -> None:
    make_checkpoint(family, tmp_path / "model", **WINDOWS.get(family, {}))
    tokens = torch.randint(3, 96, (5, 24), generator=torch.Generator().manual_seed(1))
    expected, log_probs = whole_model(family, tmp_path / "model", tokens)
    got = capture_tokens(tmp_path / "model", tokens, tmp_path / "capture")
    assert sorted(got) == sorted(expected)
    for layer, tensors in expected.items():
        assert torch.equal(got[layer]["hidden"], tensors["hidden"])
        assert torch.equal(got[layer]["ids"].long(), tensors["ids"])
        assert torch.equal(got[layer]["weights"], tensors["weights"].float())
        # the same sums in the same order, but for the head, where autograd meets [n, V] in one piece or another
        scale = tensors["gradient"].abs().max()
        assert scale > 0
        assert torch.allclose(got[layer]["gradient"], tensors["gradient"], rtol=1e-4, atol=1e-6 * float(scale))

    model = StreamedModel(tmp_path / "model", "float32", "cpu")
    with torch.no_grad():
        with model.loaded(model.embedding):
            hidden = model.embed(tokens[:2])
        for layer in range(model.layers):
            with model.loaded(model.layer_path(layer)):
                hidden = model.run_layer(layer, hidden)
        with model.head():
            assert torch.equal(model.log_probs(model.final_norm(hidden.flatten(0, 1))), log_probs[0])
    assert all(parameter.is_meta for parameter in model.model.parameters())


@pytest.fixture(scope="module")
def deep_moe(tiny_moe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five layers, the first dense, with the tokenizer of `tiny_moe`."""
    path = tmp_path_factory.mktemp("deep")
    make_checkpoint("deepseek_v2", path, num_hidden_layers=5, vocab_size=320, max_position_embeddings=256)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(tiny_moe / name, path / name)
    return path


@pytest.fixture(scope="module")
def sources(text_file: Path) -> str:
    return canonical_json({name: {"files": [str(text_file)], "separator": "-----"} for name in ("words", "more")})


OPTIONS: dict[Any, Any] = {
    trace.trace: trace.TraceOptions,
    capture.capture: capture.CaptureOptions,
    evaluate.evaluate: evaluate.EvaluateOptions,
}


def run(step: Callable[[Any], None], model: Path, sources: str, out: Path, **options: Any) -> None:
    """A step on seven sequences of 24 tokens, three at a time."""
    runtime = {"device": "cpu", "batch": 3, "dtype": "float32"}
    text = {"sources": sources, "sequences": 7, "length": 24}
    text |= {"text": "words"} if step is capture.capture else {"texts": ["words", "more"]}
    step(OPTIONS[step](**({"model": str(model), "out": out} | runtime | text | options)))


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


@pytest.mark.parametrize("gradient", [True, False])
def test_a_capture_in_parts_writes_the_bytes_of_one_job(
    deep_moe: Path, sources: str, tmp_path: Path, gradient: bool
) -> None:
    run(capture.capture, deep_moe, sources, tmp_path / "whole", gradient=gradient)
    for until in (2, 4):
        run(capture.capture, deep_moe, sources, tmp_path / "parts", until=until, gradient=gradient)
    for down_to in [4, 2] if gradient else []:
        run(capture.capture, deep_moe, sources, tmp_path / "parts", down_to=down_to)
    run(capture.capture, deep_moe, sources, tmp_path / "parts", gradient=gradient)
    assert sorted(contents(tmp_path / "whole")) == [f"layer-{layer:03d}.safetensors" for layer in (1, 2, 3, 4)]
    assert contents(tmp_path / "parts") == contents(tmp_path / "whole")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["parts", "whole"], "no border files stay behind"
    with safe_open(tmp_path / "whole" / "layer-002.safetensors", "pt") as file:
        assert ("gradient" in set(file.keys())) == gradient
        assert json.loads(file.metadata()["mxmoe"])["layer"] == 2


def test_a_trace_says_what_gating_takes_a_launch_of_its_own(
    tiny_moe: Path, deep_moe: Path, sources: str, tmp_path: Path
) -> None:
    make_checkpoint("gpt_oss", tmp_path / "model", vocab_size=320, max_position_embeddings=256, num_hidden_layers=1)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(tiny_moe / name, tmp_path / "model" / name)
    for model, expected in ((tmp_path / "model", Gating(CLAMPED, biased=True)), (deep_moe, SWIGLU)):
        run(trace.trace, model, sources, tmp_path / "trace")
        assert sample_traffic(tmp_path / "trace", [], 8).gating == expected


def test_a_trace_in_parts_writes_the_bytes_of_one_job(deep_moe: Path, sources: str, tmp_path: Path) -> None:
    run(trace.trace, deep_moe, sources, tmp_path / "whole")
    for until in (3, 4, None):
        run(trace.trace, deep_moe, sources, tmp_path / "parts", until=until, borders=str(tmp_path / "borders"))
    assert contents(tmp_path / "parts") == contents(tmp_path / "whole")
    assert not (tmp_path / "borders").exists()


@pytest.mark.parametrize("step", [trace.trace, capture.capture, evaluate.evaluate])
def test_a_killed_run_goes_on_at_the_last_border(
    step: Callable[[Any], None],
    deep_moe: Path,
    sources: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Killed at every layer in turn, in the middle of its runs: each layer's work is done once, plus the torn part."""
    extra = {"save_reference": str(tmp_path / "kept")} if step is evaluate.evaluate else {}
    run(step, deep_moe, sources, tmp_path / "whole", **extra)
    original = StreamedModel.run_layer
    calls: list[int] = []

    def count(self: StreamedModel, layer: int, hidden: torch.Tensor) -> torch.Tensor:
        calls.append(layer)
        if len(calls) in stops:
            raise KeyboardInterrupt
        return original(self, layer, hidden)

    monkeypatch.setattr(StreamedModel, "run_layer", count)
    stops: set[int] = set()
    run(step, deep_moe, sources, tmp_path / "counted", **extra)
    uninterrupted = len(calls)
    calls.clear()
    stops = {2, 6, 13, 20, 27}
    while True:
        try:
            run(step, deep_moe, sources, tmp_path / "resumed", **extra)
            break
        except KeyboardInterrupt:
            assert not (tmp_path / "resumed").exists()
    assert len(calls) <= uninterrupted + 3 * len([stop for stop in stops if stop <= len(calls)])
    same = (
        path.read_bytes() if path.is_file() else contents(path) for path in (tmp_path / "resumed", tmp_path / "whole")
    )
    assert next(same) == next(same)
    assert not (tmp_path / "resumed.borders").exists()


def test_files_lost_at_the_end_are_not_passed_over(deep_moe: Path, sources: str, tmp_path: Path) -> None:
    run(capture.capture, deep_moe, sources, tmp_path / "whole")
    run(capture.capture, deep_moe, sources, tmp_path / "out", down_to=1)
    (tmp_path / "out.borders" / "layer-002.safetensors").unlink()
    with pytest.raises(UserError, match=r"layer-002.safetensors was lost .* run capture again"):
        run(capture.capture, deep_moe, sources, tmp_path / "out")
    run(capture.capture, deep_moe, sources, tmp_path / "out")
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_borders_of_another_text_or_model_are_not_taken_up(deep_moe: Path, sources: str, tmp_path: Path) -> None:
    borders = str(tmp_path / "borders")
    run(capture.capture, deep_moe, sources, tmp_path / "none", until=3, borders=borders)
    run(capture.capture, deep_moe, sources, tmp_path / "out", borders=borders, seed=1)
    run(capture.capture, deep_moe, sources, tmp_path / "clean", seed=1)
    assert contents(tmp_path / "out") == contents(tmp_path / "clean")


@pytest.mark.parametrize("fused", [False, True], ids=["per expert", "fused"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_checkpoint_layouts(tmp_path: Path, fused: bool, tied: bool) -> None:
    """One tensor per expert or fused 3-D experts, in one file or shards, with or without a head of its own."""
    model = make_model("qwen2_moe", tie_word_embeddings=tied)
    size = "10GB" if fused else "50KB"
    model.save_pretrained(tmp_path / "model", save_original_format=not fused, max_shard_size=size)
    assert (tmp_path / "model" / "model.safetensors").is_file() == fused
    tokens = torch.randint(3, 96, (2, 16), generator=torch.Generator().manual_seed(1))
    streamed = StreamedModel(tmp_path / "model", "float32", "cpu")
    assert ("lm_head.weight" in streamed.folder.files) != tied
    assert streamed.folder.moe_layers == [0, 1]
    with torch.no_grad():
        with streamed.loaded("model.embed_tokens"):
            hidden = streamed.embed(tokens)
        for layer in range(2):
            with streamed.loaded(streamed.layer_path(layer)):
                hidden = streamed.run_layer(layer, hidden)
        with streamed.head():
            got = streamed.log_probs(streamed.decoder.norm(hidden))
        assert torch.equal(got, torch.log_softmax(model(tokens).logits, -1))
    assert all(parameter.is_meta for parameter in streamed.model.parameters())


def rewrite(file: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def shard_of(model: Path, tensor: str) -> Path:
    return open_model(model).files[tensor]


UP = "model.layers.3.mlp.experts.2.up_proj.weight"
SHARED_DOWN = "model.layers.2.mlp.shared_experts.down_proj.weight"
NORM = "model.layers.3.input_layernorm.weight"


def nan_in(model: Path, tensor: str) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[tensor].view(-1)[5] = float("nan")

    rewrite(shard_of(model, tensor), change)


def overflowing(model: Path) -> None:
    """Weights that are finite, and whose product is not."""
    for block in ("up", "down"):
        name = f"model.layers.3.mlp.experts.2.{block}_proj.weight"
        rewrite(shard_of(model, name), lambda tensors, name=name: tensors[name].mul_(1e30))


def truncated(model: Path, tensor: str) -> None:
    file = shard_of(model, tensor)
    file.write_bytes(file.read_bytes()[:-100])


def absent(model: Path, tensor: str) -> None:
    rewrite(shard_of(model, tensor), lambda tensors: tensors.pop(tensor))


def unlisted(model: Path, tensor: str) -> None:
    index = model / "model.safetensors.index.json"
    values = json.loads(index.read_text())
    del values["weight_map"][tensor]
    index.write_text(json.dumps(values))


def misshapen(model: Path, tensor: str) -> None:
    rewrite(shard_of(model, tensor), lambda tensors: tensors.update({tensor: torch.zeros(7)}))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda model: nan_in(model, UP), "layer 3, expert 2, up: the weights hold NaN or infinity"),
        (lambda model: nan_in(model, SHARED_DOWN), "layer 2, expert -1, down: the weights hold NaN or infinity"),
        (lambda model: nan_in(model, NORM), r"model.layers.3.input_layernorm.weight: the weights hold NaN"),
        (overflowing, r"layer 3, experts 2: \d+ of \d+ tokens leave it as NaN or infinity in float32"),
        (lambda model: truncated(model, UP), r"model-000\d+-of-000\d+.safetensors: missing, truncated"),
        (lambda model: shard_of(model, UP).unlink(), r"model-000\d+-of-000\d+.safetensors: missing, though"),
        (lambda model: absent(model, NORM), "holds no tensor model.layers.3.input_layernorm.weight, which the"),
        (lambda model: unlisted(model, NORM), "no weights for model.layers.3.input_layernorm.weight"),
        (lambda model: misshapen(model, NORM), "model.layers.3.*does not fit what config.json describes"),
    ],
)
def test_a_broken_checkpoint_is_named(
    deep_moe: Path, sources: str, tmp_path: Path, damage: Callable[[Path], None], message: str
) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(deep_moe, broken)
    damage(broken)
    with pytest.raises(UserError, match=message):
        run(capture.capture, broken, sources, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_memory_that_runs_out_is_called_so(deep_moe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers collects what its converters raise, also what no checkpoint is to blame for."""
    model = StreamedModel(deep_moe, "float32", "cpu")
    says = r"no memory for model\.layers\.3\.mlp\.experts\.\w+, of model\.layers\.3; run fewer jobs at a time"
    with monkeypatch.context() as patch:
        patch.setattr(MergeModulelist, "convert", lambda *_, **__: torch.empty(1 << 58))
        with pytest.raises(UserError, match=says), model.loaded("model.layers.3"):
            pass
    monkeypatch.setattr(MergeModulelist, "convert", lambda *_, **__: torch.ones(2, 3).view(7))
    with pytest.raises(UserError, match=r"does not fit what config\.json describes"), model.loaded("model.layers.3"):
        pass


def test_an_unsupported_family_lists_the_supported_ones(deep_moe: Path, tmp_path: Path) -> None:
    config = json.loads((deep_moe / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"model_type": "bamba"}))
    with pytest.raises(UserError, match="'bamba' is not supported; supported are " + ", ".join(sorted(FAMILIES))):
        StreamedModel(tmp_path, "float32", "cpu")


def test_an_original_in_a_format_that_is_not_read_is_refused(deep_moe: Path, tmp_path: Path) -> None:
    config = json.loads((deep_moe / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"quantized already \(gptq\)"):
        open_model(tmp_path)


def test_rows_written_in_runs_are_one_safetensors_file(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    tensors = {
        "wide": torch.randn(7, 5, 3, generator=generator, dtype=torch.float64),
        "half": torch.randn(7, 2, generator=generator).bfloat16(),
        "ids": torch.randint(-9, 9, (7,), generator=generator).to(torch.int16),
    }
    path = tmp_path / "rows.safetensors"
    layout = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    with write_rows(path, layout, {"made": "here"}) as writer:
        for rows in (slice(0, 3), slice(3, 4), slice(4, 7)):
            for name, tensor in tensors.items():
                writer.append(name, tensor[rows])
    found = load_file(path)
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())
    assert torch.equal(read_rows(path, "half", slice(2, 5)), tensors["half"][2:5])

    def torn() -> None:
        with write_rows(path, layout, {}) as writer:
            writer.append("wide", tensors["wide"])
            writer.append("half", tensors["half"][:4])
            writer.append("ids", tensors["ids"])

    with pytest.raises(ValueError, match="half: 12 bytes were never written"):
        torn()
    assert torch.equal(load_file(path)["ids"], tensors["ids"]), "the old file stays"


def damage(file: Path, how: str) -> None:
    data = bytearray(file.read_bytes())
    if how == "cut":
        data = data[: len(data) // 2]
    elif how == "flipped":
        data[-9] ^= 0x10
    else:
        data = bytearray(b"\xff" * 12)
    file.write_bytes(data)


@pytest.fixture(scope="module")
def whole_capture(deep_moe: Path, sources: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("whole") / "capture"
    run(capture.capture, deep_moe, sources, out)
    return out


@pytest.mark.parametrize(
    ("name", "how"),
    [
        ("key", "cut"),
        ("layer-004", "cut"),  # calibrate sees what is flipped there
        *((name, how) for name in ("hidden-004", "hidden-002", "gradient-004") for how in ("cut", "flipped", "other")),
    ],
)
def test_damaged_files_of_an_earlier_capture_are_made_again(
    deep_moe: Path, sources: str, tmp_path: Path, whole_capture: Path, name: str, how: str
) -> None:
    run(capture.capture, deep_moe, sources, tmp_path / "out", down_to=4)
    (file,) = (tmp_path / "out.borders").glob(f"{name}.*")
    damage(file, how)
    run(capture.capture, deep_moe, sources, tmp_path / "out")
    assert contents(tmp_path / "out") == contents(whole_capture)


@pytest.mark.parametrize("how", ["cut", "other"])
@pytest.mark.parametrize("name", ["hidden-003", "routing-002", "key"])
def test_damaged_files_of_an_earlier_trace_are_made_again(
    deep_moe: Path, sources: str, tmp_path: Path, name: str, how: str
) -> None:
    run(trace.trace, deep_moe, sources, tmp_path / "whole")
    run(trace.trace, deep_moe, sources, tmp_path / "out", until=3)
    (file,) = (tmp_path / "out.borders").glob(f"{name}.*")
    damage(file, how)
    run(trace.trace, deep_moe, sources, tmp_path / "out")
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_damaged_routing_of_an_earlier_trace_does_not_stay(deep_moe: Path, sources: str, tmp_path: Path) -> None:
    run(trace.trace, deep_moe, sources, tmp_path / "whole")
    run(trace.trace, deep_moe, sources, tmp_path / "out", until=3)
    damage(tmp_path / "out.borders" / "routing-002.safetensors", "flipped")
    with pytest.raises(UserError, match=r"routing-002.safetensors: damaged"):
        run(trace.trace, deep_moe, sources, tmp_path / "out")
    run(trace.trace, deep_moe, sources, tmp_path / "out")
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


@pytest.mark.parametrize("family", ["gemma4", "gpt_oss", "jamba", "kimi_k25", "llama4", "qwen2_moe", "qwen3_vl_moe"])
def test_the_whole_model_is_that_of_transformers(family: str, tmp_path: Path) -> None:
    make_checkpoint(family, tmp_path / "model", tie_word_embeddings=family == "qwen2_moe")
    streamed = StreamedModel(tmp_path / "model", "float32", "cpu")
    expected = auto_class(streamed.folder).from_pretrained(tmp_path / "model", dtype=torch.float32).eval()
    tokens = torch.tensor([[5, 6, 7, 8, 9, 10, 3, 4]])
    with torch.no_grad(), streamed.whole() as model:
        torch.testing.assert_close(model(tokens).logits, expected(tokens).logits, rtol=0, atol=1e-5)
        written = [one.generate(tokens, max_new_tokens=4, do_sample=False) for one in (model, expected)]
        assert torch.equal(*written)
    assert all(parameter.is_meta for parameter in streamed.model.parameters())
