"""Damaged references, evaluations and manifests: an error that names the file, or the right result."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mutations import mutated_bytes, mutated_json, refusal
from packed import pack
from safetensors.torch import load_file, save_file

from mxmoe_steps import evaluate
from mxmoe_steps.atomic import canonical_json
from mxmoe_steps.errors import UserError
from mxmoe_steps.evaluations import read_evaluation, read_manifest
from mxmoe_steps.facts import ReferenceFacts
from mxmoe_steps.models.raw import facts_of

FUZZ = settings(
    max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
KNOWN = {"allocation", "other_bytes", "published", "weights_bytes"}
TEXT = {"texts": ["words"], "sequences": 3, "length": 16}


def run(model: Path, out: Path, **options: Any) -> dict[str, Any]:
    runtime = {"dtype": "float32", "device": "cpu", "batch": 4}
    evaluate.evaluate(evaluate.EvaluateOptions(model=str(model), out=out, **runtime, **options))
    return read_evaluation(out)


@pytest.fixture(scope="module")
def made(tiny_moe: Path, text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What evaluate kept of the original, a packed checkpoint and its evaluation."""
    folder = tmp_path_factory.mktemp("made")
    sources = canonical_json({"words": {"files": [str(text_file)], "separator": "-----"}})
    kept = folder / "original.safetensors"
    run(tiny_moe, folder / "original.json", sources=sources, **TEXT, save_reference=str(kept))
    pack(tiny_moe, folder / "packed", lambda *_: ("w4a16", "w4a16", "w8a16"))
    run(folder / "packed" / "checkpoint", folder / "packed.json", reference=str(kept))
    return folder


def rewrite(file: Path, change: Callable[[dict[str, torch.Tensor], dict[str, Any]], object]) -> None:
    """Change the tensors and facts of a reference, which then has no checksums."""
    tensors, facts = load_file(file), facts_of(file, ReferenceFacts, "")
    change(tensors, facts)
    save_file(tensors, file, metadata={"mxmoe": json.dumps(facts)})


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda tensors, _: tensors.pop("tokens.words"), "tokens.words is missing"),
        (lambda tensors, _: tensors.pop("hidden.words"), "hidden.words is missing"),
        (lambda tensors, _: tensors["tokens.words"].__setitem__((1, 1), -1), "tokens.words holds no text of"),
        (lambda tensors, _: tensors["tokens.words"].__setitem__((1, 1), 1 << 40), "tokens.words holds no text of"),
        (lambda tensors, _: tensors.update({"tokens.words": torch.zeros(3, 16)}), "tokens.words is F32"),
        (
            lambda tensors, _: tensors.update({"hidden.words": torch.zeros(3, 16, 8)}),
            r"hidden.words is F32 \[3, 16, 8\]",
        ),
        (
            lambda tensors, _: tensors.update({"hidden.words": torch.zeros(2, 16, 64)}),
            r"hidden.words is F32 \[2, 16, 64",
        ),
        (lambda _, facts: facts.update(texts=[]), "texts: List should have at least 1 item"),
        (lambda _, facts: facts.update(texts=["words", "other"]), "tokens.other is missing"),
        (lambda _, facts: facts.update(model="another"), "is of another model than"),
    ],
)
def test_damaged_references(made: Path, tmp_path: Path, change: Callable[..., object], said: str) -> None:
    kept = Path(shutil.copy(made / "original.safetensors", tmp_path))
    rewrite(kept, change)
    with pytest.raises(UserError, match=rf"original.safetensors: .*{said}"):
        run(made / "packed" / "checkpoint", tmp_path / "out.json", reference=str(kept))
    assert not (tmp_path / "out.json").exists()


def test_hidden_states_that_are_no_numbers_are_refused(made: Path, tmp_path: Path) -> None:
    kept = Path(shutil.copy(made / "original.safetensors", tmp_path))
    rewrite(kept, lambda tensors, _: tensors["hidden.words"].__setitem__((1, 2, 3), float("nan")))
    with pytest.raises(UserError, match=r"original.safetensors: hidden.words holds NaN"):
        run(made / "packed" / "checkpoint", tmp_path / "out.json", reference=str(kept))


def test_a_packed_checkpoint_is_no_original(made: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="give --model the original"):
        run(
            made / "packed" / "checkpoint",
            tmp_path / "o.json",
            sources='{"words": {"package": "wiki-en"}}',
            **TEXT,
            save_reference=str(tmp_path / "r"),
        )


@given(data=st.data())
@FUZZ
def test_damaged_bytes_of_a_reference(made: Path, tmp_path: Path, data: st.DataObject) -> None:
    original = (made / "original.safetensors").read_bytes()
    kept = tmp_path / "damaged.safetensors"
    kept.write_bytes(data.draw(mutated_bytes(original)))
    if kept.read_bytes() != original:
        with pytest.raises(UserError, match=r"damaged.safetensors"):
            run(made / "packed" / "checkpoint", tmp_path / "out.json", reference=str(kept))


@given(data=st.data())
@FUZZ
def test_a_damaged_evaluation(made: Path, tmp_path: Path, data: st.DataObject) -> None:
    path = tmp_path / "damaged.json"
    path.write_text(data.draw(mutated_json(json.loads((made / "packed.json").read_text()))))
    said = refusal(lambda: read_evaluation(path))
    assert "damaged.json: " in said or set(read_evaluation(path)) == KNOWN | {"overall", "texts"}


@given(data=st.data())
@FUZZ
def test_a_damaged_manifest(made: Path, tmp_path: Path, data: st.DataObject) -> None:
    original = json.loads((made / "packed" / "checkpoint" / "mxmoe.json").read_text())
    (tmp_path / "mxmoe.json").write_text(data.draw(mutated_json(original)))
    said = refusal(lambda: read_manifest(tmp_path))
    assert "mxmoe.json: " in said or set(read_manifest(tmp_path)) == KNOWN | {"left_out", "others"}


def test_a_packed_checkpoint_without_a_manifest_is_not_the_original(made: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(made / "packed" / "checkpoint", tmp_path / "checkpoint"))
    (folder / "mxmoe.json").unlink()
    with pytest.raises(UserError, match=r"mxmoe.json: cannot be read"):
        run(folder, tmp_path / "out.json", reference=str(made / "original.safetensors"))
