"""What tests of the vLLM plugin share: settings that vLLM reads when it is imported. Without vLLM nothing is collected.

It runs on the CPU in one process, so that a test may open several engines, one after another. One that fails to start
leaves vLLM unusable: such tests start a process (`engine.run_alone`).
"""

import importlib.util
import os
from pathlib import Path

import engine
import pytest
import torch
from packed import pack

os.environ |= engine.SETTINGS
collect_ignore_glob = [] if importlib.util.find_spec("vllm") else ["test_*.py"]

ROOT = Path(__file__).parents[2]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """All of these tests are marked ``vllm``."""
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker("vllm")


@pytest.fixture(scope="session")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded model packed with 16-bit activations, other schemes in every block."""
    folder = tmp_path_factory.mktemp("demo")
    return pack(ROOT / "resources" / "demo-moe", folder, engine.dealt(engine.A16))


@pytest.fixture(scope="session")
def demo_tokens(demo: Path) -> torch.Tensor:
    """Four pieces of a text."""
    from transformers import AutoTokenizer

    text = (ROOT / "README.md").read_text(encoding="utf-8")
    tokens = AutoTokenizer.from_pretrained(demo)(text, return_tensors="pt")["input_ids"][0]
    return tokens[: 4 * 160].view(4, 160)
