"""Tuning of packed weights: its arithmetic, its gradients, and the step, whole, killed and in parts."""

import itertools
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import capture_tokens, make_checkpoint
from family_sizes import FAMILY_SIZES
from packed import pack
from safetensors.torch import load_file, save_file

import mxmoe_steps
from mxmoe_steps import capture, tune
from mxmoe_steps.atomic import canonical_json
from mxmoe_steps.data.reading import read_texts
from mxmoe_steps.errors import UserError
from mxmoe_steps.evaluations import read_manifest
from mxmoe_steps.models.adapters import FAMILIES
from mxmoe_steps.models.borders import Borders, forward, unwatched
from mxmoe_steps.models.families import open_model
from mxmoe_steps.models.gating import Gating
from mxmoe_steps.models.rows import read_rows
from mxmoe_steps.models.streaming import StreamedModel
from mxmoe_steps.options.shared import Waiting
from mxmoe_steps.quantizers.grid import fixed_zeros, round_to_nearest
from mxmoe_steps.quantizers.hadamard import rotate
from mxmoe_steps.schemes import SHARED, parse_scheme
from mxmoe_steps.tuning import layer
from mxmoe_steps.tuning.blocks import TunedBlocks
from mxmoe_steps.tuning.experts import Block, Experts, Rows, summed
from mxmoe_steps.tuning.reading import PackedFolder, read_layer, read_text

SCHEMES = ["w2a16_g32", "w16a16", "w4a8_g32", "w8a8_fp8", "w1a16_g64", "w4a16_mxfp4", "w8a8", "w3a16_g32_sym", "w6a16"]
TUNED = {"w2a16_g32", "w4a8_g32", "w1a16_g64", "w4a16_mxfp4", "w3a16_g32_sym"}
RUNTIME = {"device": "cpu", "dtype": "float32", "trust_remote_code": False}
DOMAINS = ["words", "tail"]


def mixed(layer: int, expert: int) -> tuple[str, str, str]:
    """Every scheme in every place, sooner or later."""
    first = 7 * layer + 3 * (expert + 1)
    gate, up, down = (SCHEMES[(first + number) % len(SCHEMES)] for number in range(3))
    return gate, up, down


@pytest.mark.parametrize("quantizer", ["rtn", "rtn+hadamard"])
@pytest.mark.parametrize("family", [name for name in FAMILY_SIZES if not FAMILIES[name].without_tuning])
def test_a_layer_computes_what_its_packed_modules_do(family: str, quantizer: str, tmp_path: Path) -> None:
    if quantizer == "rtn+hadamard" and family not in ("qwen2_moe", "gpt_oss"):
        return
    make_checkpoint(family, tmp_path / "model")
    checkpoint = pack(tmp_path / "model", tmp_path / "packed", mixed, quantizer)
    tokens = torch.randint(3, 96, (3, 12), generator=torch.Generator().manual_seed(0))
    original = StreamedModel(tmp_path / "model", "float32", "cpu")
    number = original.folder.moe_layers[-1]
    captured = tmp_path / "captured" / f"layer-{number:03d}.safetensors"
    capture_tokens(tmp_path / "model", tokens, captured.parent)
    borders = Borders(original, tokens, "mxmoe_steps.tune", Waiting(out=tmp_path / "out"))
    runs = [slice(0, 2), slice(2, 3)]
    forward(original, borders, runs, number + 1, unwatched, keep=True)
    entering, leaving = borders.hidden(number), borders.hidden(number + 1)
    with original.loaded(original.layer_path(number)):
        text = read_text(original, number, entering, leaving, [captured], runs, 0)
    packed = PackedFolder(open_model(checkpoint), original.folder)
    got = read_layer(packed, original.folder, number, original.device).output(text, slice(0, 36))

    reference = StreamedModel(checkpoint, "float32", "cpu")
    with reference.loaded(reference.layer_path(number)), torch.no_grad():
        expected = reference.run_layer(number, read_rows(entering, "hidden", slice(None))).flatten(0, 1)
    change = (expected - text.wanted).norm()
    assert change > 1e-3 * text.wanted.norm()
    # codes of activations flip on last-bit differences
    assert (got - expected).norm() < 0.03 * change


