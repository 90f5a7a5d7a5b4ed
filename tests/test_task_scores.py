"""Scores on tasks, against lm-eval's own run and log-likelihoods computed by hand; what runs again; bad input."""

import json
import math
import random
import re
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mutations import mutated_json, refusal
from packed import pack
from synthetic import WORDS, run
from workflow import RESULTS, changed, edit, planned, snakemake

from mxmoe_steps import tasks
from mxmoe_steps.errors import UserError
from mxmoe_steps.harness import names
from mxmoe_steps.harness.finding import find_task
from mxmoe_steps.harness.scores import is_chance, read_scores
from mxmoe_steps.reporting.sections import drawn_figures

lm_eval = pytest.importorskip("lm_eval", reason="the extra [eval] is not installed")

CHOICE = """
dataset_path: json
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: answer
target_delimiter: ""
metric_list: [{metric: acc}, {metric: acc_norm}]
"""
LAST_WORD = """
task: last
dataset_path: json
dataset_kwargs: {data_files: {test: FOLDER/last.jsonl}}
test_split: test
output_type: loglikelihood
doc_to_text: "{{question}}"
doc_to_target: "{{ending}}"
target_delimiter: ""
metric_list: [{metric: perplexity}, {metric: acc}]
"""
WRITE = """
task: write
dataset_path: json
dataset_kwargs: {data_files: {test: FOLDER/last.jsonl}}
test_split: test
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{ending}}"
generation_kwargs: {until: [" "], max_gen_toks: 8, do_sample: false}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
"""
GROUP = "group: both\ntask: [two, few]\naggregate_metric_list: [{metric: acc, weight_by_size: true}]\n"
RUNTIME = {"dtype": "float32", "device": "cpu", "batch": 4}


