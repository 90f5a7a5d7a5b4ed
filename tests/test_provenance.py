"""Stamps change with code, not with comments, and see imports inside functions."""

import ast
from pathlib import Path

import pytest

from mxmoe_steps import provenance


@pytest.fixture(autouse=True)
def _fresh_caches() -> None:
    for function in (provenance.module_file, provenance._parse, provenance.imported, provenance.module_hash):
        function.cache_clear()


def write(root: Path, **modules: str) -> None:
    for name, text in modules.items():
        (root / f"{name}.py").write_text(text, encoding="utf-8")


def test_closure_follows_lazy_and_plain_imports(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(provenance, "_ROOT", tmp_path)
    write(
        tmp_path,
        step="import os\ndef f():\n    from mxmoe_steps.deep import g\n    return g\n",
        deep="from mxmoe_steps import leaf\n",
        leaf="import mxmoe_steps.step\nx = 1\n",
        other="y = 2\n",
    )
    assert provenance.closure("mxmoe_steps.step") == ["mxmoe_steps.deep", "mxmoe_steps.leaf", "mxmoe_steps.step"]


def test_hash_ignores_comments_docstrings_and_layout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(provenance, "_ROOT", tmp_path)
    texts = {
        "a": '"""Doc."""\ndef f(x):\n    """Says."""\n    return x + 1  # why\n',
        "b": "def f( x ):\n\n    return (x + 1)\n",
        "c": "def f(x):\n    return x + 2\n",
    }
    write(tmp_path, **texts)
    a, b, c = (provenance.module_hash(f"mxmoe_steps.{name}") for name in "abc")
    assert a == b != c


@pytest.mark.parametrize(
    "step", ["trace", "capture", "calibrate", "profile", "frontier", "solve", "quantize", "evaluate", "report"]
)
def test_every_step_imports_nothing_dynamically(step: str) -> None:
    """Stamps are only complete while no module is imported by a computed name."""
    assert f"mxmoe_steps.{step}" in provenance.closure(f"mxmoe_steps.{step}")
    for module in provenance.closure(f"mxmoe_steps.{step}"):
        file = provenance.module_file(module)
        assert file is not None
        calls = [node for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.Call)]
        names = {ast.unparse(call.func) for call in calls}
        assert not names & {"__import__", "importlib.import_module", "import_module", "exec", "eval"}, module


def test_stamps_name_modules_and_versions() -> None:
    found = provenance.stamps("mxmoe_steps.trace", "torch")
    assert found["code_trace"].startswith("mxmoe_steps.trace@")
    assert "code_models_loading" in found
    assert "code_quantizers_gptq" not in found
    assert found["version_torch"].startswith("torch ")