@pytest.mark.parametrize(("scheme", "rotated"), [("w2a16_g32_asym", False), ("w3a16_g32_sym", True)])
def test_gradients_are_those_of_autograd(scheme: str, rotated: bool) -> None:
    torch.manual_seed(0)
    experts, tokens, hidden, width = 3, 40, 80, 64  # the last group of `hidden` is a ragged one
    sizes = [(width, hidden), (width, hidden), (hidden, width)]
    originals = [0.1 * torch.randn(experts, *size) for size in sizes]
    stacks = [round_to_nearest(original, parse_scheme(scheme)) for original in originals]
    x, wanted, weights = torch.randn(tokens, hidden), torch.randn(tokens, hidden), torch.rand(tokens, 2)
    expert_ids = torch.stack([torch.randperm(2) for _ in range(tokens)])  # expert 2 sees nothing
    moving, matrices = [], []
    for stack, (_, in_features) in zip(stacks, sizes, strict=True):
        zeros = fixed_zeros(stack.scheme, stack.scales) if stack.zeros is None else stack.zeros
        codes, scales, zeros = (part.double().requires_grad_() for part in (stack.codes, stack.scales, zeros))
        offsets = -zeros * scales
        offsets = offsets + (offsets.bfloat16() - offsets).detach()
        wide = [part.repeat_interleave(32, -1)[..., :in_features] for part in (scales, offsets)]
        matrix = codes * wide[0] + wide[1]
        matrices.append(rotate(matrix) if rotated else matrix)
        moving.append((codes, scales, zeros, wide[0].detach()))
    output = []
    for token in range(tokens):
        row, summands = x[token].double(), []
        for slot in range(2):
            gate, up, down = (matrix[expert_ids[token, slot]] for matrix in matrices)
            inner = torch.nn.functional.silu(gate @ row) * (up @ row)
            summands.append((down @ inner) * weights[token, slot].double())
        output.append(sum(summands))
    expected = torch.stack(output)
    (expected - wanted.double()).square().sum().mul(0.5).backward()

    every = list(range(experts))
    made = [
        Block(original, [(every, stack)], rotated, torch.float32)
        for original, stack in zip(originals, stacks, strict=True)
    ]
    routed, rows = Experts(made, Gating(torch.nn.functional.silu)), Rows.of(expert_ids, experts)
    outputs = routed.outputs(x, rows)
    found = summed(outputs.detach(), rows, weights)
    assert torch.allclose(found.double(), expected.detach(), atol=1e-5)
    outputs.backward((found - wanted)[rows.token] * weights.flatten()[rows.slot].unsqueeze(-1))
    seen: dict[int, list[Any]] = {}
    for number, block in enumerate(made):
        optimizer = block.tuned[0][1]._adam
        seen[number] = [group["params"][0] for group in optimizer.param_groups]
        optimizer.step = optimizer.zero_grad = lambda: None
    routed.descend(rows, 1e-3)
    for number, (codes, scales, zeros, wide) in enumerate(moving):
        reference = [codes.grad / wide, scales.grad * scales.detach(), zeros.grad / scales.detach()]
        assert len(seen[number]) == (3 if "asym" in scheme else 2)
        for moved, gradient in zip(seen[number], reference, strict=False):
            assert torch.allclose(moved.grad.double(), gradient, rtol=1e-3, atol=5e-3 * gradient.abs().max())
            assert not moved.grad[2].any()