def questions(count: int, choices: tuple[int, int], seed: int) -> list[dict[str, Any]]:
    """Random words, with a random number of choices of random lengths."""
    rng = random.Random(seed)
    rows = []
    for _ in range(count):
        endings = [" " + " ".join(rng.choices(WORDS, k=rng.randint(1, 4))) for _ in range(rng.randint(*choices))]
        question = " ".join(rng.choices(WORDS, k=rng.randint(1, 9)))
        rows.append({"question": question, "choices": endings, "answer": rng.randrange(len(endings))})
    return rows


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Task files: two choices, three to five, both as a group, a last word to predict, and one to write."""
    path = tmp_path_factory.mktemp("tasks")
    for name, rows in {"two": questions(24, (2, 2), 1), "few": questions(12, (3, 5), 2)}.items():
        (path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
        data = f"dataset_kwargs: {{data_files: {{test: {path}/{name}.jsonl}}}}\n"
        (path / f"{name}.yaml").write_text(f"task: {name}\n{data}{CHOICE}")
    rows = [{"question": row["question"], "ending": row["choices"][0]} for row in questions(12, (1, 1), 3)]
    (path / "last.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (path / "last.yaml").write_text(LAST_WORD.replace("FOLDER", str(path)))
    (path / "write.yaml").write_text(WRITE.replace("FOLDER", str(path)))
    (path / "both.yaml").write_text(GROUP)
    return path


def scored(model: Path, task: str, folder: Path, out: Path, **options: Any) -> dict[str, Any]:
    chosen = {"model": str(model), "task": task, "task_folder": folder, "out": out}
    tasks.tasks(tasks.TasksOptions(**(RUNTIME | chosen | options)))
    return read_scores(out)


def log_likelihood(model: Any, tokenizer: Any, context: str, ending: str) -> tuple[float, bool]:
    """Of the ending after the context, and whether each of its tokens is the most likely one."""
    start, whole = tokenizer(context)["input_ids"], tokenizer(context + ending)["input_ids"]
    with torch.no_grad():
        log_p = torch.log_softmax(model(torch.tensor([whole])).logits[0].double(), -1)[:-1]
    targets = torch.tensor(whole[1:])
    own = slice(len(start) - 1, None)
    found = log_p.gather(-1, targets[:, None])[own].sum()
    return float(found), bool((log_p.argmax(-1) == targets)[own].all())


def by_metric(record: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {score["metric"]: score for score in record["scores"]}


def test_scores_are_those_of_log_likelihoods_by_hand(tiny_moe: Path, folder: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.set_num_threads(1)
    model = AutoModelForCausalLM.from_pretrained(tiny_moe, dtype=torch.float64, experts_implementation="eager")
    tokenizer = AutoTokenizer.from_pretrained(tiny_moe)
    right: dict[str, dict[str, list[bool]]] = {}
    chance = {}
    for name in ("two", "few"):
        rows = [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]
        right[name] = {"acc": [], "acc_norm": []}
        chance[name] = np.mean([1 / len(row["choices"]) for row in rows])
        for row in rows:
            found = np.array([log_likelihood(model, tokenizer, row["question"], one)[0] for one in row["choices"]])
            lengths = np.array([len(one) for one in row["choices"]])
            right[name]["acc"].append(found.argmax() == row["answer"])
            right[name]["acc_norm"].append((found / lengths).argmax() == row["answer"])
    both = scored(tiny_moe, "both", folder, tmp_path / "both.json")
    assert both["subtasks"].keys() == right.keys()
    for name, metrics in right.items():
        for metric, hits in metrics.items():
            score = by_metric(both["subtasks"][name])[metric]
            assert score["value"] == pytest.approx(np.mean(hits))
            assert score["stderr"] == pytest.approx(np.std(hits, ddof=1) / math.sqrt(len(hits)))
            assert score["chance"] == pytest.approx(chance[name])
    (all_,) = both["scores"]
    assert (all_["metric"], both["questions"], both["few_shot"], both["limit"]) == ("acc", 36, 0, None)
    assert all_["value"] == pytest.approx(np.mean(right["two"]["acc"] + right["few"]["acc"]))
    assert all_["chance"] == pytest.approx((24 * chance["two"] + 12 * chance["few"]) / 36)

    rows = [json.loads(line) for line in (folder / "last.jsonl").read_text().splitlines()]
    found = [log_likelihood(model, tokenizer, row["question"], row["ending"]) for row in rows]
    last = scored(tiny_moe, "last", folder, tmp_path / "last.json")
    assert by_metric(last)["perplexity"]["value"] == pytest.approx(
        math.exp(-np.mean([nll for nll, _ in found])), rel=1e-5
    )
    assert by_metric(last)["acc"]["value"] == pytest.approx(np.mean([greedy for _, greedy in found]))
    assert by_metric(last)["perplexity"]["stderr"] > 0
    assert by_metric(last)["acc"]["chance"] is None
    assert not by_metric(last)["perplexity"]["higher_is_better"]


def test_scores_are_those_of_lm_eval_and_the_same_bytes_again(tiny_moe: Path, folder: Path, tmp_path: Path) -> None:
    from lm_eval.tasks import TaskManager

    packed = pack(tiny_moe, tmp_path, lambda *_: ("w2a16_g32", "w4a16_g32", "w8a8_fp8"))
    manager = TaskManager(include_path=str(folder), include_defaults=False)
    for model in (tiny_moe, packed):
        own = lm_eval.simple_evaluate(
            "hf", f"pretrained={model},dtype=float32", ["both", "last", "write"], device="cpu", batch_size=4,
            task_manager=manager, log_samples=False, bootstrap_iters=1000,
        )["results"]  # fmt: skip
        for task in ("both", "last", "write"):
            out = tmp_path / f"{task}.json"
            record = scored(model, task, folder, out)
            for name, one in {task: record, **record["subtasks"]}.items():
                for score in one["scores"]:
                    assert score["value"] == pytest.approx(own[name][f"{score['metric']},none"], rel=1e-6), name
                    assert score["stderr"] == pytest.approx(own[name][f"{score['metric']}_stderr,none"], rel=1e-5)
            if task == "both":
                first = out.read_bytes()
                scored(model, task, folder, out)
                assert out.read_bytes() == first
    limited = scored(packed, "both", folder, tmp_path / "limited.json", task_limit=5, shots=2)
    assert (limited["questions"], limited["limit"], limited["few_shot"]) == (10, 5, 2)
    assert limited["model"] == read_scores(tmp_path / "both.json")["model"]


def test_an_addition_asks_no_other_task_and_no_other_checkpoint(project: Path, folder: Path, monkeypatch: Any) -> None:
    own = project / "own"
    shutil.copytree(folder, own)
    for file in own.glob("*.yaml"):
        file.write_text(file.read_text().replace(str(folder), "own"))
    monkeypatch.chdir(project)
    two = (changed("evaluate", "task_folder", value="own"), changed("evaluate", "tasks", value=["two", "last"]))
    edit(project, *two)
    text = snakemake(project, "--dry-run", "--printshellcmds")
    commands = re.findall(r"Shell command: python -m mxmoe_steps\.tasks (.*) 2> ", text)
    assert len(commands) == 6
    for command in commands:  # as the workflow would, but for the time that six processes take to start
        run(tasks, *shlex.split(command))
    assert planned(project) == {"report": 1}
    snakemake(project)
    table = pd.read_csv("results/summary.csv")
    for row in table.itertuples():
        record = read_scores(RESULTS / "tasks" / row.checkpoint / "two.json")
        assert row.task_two_acc == pytest.approx(by_metric(record)["acc"]["value"], rel=1e-5)
        assert row.task_two_acc_norm_chance == 0.5
        assert row.tasks_mean == pytest.approx((row.task_two_acc_norm + row.task_last_acc) / 2, rel=1e-4)
        assert row.tasks_mean_stderr == pytest.approx(
            math.hypot(row.task_two_acc_norm_stderr, row.task_last_acc_stderr) / 2, rel=1e-4
        )
        assert ("two" in str(row.tasks_at_chance)) == is_chance(by_metric(record)["acc_norm"])
    page = Path("results/report.html").read_text()
    assert page.count("<svg") == len(drawn_figures(without=["extrapolated"]))
    assert "two<br>acc_norm<br>24 questions, 0-shot" in page
    assert "(chance level)" in page
    assert "mean accuracy on last, two" in (RESULTS / "logs" / "report.log").read_text()

    edit(project, two[0], changed("evaluate", "tasks", value=["two", "last", "few"]))
    assert planned(project) == {"tasks": 3, "report": 1}
    edit(project, *two, changed("sweep", "0", "r", value=[0.75, 0.5]))
    assert planned(project) == {"solve": 1, "quantize": 1, "evaluate": 1, "tasks": 2, "report": 1}


@pytest.mark.parametrize(
    ("task", "change", "says"),
    [
        ("twoo", None, r"tasks: 'twoo' is no task of lm-eval or .*; did you mean 'two'\?"),
        ("two", lambda at: (at / "two.jsonl").unlink(), r"the data of two is neither in the cache nor can it be read"),
        ("two", lambda at: (at / "two.yaml").write_text("task: [\n"), r"two.yaml cannot be read as YAML"),
        ("two", lambda at: replace(at / "two.yaml", "{{question", "{{"), r"lm-eval cannot make two \(TemplateSyntax"),
        ("two", lambda at: replace(at / "two.yaml", str(at), f"{at}/../elsewhere"), r"two reads .*move it to"),
        ("two", lambda at: replace(at / "two.yaml", "task: two", "task: two\nunsafe_code: true"), r"two runs code"),
        ("both", lambda at: replace(at / "both.yaml", "aggregate", "#"), r"without a score of its own.*: two, few"),
        ("pair", lambda at: replace(at / "two.yaml", "task: two", "task: two\ntag: pair"), r"pair stands for .*: two"),
    ],
)  # fmt: skip
def test_a_task_that_cannot_be_asked_is_refused_before_a_model_is_loaded(
    folder: Path, tmp_path: Path, task: str, change: Callable[[Path], object] | None, says: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    from lm_eval.tasks import TaskManager

    own = tmp_path / "own"
    shutil.copytree(folder, own)
    shutil.copytree(folder, tmp_path / "elsewhere")
    for file in own.glob("*.yaml"):
        file.write_text(file.read_text().replace(str(folder), str(own)))
    if change is not None:
        change(own)
    if task in ("twoo", "pair"):  # these in the place of lm-eval's own tasks, which take seconds to read
        manager = TaskManager(include_path=str(own), include_defaults=False)
        monkeypatch.setattr("mxmoe_steps.harness.finding._manager", lambda *_: manager)
    with pytest.raises(UserError, match=says):
        find_task(task, own, None, 0)


def replace(file: Path, old: str, new: str) -> None:
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new))


def test_names_of_a_configuration(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert names.local_tasks(folder) == {"both": ["two", "few"], "few": [], "last": [], "two": [], "write": []}
    assert names.is_alone("both", names.local_tasks(folder))
    assert not names.is_alone("both", {"both": ["two", "arc_easy"], "two": []})
    assert names.shots_of(["mmlu=5", "gsm8k=0"]) == {"mmlu": 5, "gsm8k": 0}
    for arguments, says in {
        (("a/b",), None, ()): "'a/b' is no name for a task",
        (("two",), "nowhere", ()): "no such folder nowhere",
        (("two",), str(tmp_path), ()): "no YAML file in .* defines a task",
        (("two",), None, ("two:5",)): "'two:5' is not of the form TASK=EXAMPLES, e.g. mmlu=5",
        (("two",), None, ("few=5",)): "'few' is not in evaluate.tasks",
    }.items():
        with pytest.raises(UserError, match=says):
            names.check_names(*arguments)
    monkeypatch.setattr(names, "VERSION", "0.0.1")
    with pytest.raises(
        UserError, match=r"need lm-eval 0.0.1, and 0.4.13 is installed: pip install 'mxmoe-steps\[eval\]'"
    ):
        names.check_names(["two"], None, [])
    monkeypatch.setattr(names.metadata, "distributions", lambda **_: iter([]))
    with pytest.raises(UserError, match="and it is not installed: pip"):
        names.check_names(["two"], None, [])
    names.check_names([], None, [])


@given(data=st.data())
@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_damaged_scores(tmp_path: Path, data: st.DataObject) -> None:
    score = {"metric": "acc", "filter": "none", "value": 0.5, "stderr": 0.1, "chance": 0.25, "higher_is_better": True}
    one = {"questions": 3, "few_shot": None, "scores": [score]}
    record = {"task": "t", "model": "m", "limit": None, "version": "1", "subtasks": {"s": one}, **one}
    path = tmp_path / "damaged.json"
    path.write_text(data.draw(mutated_json(record)))
    said = refusal(lambda: read_scores(path))
    assert "damaged.json: " in said or read_scores(path)["scores"]
