"""What vLLM computes from a packed checkpoint: the log-probabilities of `load_quantized`."""

from pathlib import Path
from typing import Any

import engine
import pytest
import torch
from checkpoints import make_checkpoint
from packed import pack
from stand_in import Kernels, stand_in

TOLERANCE = 1e-4
TOKENS = torch.randint(3, 96, (4, 48), generator=torch.Generator().manual_seed(1))
EXTRA: dict[str, dict[str, Any]] = {"glm4_moe": {"head_dim": 32, "routed_scaling_factor": 2.5}}


def tiny(folder: Path, family: str, schemes: Any = None, quantizer: str = "rtn", **extra: Any) -> Path:
    make_checkpoint(family, folder / "model", **(EXTRA.get(family, {}) | extra))
    return pack(folder / "model", folder / "packed", schemes or engine.dealt(engine.A16), quantizer)


def difference(folder: Path, tokens: torch.Tensor, **options: Any) -> torch.Tensor:
    expected = engine.expected(folder, tokens)  # first: vLLM may replace classes of transformers' models
    return (engine.served(folder, tokens, **options) - expected).abs()


def test_the_embedded_model(demo: Path, demo_tokens: torch.Tensor) -> None:
    assert difference(demo, demo_tokens).max() < TOLERANCE


def test_the_embedded_model_compiled(demo: Path, demo_tokens: torch.Tensor) -> None:
    assert difference(demo, demo_tokens, enforce_eager=False).max() < TOLERANCE


@pytest.mark.parametrize("family", ["qwen2_moe", "mixtral", "qwen3_moe", "olmoe", "glm4_moe", "gpt_oss", "dots1"])
def test_every_family(family: str, tmp_path: Path) -> None:
    assert difference(tiny(tmp_path, family), TOKENS).max() < TOLERANCE


def test_all_schemes_and_rotation(tmp_path: Path) -> None:
    folder = tiny(tmp_path, "qwen2_moe", engine.dealt(engine.ALL), "rtn+hadamard")
    assert difference(folder, TOKENS).mean() < TOLERANCE  # a code of 4 or 8 bits flips now and then


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> type[Kernels]:
    """As if the CPU were a Hopper GPU."""
    stand_in(monkeypatch.setattr)
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
    folder = tiny(tmp_path, family, schemes, **WIDE, **extra)
    assert difference(folder, TOKENS).max() < TOLERANCE
    layers = 1 if family == "glm4_moe" else 2
    assert kernels.calls % (calls * layers) == 0
    assert kernels.calls >= calls * layers