@pytest.mark.parametrize("scheme", [name for name in SCHEMES if name in TUNED])
def test_blocks_begin_as_they_were_and_end_as_they_are_stored(scheme: str) -> None:
    torch.manual_seed(1)
    weight = torch.randn(2, 24, 80)
    stack = round_to_nearest(weight, parse_scheme(scheme))
    tuned = TunedBlocks(stack, weight, rotated=False)
    first = tuned.quantized()
    for part, tensor in first.tensors().items():
        assert torch.equal(tensor, stack.tensors()[part])
    assert torch.equal(tuned.weights(), stack.dequantize())
    for _ in range(40):
        tuned.descend(tuned.weights() - weight.flip(0), 0.02)
    last = tuned.quantized()
    assert torch.equal(tuned.weights(), last.dequantize())
    assert (last.dequantize() - weight.flip(0)).norm() < 0.8 * (stack.dequantize() - weight.flip(0)).norm()
    if scheme == "w4a16_mxfp4":
        assert torch.equal(last.scales, stack.scales)
    assert (last.scales.float() > 0).all()


@pytest.fixture(scope="module")
def sources(text_file: Path) -> str:
    text = {"files": [str(text_file)], "separator": "-----"}
    return canonical_json(dict.fromkeys(DOMAINS, text))


