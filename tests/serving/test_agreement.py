"""What vLLM computes from a packed checkpoint: the log-probabilities of `load_quantized`."""

from pathlib import Path
from typing import Any

import engine
import pytest
import torch
from checkpoints import make_checkpoint
from packed import pack
from vllm.model_executor.layers import utils

from mxmoe_steps.inference import gpu
from mxmoe_steps.inference.vllm import layer
from mxmoe_steps.kernels.plan import LayerPlan
from mxmoe_steps.schemes import BLOCKS, SHARED

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


@pytest.mark.parametrize("family", ["qwen2_moe", "mixtral", "qwen3_moe", "olmoe", "glm4_moe", "dots1"])
def test_every_family(family: str, tmp_path: Path) -> None:
    assert difference(tiny(tmp_path, family), TOKENS).max() < TOLERANCE


def test_all_schemes_and_rotation(tmp_path: Path) -> None:
    folder = tiny(tmp_path, "qwen2_moe", engine.dealt(engine.ALL), "rtn+hadamard")
    assert difference(folder, TOKENS).mean() < TOLERANCE  # a code of 4 or 8 bits flips now and then


class Kernels:
    """`MoeLayer` in torch, exact, on the CPU."""

    calls = 0

    def __init__(self, plan: LayerPlan, read: Any, device: torch.device, gate: torch.Tensor | None) -> None:
        self.plan, self.gate = plan, gate
        numbers = [*range(plan.experts), *([SHARED] if plan.slices else [])]
        self.weights = {(number, block): self._dense(read(number, block)) for number in numbers for block in BLOCKS}

    @staticmethod
    def _dense(block: Any) -> torch.Tensor:
        return block.clone() if isinstance(block, torch.Tensor) else block.dequantize()

    def _run(self, expert: int, x: torch.Tensor) -> torch.Tensor:
        gate, up, down = (self.weights[expert, block] for block in BLOCKS)
        return (torch.nn.functional.silu(x @ gate.T) * (x @ up.T)) @ down.T

    def __call__(self, x: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        assert chosen.dtype == torch.int64
        Kernels.calls += 1
        out = torch.zeros_like(x)
        for expert in range(self.plan.experts):
            out += self._run(expert, x) * (weights * (chosen == expert)).sum(-1, keepdim=True)
        if self.plan.slices:
            out += self._run(SHARED, x) * (1 if self.gate is None else (x @ self.gate.T).sigmoid())
        return out


def _keep_order(linear: Any, **_: Any) -> None:
    linear.cpu_linear = torch.nn.functional.linear


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> type[Kernels]:
    """As if the CPU were a Hopper GPU."""
    monkeypatch.setattr(layer, "check_hardware", lambda *_: None)
    # On a CPU vLLM packs 16-bit weights in an order of its own, and the kernels read that of a shared expert's gate.
    monkeypatch.setattr(utils, "dispatch_cpu_unquantized_gemm", _keep_order)
    monkeypatch.setattr(gpu, "MoeLayer", Kernels)
    monkeypatch.setattr(Kernels, "calls", 0)
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
