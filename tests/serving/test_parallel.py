"""Experts spread over ranks: cut by tensor parallelism, or each whole on one of them."""

from pathlib import Path
from typing import Any

import engine
import pytest
import torch


@pytest.mark.parametrize("options", [{}, {"enable_expert_parallel": True}], ids=["tensor", "expert"])
def test_two_ranks(options: dict[str, Any], demo: Path, demo_tokens: torch.Tensor, tmp_path: Path) -> None:
    found, log = engine.run_alone(demo, demo_tokens, tmp_path, tensor_parallel_size=2, **options)
    assert found is not None, log
    assert (found - engine.expected(demo, demo_tokens)).abs().max() < 1e-4