@pytest.fixture(scope="module")
def captured(tiny_moe: Path, sources: str, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    base = tmp_path_factory.mktemp("capture")
    options = {"model": str(tiny_moe), "sources": sources, "sequences": 8, "length": 32, **RUNTIME}
    for domain in DOMAINS:
        capture.capture(capture.CaptureOptions(**options, text=domain, out=base / domain))
    return [base / domain for domain in DOMAINS]


@pytest.fixture(scope="module")
def checkpoint(tiny_moe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pack(tiny_moe, tmp_path_factory.mktemp("packed"), mixed)


@pytest.fixture(scope="module")
def options(tiny_moe: Path, sources: str, captured: list[Path], checkpoint: Path) -> dict[str, Any]:
    of_step = {"texts": DOMAINS, "sequences": 8, "length": 32, "steps": 30, "step_tokens": 64, "batch": 4, "rate": 5e-3}
    inputs = {"model": str(tiny_moe), "sources": sources, "capture": captured, "checkpoint": checkpoint}
    return inputs | of_step | RUNTIME


@pytest.fixture(scope="module")
def tuned(options: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("tuned") / "checkpoint"
    tune.tune(tune.TuneOptions(**options, out=out))
    return out


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir())}


def test_a_tuned_checkpoint_is_of_the_same_format_and_nearer_to_the_original(
    options: dict[str, Any], tiny_moe: Path, checkpoint: Path, tuned: Path
) -> None:
    before, after = (load_file(folder / "model.safetensors") for folder in (checkpoint, tuned))
    assert before.keys() == after.keys()
    schemes = [parse_scheme(name) for name in SCHEMES]
    wide = {scheme.name for scheme, name in zip(schemes, SCHEMES, strict=True) if name not in TUNED}
    folder = PackedFolder(open_model(checkpoint), open_model(tiny_moe))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed
    for number, expert in itertools.product(range(2), [SHARED, *range(4)]):
        for block in ("gate", "up", "down"):
            scheme = folder.scheme(number, expert, block)
            if scheme.name in wide and not scheme.is_original:
                assert not changed & set(folder.names(number, expert, block).values())
    assert all("experts" in name or "shared_expert" in name for name in changed)
    assert (checkpoint / "config.json").read_bytes() == (tuned / "config.json").read_bytes()
    assert read_manifest(tuned) == read_manifest(checkpoint) | {"tuned": True}
    of_step = tune.TuneOptions(**options, out=tuned)
    tokens = torch.from_numpy(read_texts(of_step, tiny_moe, ["words"], "test")["words"])
    leaving = []
    for path in (tiny_moe, checkpoint, tuned):
        model = StreamedModel(path, "float32", "cpu")
        borders = Borders(model, tokens, "mxmoe_steps.tune", Waiting(out=tuned.parent / f"out-{len(leaving)}"))
        forward(model, borders, [slice(0, 16)], model.layers, unwatched)
        leaving.append(read_rows(borders.hidden(model.layers), "hidden", slice(None)))
    assert (leaving[2] - leaving[0]).norm() < 0.95 * (leaving[1] - leaving[0]).norm()
    assert mxmoe_steps.load_quantized(str(tuned))(tokens[:1]).logits.isfinite().all()


def test_killed_runs_and_parts_give_the_same_bytes(
    options: dict[str, Any], tuned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    killed, parts = tmp_path / "killed", tmp_path / "parts"
    with monkeypatch.context() as patch:
        patch.setattr(tune, "write_checkpoint", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            tune.tune(tune.TuneOptions(**options, out=killed))
    damaged = tmp_path / "killed.borders" / "tuned" / "hidden-002.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-1])  # the last layer is tuned again
    with monkeypatch.context() as patch:
        patch.setattr(tune, "advance", lambda *_: None)
        with pytest.raises(UserError, match="run tune again from the start"):
            tune.tune(tune.TuneOptions(**options, out=tmp_path / "lost"))
    for out, until in ((killed, None), (parts, 1), (parts, None)):
        tune.tune(tune.TuneOptions(**options, out=out, until=until))
        assert out.exists() == (until is None)
    assert contents(killed) == contents(parts) == contents(tuned)
    assert not (tmp_path / "killed.borders").exists()


def test_a_layer_that_gets_worse_stays_as_it_was(
    options: dict[str, Any], checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tune.tune(tune.TuneOptions(**{**options, "rate": 1.0, "steps": 5}, out=tmp_path / "out"))
    assert "left as it is" in capsys.readouterr().err
    before, after = (load_file(folder / "model.safetensors") for folder in (checkpoint, tmp_path / "out"))
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_what_does_not_belong_together_is_refused(
    options: dict[str, Any], tiny_moe: Path, captured: list[Path], tmp_path: Path
) -> None:
    def refused(**changed: Any) -> str:
        with pytest.raises(UserError) as error:
            tune.tune(tune.TuneOptions(**{**options, **changed}, out=tmp_path / "out"))
        return str(error.value)

    assert "was not packed from" in refused(checkpoint=tiny_moe)
    assert "run the capture step for this model" in refused(capture=[tmp_path, captured[1]])
    assert "--capture is of tail, words, --texts are words, tail; give both in one order" in refused(
        capture=captured[::-1]
    )
    assert "are captures of the same text, words" in refused(capture=[captured[0]] * 2)
    other = tmp_path / "other"
    shutil.copytree(options["checkpoint"], other)
    manifest = (other / "mxmoe.json").read_text().replace(read_manifest(other)["allocation"]["model"], "0" * 16)
    (other / "mxmoe.json").write_text(manifest)
    assert "was not packed from" in refused(checkpoint=other)
    assert "does not exist" in refused(checkpoint=tmp_path / "nowhere")
    damaged = tmp_path / "damaged"
    shutil.copytree(options["checkpoint"], damaged)
    tensors = load_file(damaged / "model.safetensors")
    bad = next(name for name in sorted(tensors) if ".1.mlp.experts.2." in name and name.endswith("scales"))
    tensors[bad][0] = 0
    save_file(tensors, damaged / "model.safetensors")
    assert "layer 1, expert 2," in refused(checkpoint=damaged)
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob("out.borders/*/layer-001.safetensors"))


def test_sequences_of_domains_take_turns() -> None:
    domains = torch.tensor([[[1, 2], [3, 4]], [[5, 6], [7, 8]], [[9, 10], [11, 12]]])
    assert tune.in_turn(domains).tolist() == [[1, 2], [5, 6], [9, 10], [3, 4], [7, 8], [11, 12]]


def test_a_metric_is_the_mean_of_outer_products() -> None:
    gradient = torch.randn(100, 8, generator=torch.Generator().manual_seed(0))
    expected = gradient.double().T @ gradient.double()
    expected = 0.8 * expected / expected.diagonal().mean() + 0.2 * torch.eye(8)
    assert torch.allclose(layer.metric_of(list(gradient.split(40)), 8).double(), expected, atol=1e-5)
    assert torch.equal(layer.metric_of([], 8), torch.eye(8))
    assert torch.equal(layer.metric_of([torch.zeros(3, 8)], 8), 0.2 * torch.eye(8))
