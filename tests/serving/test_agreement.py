"""What vLLM computes from a packed checkpoint: the log-probabilities of `load_quantized`."""

import json
import weakref
from pathlib import Path
from typing import Any

import engine
import pytest
import torch
from checkpoints import make_checkpoint
from packed import pack
from safetensors.torch import load_file, save_file
from stand_in import Kernels, fill_cpu_gaps, stand_in
from tiny import EXTRA, OPTIONS, make_tiny

from mxmoe_steps.inference import gpu
from mxmoe_steps.inference.vllm import blocks
from mxmoe_steps.models.packed import StoredBlock

TOLERANCE = 1e-4
LAST = "model.layers.1."  # of two
TOKENS = torch.randint(3, 96, (4, 48), generator=torch.Generator().manual_seed(1))


def difference(folder: Path, tokens: torch.Tensor, **options: Any) -> torch.Tensor:
    expected = engine.expected(folder, tokens)  # first: vLLM may replace classes of transformers' models
    return (engine.served(folder, tokens, **options) - expected).abs()


def test_the_embedded_model(demo: Path, demo_tokens: torch.Tensor) -> None:
    assert difference(demo, demo_tokens).max() < TOLERANCE


def test_the_embedded_model_compiled(demo: Path, demo_tokens: torch.Tensor) -> None:
    assert difference(demo, demo_tokens, enforce_eager=False).max() < TOLERANCE


@pytest.mark.parametrize(
    "family",
    [
        "qwen3_moe",
        "olmoe",
        "mixtral",  # other names of blocks
        "gpt_oss",  # biases, a clamp, a loader of its own
        "glm4_moe",  # a shared expert
        "deepseek_v3",  # the same, latent attention, a loader of its own
        "granitemoehybrid",  # Mamba 2, stacked experts
        "jamba",  # a model class that keeps no quantization method
        "dots1",  # transformers' model class
    ],
)
def test_every_family(family: str, tmp_path: Path) -> None:
    folder = make_tiny(tmp_path, family, engine.dealt(engine.A16))
    assert difference(folder, TOKENS, **OPTIONS.get(family, {})).max() < TOLERANCE


@pytest.mark.parametrize(
    "family",
    [
        "nemotron_h",  # experts without a gate
        "laguna",  # the router's correction is stored among the experts, the shared expert under another name
    ],
)
def test_what_vllm_has_on_gpus_alone(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill_cpu_gaps(monkeypatch.setattr)
    assert difference(make_tiny(tmp_path, family, engine.dealt(engine.A16)), TOKENS).max() < TOLERANCE


def test_a_draft_model(tmp_path: Path) -> None:
    """Its layer predicts tokens ahead, is of 16 bits, and has the number of a packed one."""
    make_checkpoint("qwen3_next", tmp_path / "model", **EXTRA["qwen3_next"])
    index = tmp_path / "model" / "model.safetensors.index.json"
    names = json.loads(index.read_text())["weight_map"]
    weights = {name: tensor for file in set(names.values()) for name, tensor in load_file(index.parent / file).items()}
    ahead = {f"mtp.layers.0.{name.removeprefix(LAST)}": weights[name] for name in names if name.startswith(LAST)}
    ahead |= {f"mtp.{norm}.weight": torch.zeros(64) for norm in ("norm", "pre_fc_norm_embedding", "pre_fc_norm_hidden")}
    ahead["mtp.fc.weight"] = torch.ones(64, 128) / 128
    save_file(ahead, index.parent / "ahead.safetensors", metadata={"format": "pt"})
    index.write_text(json.dumps({"metadata": {}, "weight_map": names | dict.fromkeys(ahead, "ahead.safetensors")}))
    folder = pack(tmp_path / "model", tmp_path / "packed", engine.dealt(engine.A16))
    draft = {"method": "mtp", "num_speculative_tokens": 1}
    assert difference(folder, TOKENS, speculative_config=draft).max() < TOLERANCE


def test_all_schemes_and_rotation(tmp_path: Path) -> None:
    folder = make_tiny(tmp_path, "qwen2_moe", engine.dealt(engine.ALL), "rtn+hadamard")
    assert difference(folder, TOKENS).mean() < TOLERANCE  # a code of 4 or 8 bits flips now and then


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> type[Kernels]:
    """As if the CPU were a Hopper GPU, whose memory has no room for packed experts beside those in kernel order."""
    stand_in(monkeypatch.setattr)
    packed: weakref.WeakSet[StoredBlock] = weakref.WeakSet()

    class Watched(StoredBlock):
        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments)
            packed.add(self)

    class Alone(Kernels):
        def __call__(self, *tensors: torch.Tensor) -> torch.Tensor:
            assert not packed
            return super().__call__(*tensors)

    monkeypatch.setattr(blocks, "StoredBlock", Watched)
    monkeypatch.setattr(gpu, "MoeLayer", Alone)
    return Kernels


WIDE = {"hidden_size": 128, "moe_intermediate_size": 128}


@pytest.mark.parametrize(
    ("family", "extra", "calls"),
    [
        ("qwen2_moe", {"shared_expert_intermediate_size": 256}, 1),
        ("qwen2_moe", {"shared_expert_intermediate_size": 192}, 2),  # no multiple of 128: in a call of its own
        ("glm4_moe", {}, 1),
        ("qwen3_moe", {}, 1),
    ],
)
def test_wiring_of_the_kernels(
    family: str, extra: dict[str, Any], calls: int, tmp_path: Path, kernels: type[Kernels]
) -> None:
    schemes = engine.dealt(("w8a16", "w16a16")) if calls == 2 else engine.dealt(("w4a16", "w8a16", "w2a16", "w16a16"))
    folder = make_tiny(tmp_path, family, schemes, **WIDE, **extra)
    assert difference(folder, TOKENS).max() < TOLERANCE
    layers = 1 if family == "glm4_moe" else 2
    assert kernels.calls % (calls * layers) == 0
    assert kernels.calls >= calls * layers
