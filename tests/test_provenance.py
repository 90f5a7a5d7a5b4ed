"""Stamps change with code, not with comments, and see imports inside functions."""

import ast
from pathlib import Path

import pytest

from mxmoe_steps import provenance


def forget() -> None:
    for function in (provenance.module_file, provenance._source, provenance.imported):
        function.cache_clear()


@pytest.fixture(autouse=True)
def _fresh_caches(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path_factory.mktemp("home")))
    forget()


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
    "step",
    ["trace", "capture", "calibrate", "profile", "frontier", "solve", "extrapolate", "quantize", "evaluate", "report"],
)
def test_every_step_imports_nothing_dynamically(step: str) -> None:
    """Stamps are only complete while no module is imported by a computed name.

    But for a user's modules, which `extensions` imports and which are stamped by their names.
    """
    assert f"mxmoe_steps.{step}" in provenance.closure(f"mxmoe_steps.{step}")
    for module in set(provenance.closure(f"mxmoe_steps.{step}")) - {"mxmoe_steps.extensions"}:
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


def test_packages_run_when_their_modules_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(provenance, "_ROOT", tmp_path)
    (tmp_path / "inner").mkdir()
    write(
        tmp_path,
        __init__="from mxmoe_steps import used\ndef f():\n    from mxmoe_steps import unused\n    return unused\n",
        step="from mxmoe_steps.inner import deep\n",
        used="",
        unused="",
    )
    write(tmp_path / "inner", __init__="LIMIT = 3\n", deep="")
    assert provenance.closure("mxmoe_steps.step") == [
        "mxmoe_steps", "mxmoe_steps.inner", "mxmoe_steps.inner.deep", "mxmoe_steps.step", "mxmoe_steps.used"
    ]  # fmt: skip
    assert "mxmoe_steps.used" not in provenance.closure("mxmoe_steps.step", without=["mxmoe_steps"])


def test_steps_are_stamped_with_what_they_run_and_no_more() -> None:
    packed = ("mxmoe_steps.models.quantizer",)
    for step in ("trace", "capture", "calibrate", "evaluate", "quantize", "frontier", "solve"):
        modules = provenance.closure(f"mxmoe_steps.{step}", packed if step in ("trace", "capture") else ())
        kernels = set()
        if step == "frontier":  # what it plans with: names, phases, sizes; no code of a kernel
            kernels = {"kernels", "kernels.architecture", "kernels.architectures", "kernels.limits", "kernels.codes",
                       "kernels.codes.format", "kernels.sm90", "kernels.sm90.architecture",
                       "kernels.sm90.config", "kernels.mma", "kernels.mma.architecture", "kernels.mma.config",
                       "kernels.shared"}  # fmt: skip
        assert {name for name in modules if name.startswith("mxmoe_steps.kernels")} <= {
            f"mxmoe_steps.{name}" for name in kernels
        }, step
        assert not {name for name in modules if name.startswith("mxmoe_steps.inference")}, step
        assert not {"mxmoe_steps.provenance", "mxmoe_steps.made_from"} & set(modules), step
        assert "mxmoe_steps" in modules
    assert "code_packing" not in provenance.stamps("mxmoe_steps.trace", without=packed)
    assert "code_packing" in provenance.stamps("mxmoe_steps.evaluate")


@pytest.mark.parametrize(
    ("step", "used", "unused"),
    [
        ("trace", {"torch", "transformers", "tokenizers", "numpy", "pyarrow"}, {"ortools", "matplotlib"}),
        ("calibrate", {"torch", "numpy", "pyarrow"}, {"ortools"}),
        ("frontier", {"ortools", "numpy", "pyarrow"}, {"torch", "transformers"}),
        ("solve", set(), {"torch", "numpy"}),
        ("report", {"matplotlib", "pandas"}, {"torch", "ortools"}),
    ],
)
def test_versions_of_the_packages_that_decide(step: str, used: set[str], unused: set[str]) -> None:
    found = {
        name.removeprefix("version_") for name in provenance.stamps(f"mxmoe_steps.{step}") if name.startswith("version")
    }
    assert used <= found
    assert not unused & found


def test_code_is_read_once_for_all_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(provenance, "_ROOT", tmp_path)
    write(tmp_path, step="from mxmoe_steps import leaf\n", leaf="x = 1\n")
    first = provenance.stamps("mxmoe_steps.step")
    forget()
    with monkeypatch.context() as patched:
        patched.setattr(ast, "parse", None)
        assert provenance.stamps("mxmoe_steps.step") == first
    write(tmp_path, leaf="x = 2\n")  # as long, perhaps within one tick of the clock
    forget()
    assert provenance.stamps("mxmoe_steps.step") != first
    write(tmp_path, leaf="x = 1\n")
    (entries,) = provenance._cache().parent.iterdir()
    for entry in entries.iterdir():
        entry.write_text("{")  # a disk was full
    forget()
    assert provenance.stamps("mxmoe_steps.step") == first
    monkeypatch.setenv("HOME", "/proc/no-such-home")
    forget()
    assert provenance.stamps("mxmoe_steps.step") == first
