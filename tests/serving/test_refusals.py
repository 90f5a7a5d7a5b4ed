"""What is refused, with one sentence."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import engine
import pytest
import torch
from safetensors.torch import load_file, save_file
from vllm.model_executor.models.utils import WeightsMapper

from mxmoe_steps.errors import UserError
from mxmoe_steps.inference.vllm import layer
from mxmoe_steps.inference.vllm.blocks import Blocks, Share
from mxmoe_steps.inference.vllm.config import PackedConfig, check_version
from mxmoe_steps.inference.vllm.stream import PackedTensors
from mxmoe_steps.models.packed import MixedExperts
from mxmoe_steps.schemes import parse_scheme


def test_a_missing_tensor_is_named(demo: Path, demo_tokens: torch.Tensor, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(demo, broken)
    lost = "model.layers.3.mlp.experts.2.up_proj.scales"
    for file in broken.glob("*.safetensors"):
        tensors = load_file(file)
        tensors.pop(lost, None)
        save_file(tensors, file, metadata={"format": "pt"})
    found, log = engine.run_alone(broken, demo_tokens, tmp_path)
    assert found is None
    assert "the checkpoint lacks tensors: layer 3, expert 2, up: scales is missing" in log


@pytest.mark.parametrize(
    ("lora", "eplb", "load_format", "why"),
    [
        (object(), False, "auto", "LoRA"),
        (None, True, "auto", "EPLB"),
        (None, False, "dummy", "--load-format dummy"),
    ],
)
def test_options_are_refused_by_name(lora: object, eplb: bool, load_format: str, why: str) -> None:
    parallel, loading = SimpleNamespace(enable_eplb=eplb), SimpleNamespace(load_format=load_format)
    options = SimpleNamespace(lora_config=lora, parallel_config=parallel, load_config=loading)
    with pytest.raises(UserError, match=f"^{why} .*does not work with packed experts"):
        layer.check_options(options)


def test_reference_arithmetic_on_a_gpu_is_asked_for_and_warned_of(monkeypatch: pytest.MonkeyPatch) -> None:
    warnings: list[str] = []
    monkeypatch.setattr(layer.logger, "warning", lambda text, *values: warnings.append(text % values))
    packed = object.__new__(layer.PackedLayer)
    packed.number, packed.device, packed.eager, packed.shared = 3, torch.device("cuda"), False, {}
    with pytest.raises(UserError, match=r"^layer 3: no GPU kernels \(why\), .* add --enforce-eager"):
        packed._stay({}, "why")
    packed.eager = True
    packed._stay({}, "why")
    assert warnings == ["mxmoe: the experts of layer 3 run reference arithmetic, slowly (why)"]
    assert packed.compute.__func__ is MixedExperts.routed_sum


@pytest.mark.parametrize("lasting", [True, False])
def test_tensors_are_copied_where_their_memory_may_be_reused(lasting: bool) -> None:
    packed, blocks = object.__new__(layer.PackedLayer), Blocks(3, Share())
    packed.blocks, packed.lasting = [blocks], lasting
    blocks.add(5, "up", parse_scheme("w16a16"), (2, 4), rotated=False)
    buffer = torch.ones(2, 4)
    packed.load(5, "up", "weight", buffer)
    buffer.zero_()
    assert bool(blocks.finish()[5, "up"].parts["weight"].all()) is not lasting


@pytest.mark.parametrize("version", ["0.24.0", "0.34.0", "1.0", "dev"])
def test_versions_of_vllm(version: str) -> None:
    with pytest.raises(UserError, match=rf"^vLLM {version}: packed checkpoints need vLLM from 0\.25\.1 up to"):
        check_version(version)


def test_versions_that_are_supported() -> None:
    for version in ("0.25.1", "0.32.0+cpu", "0.33.0", "0.33.1.dev5+g1234"):
        check_version(version)


def test_versions_of_the_format(demo: Path) -> None:
    stated = json.loads((demo / "config.json").read_text())["quantization_config"]
    with pytest.raises(UserError, match="version"):
        PackedConfig.from_config(stated | {"version": 2})


def test_models_of_another_type(demo: Path) -> None:
    config = PackedConfig.from_config(json.loads((demo / "config.json").read_text())["quantization_config"])
    model = SimpleNamespace(model_type="llama", to_dict=lambda: {"model_type": "llama"})
    with pytest.raises(
        UserError, match=r"^folder/config\.json: model_type 'llama' is not supported; supported are afmoe"
    ):
        config.maybe_update_config("folder", model)
    model.to_dict = lambda: {"model_type": "dbrx"}
    with pytest.raises(UserError, match="experts lie in one matrix of all experts' rows"):
        config.maybe_update_config("folder", model)


def test_nothing_of_a_draft_model_is_packed(demo: Path) -> None:
    config = PackedConfig.from_config(json.loads((demo / "config.json").read_text())["quantization_config"])
    config.maybe_update_config("folder", SimpleNamespace(model_type="qwen3_next_mtp"))
    name = "model.layers.0.mlp.experts.0.up_proj.weight"  # mtp.layers.0 in the checkpoint, renamed by the class
    assert config.published(name, torch.empty(0)) == name


def test_what_vllm_asks_of_its_model_classes() -> None:
    seen: list[str] = []

    def published(name: str, _: torch.Tensor) -> str | None:
        seen.append(name)
        return None if name.startswith("ours") else name.replace("transformers.", "")

    theirs = WeightsMapper(orig_to_new_prefix={"old": "new"}, orig_to_new_substr={"gone": None})
    stored = ["ours.old", "transformers.old.1", "gone"]
    for mapper in (theirs | PackedTensors(published=published), PackedTensors(published=published) | theirs):
        assert [name for name, _ in mapper.apply((name, torch.empty(0)) for name in stored)] == ["new.1"]
    assert seen == 2 * stored
