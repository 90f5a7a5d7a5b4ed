"""Experts spread over ranks: cut by tensor parallelism, or each whole on one of them."""

from pathlib import Path
from typing import Any

import engine
import pytest
import torch
from packed import pack


@pytest.mark.parametrize("options", [{}, {"enable_expert_parallel": True}], ids=["tensor", "expert"])
def test_two_ranks(options: dict[str, Any], demo: Path, demo_tokens: torch.Tensor, tmp_path: Path) -> None:
    found, log = engine.run_alone(demo, demo_tokens, tmp_path, tensor_parallel_size=2, **options)
    assert found is not None, log
    assert (found - engine.expected(demo, demo_tokens)).abs().max() < 1e-4


def test_expert_parallel_on_the_kernels(demo_tokens: torch.Tensor, tmp_path: Path) -> None:
    model = Path(__file__).parents[2] / "resources" / "demo-moe"
    folder = pack(model, tmp_path / "packed", engine.dealt(("w4a16", "w8a16", "w2a16", "w16a16")))
    options = {"tensor_parallel_size": 2, "enable_expert_parallel": True, "on_kernels": True}
    found, log = engine.run_alone(folder, demo_tokens, tmp_path, **options)
    assert found is not None, log
    assert "experts run the GPU kernels" in log
    assert "reference arithmetic" not in log
    assert (found - engine.expected(folder, demo_tokens)).abs().max() < 1e-4
