"""Loading and running a packed checkpoint where only the core's dependencies are installed."""

import re
import subprocess
import sys
import sysconfig
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
from checkpoints import make_checkpoint
from packaging.requirements import Requirement
from packed import pack

ROOT = Path(__file__).parents[1]
SCRIPT = """
import sys
folder, packed = sys.argv[1:]
standard = [path for path in sys.path if "site-packages" not in path]
sys.path[:] = [*standard, folder]
import torch
from transformers import AutoModelForCausalLM
from mxmoe_steps import load_quantized
models = load_quantized(packed), AutoModelForCausalLM.from_pretrained(packed)
tokens = torch.tensor([[5, 6, 7]])
settings = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None, "cache_implementation": "static"}
one, two = (model.generate(tokens, **settings) for model in models)
assert one.shape == (1, 7) and torch.equal(one, two)
pipeline = ("snakemake", "ortools", "datasets", "matplotlib", "pandas", "pyarrow")
print("imported:", [name for name in pipeline if name in sys.modules])
for name in pipeline:
    try:
        __import__(name)
    except ModuleNotFoundError:
        continue
    raise AssertionError(f"{name} is there")
print("done")
"""


def project() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def installed(requirements: list[str]) -> set[str]:
    """Names of the distributions that the requirements ask for, directly or not."""
    names: set[str] = set()
    todo = [Requirement(text) for text in requirements]
    while todo:
        wanted = todo.pop()
        if wanted.marker is not None and not any(wanted.marker.evaluate({"extra": e}) for e in wanted.extras or {""}):
            continue
        name = re.sub(r"[-_.]+", "-", wanted.name).lower()
        if name not in names:
            names.add(name)
            todo += [Requirement(text) for text in metadata.requires(name) or [] if "extra ==" not in text]
    return names


@pytest.fixture(scope="module")
def core(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of links to the files of the core's dependencies, and to this package."""
    folder = tmp_path_factory.mktemp("core")
    site = Path(sysconfig.get_paths()["purelib"])
    for name in installed(project()["dependencies"]):
        for file in metadata.files(name) or []:
            top = file.parts[0]
            if top != ".." and not (folder / top).exists():
                (folder / top).symlink_to(site / top)
    (folder / "mxmoe_steps").symlink_to(ROOT / "src" / "mxmoe_steps")
    return folder


def test_a_checkpoint_loads_and_generates_without_the_pipelines_packages(core: Path, tmp_path: Path) -> None:
    make_checkpoint("qwen2_moe", tmp_path / "model")
    packed = pack(tmp_path / "model", tmp_path / "packed", lambda *_: ("w4a16", "w8a8", "w2a16"))
    command = [sys.executable, "-I", "-S", "-c", SCRIPT, str(core), str(packed)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.stdout.splitlines()[-2:] == ["imported: []", "done"], done.stderr


def test_the_core_is_what_the_documents_say() -> None:
    names = {Requirement(text).name for text in project()["dependencies"]}
    assert names == {"numpy", "pydantic", "safetensors", "torch", "transformers"}
