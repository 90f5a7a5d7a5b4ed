"""Packed checkpoints in transformers: registration by import, compiled models, copies. Reference arithmetic."""

import copy
import io
import itertools
import json
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from checkpoints import make_checkpoint
from packed import pack
from transformers import AutoModelForCausalLM, StoppingCriteria, StoppingCriteriaList
from transformers.generation.utils import DeferredStopCheck
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING

import mxmoe_steps
from mxmoe_steps.errors import UserError
from mxmoe_steps.inference import serve

SCHEMES = ["w4a16", "w2a16", "w8a8", "w16a16", "w4a8_fp8", "w3a16", "w8a8_fp8"]
FAMILIES = ("qwen2_moe", "deepseek_v3", "gpt_oss")  # a gated shared expert, an ungated one, biases


def make_packed(folder: Path, family: str = "qwen2_moe") -> Path:
    make_checkpoint(family, folder / "model")
    dealt = itertools.cycle(SCHEMES)
    return pack(folder / "model", folder / "packed", lambda *_: (next(dealt), next(dealt), next(dealt)))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_packed(tmp_path_factory.mktemp("packed"))


@pytest.fixture
def tokens() -> torch.Tensor:
    return torch.randint(3, 90, (2, 9), generator=torch.Generator().manual_seed(0))


def run(script: str, path: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", script, str(path)], capture_output=True, text=True, check=False)


LOAD = (
    "import sys; model = AutoModelForCausalLM.from_pretrained(sys.argv[1]);"
    " print(type(model.model.layers[0].mlp.experts).__name__)"
)


def test_transformers_alone_refuses_the_checkpoint_and_names_the_package(checkpoint: Path) -> None:
    done = run(f"from transformers import AutoModelForCausalLM; {LOAD}", checkpoint)
    assert done.returncode == 1
    assert "pip install mxmoe-steps, and import mxmoe_steps before loading the model" in done.stderr


@pytest.mark.parametrize(
    "imports",
    [
        "import mxmoe_steps; from transformers import AutoModelForCausalLM",
        "from transformers import AutoModelForCausalLM; import transformers.modeling_utils, mxmoe_steps",
        "from transformers import AutoModelForCausalLM; from mxmoe_steps import load_quantized",
    ],
)
def test_importing_the_package_is_enough(checkpoint: Path, imports: str) -> None:
    done = run(f"{imports}; {LOAD}", checkpoint)
    assert done.stdout.strip() == "MixedExperts", done.stderr


def test_a_saved_copy_refuses_too(checkpoint: Path, tmp_path: Path) -> None:
    AutoModelForCausalLM.from_pretrained(checkpoint).save_pretrained(tmp_path)
    key = "experts_implementation"
    saved, original = (json.loads((folder / "config.json").read_text()) for folder in (tmp_path, checkpoint))
    assert saved[key] == original[key]
    assert saved["quantization_config"] == original["quantization_config"] | {"rotation": None}


def test_a_checkpoint_that_lost_its_configuration_computes_nothing(tmp_path: Path) -> None:
    make_checkpoint("qwen2_moe", tmp_path / "model")
    path = pack(tmp_path / "model", tmp_path / "packed", lambda *_: ("w4a16",) * 3)
    config = json.loads((path / "config.json").read_text())
    del config["quantization_config"]
    (path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="no quantization_config"):
        mxmoe_steps.load_quantized(str(path))
    model = AutoModelForCausalLM.from_pretrained(path)  # transformers goes on with random experts
    with pytest.raises(UserError, match="lost the quantization_config"):
        model(torch.tensor([[3, 4]]))


@pytest.mark.parametrize("family", FAMILIES)
def test_compiles_without_a_graph_break(family: str, tmp_path: Path, tokens: torch.Tensor) -> None:
    model = mxmoe_steps.load_quantized(str(make_packed(tmp_path, family)))
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        for inputs in (tokens, tokens[:1, :5], tokens.repeat(3, 1)):
            torch.testing.assert_close(compiled(inputs).logits, model(inputs).logits)


def _pickled(model: Any) -> Any:
    return pickle.loads(pickle.dumps(model))


def _saved(model: Any) -> Any:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, _pickled, _saved])
def test_copies_compute_the_same_and_are_models_of_their_own(
    checkpoint: Path, tokens: torch.Tensor, duplicate: Callable[[Any], Any]
) -> None:
    model = mxmoe_steps.load_quantized(str(checkpoint))
    with torch.no_grad():
        expected = model(tokens).logits
        again = duplicate(model)
        for buffer in model.model.layers.buffers():
            buffer.zero_()
        assert torch.equal(again(tokens).logits, expected)


def test_only_our_models_defer_the_check_for_the_end(checkpoint: Path, tmp_path: Path, tokens: torch.Tensor) -> None:
    def deferred(device: str) -> bool:
        return DeferredStopCheck.is_supported(torch.device(device), None, False, is_assistant=False)

    def while_generating(model: Any) -> list[bool]:
        seen = []

        class Watch(StoppingCriteria):
            def __call__(self, ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
                seen.extend(map(deferred, ("cuda", "cpu")))
                return torch.zeros(len(ids), dtype=torch.bool)

        model.generate(tokens, max_new_tokens=1, do_sample=False, stopping_criteria=StoppingCriteriaList([Watch()]))
        return seen

    ours = mxmoe_steps.load_quantized(checkpoint)
    make_checkpoint("qwen2_moe", tmp_path)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert while_generating(ours) == [True, False]
    assert while_generating(theirs) == [False, False]
    assert not deferred("cuda")


def test_the_server_is_that_of_transformers_with_our_quantizer(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    cli = SimpleNamespace(main=lambda: seen.append((sys.argv, "mxmoe" in AUTO_QUANTIZER_MAPPING)))
    monkeypatch.setitem(sys.modules, "transformers.cli.transformers", cli)
    monkeypatch.setattr(sys, "argv", ["serve.py", "folder", "--port", "1"])
    serve.main()
    assert seen == [(["transformers", "serve", "folder", "--port", "1"], True)]
