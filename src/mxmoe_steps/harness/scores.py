"""What a model scored on a task: metrics with standard errors, beside what guessing would score."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field
from typing_extensions import TypedDict

from mxmoe_steps.errors import UserError
from mxmoe_steps.harness.finding import Found
from mxmoe_steps.records import STRICT, Count, Index, Name, Quantity, Share, read_record

_GUESSED = ("acc", "acc_norm", "acc_bytes", "acc_mutual_info")  # is the answer that is best by some measure right?
_ERRORS = 2  # standard errors within which a score is no better than guessing


class Score(TypedDict):
    """One metric of a task; ``filter`` says how an answer is read from what the model writes.

    ``stderr`` is None where lm-eval knows none; ``chance`` is what guessing scores, None where that is not defined.
    """

    metric: Name
    filter: Name
    value: Annotated[float, Field(ge=-1e100, le=1e100)]
    stderr: Quantity | None
    chance: Share | None
    higher_is_better: bool


class _Scored(TypedDict):
    questions: Count
    few_shot: Index | None
    scores: Annotated[list[Score], Field(min_length=1)]


class _Record(_Scored):
    __pydantic_config__ = STRICT  # type: ignore[misc]

    task: Name
    model: Name
    limit: Count | None
    version: Name
    subtasks: dict[Name, _Scored]


def read_scores(path: str | Path) -> dict[str, Any]:
    """What `tasks` wrote; `UserError` names what is missing or out of range."""
    return read_record(path, _Record, "run the tasks step again", _check_order)


def _check_order(content: Any) -> None:
    for score in content["scores"]:
        if score["chance"] is not None and not 0 <= score["value"] <= 1:
            raise ValueError(f"scores: {score['metric']} is {score['value']}, which is no share of the answers")


def is_chance(score: Mapping[str, Any]) -> bool:
    """Whether a score is no better than guessing, as far as its standard error can tell."""
    if score["chance"] is None:
        return False
    return bool(score["value"] <= score["chance"] + _ERRORS * (score["stderr"] or 0.0))


def scores_of(found: Found, name: str, results: Mapping[str, Any]) -> dict[str, Any]:
    """Scores of the task ``name`` and, if it is a group, of all in it; ``results``: what `lm_eval.evaluate` returned."""
    guessed = {task: chance_of(one) for task, one in found["tasks"].items()}
    sizes = {task: results["results"][task]["sample_len"] for task in found["tasks"]}
    for group in found["groups"].values():
        members = [task.task_name for task in group.get_all_tasks()]
        by_size = {one.metric: one.weight_by_size for one in group.aggregate_metric_list or []}
        guessed[group.name] = {
            metric: _mean([guessed[task][metric] for task in members], [sizes[task] if weigh else 1 for task in members])
            for metric, weigh in by_size.items()
            if all(metric in guessed[task] for task in members)
        }
    scored = {
        one: {
            "questions": results["results"][one]["sample_len"],
            "few_shot": results["n-shot"].get(one),
            "scores": _scores(one, results["results"][one], results["higher_is_better"].get(one, {}), guessed[one]),
        }
        for one in sorted(guessed)
        if one in found["tasks"] or found["groups"][one].has_aggregation
    }
    version = results["versions"].get(name)
    head = {"task": name, "version": str(version), **scored.pop(name)}
    if not head["scores"]:
        raise UserError(f"tasks: {name} gave no number as a score")
    return head | {"subtasks": scored}


def _scores(name: str, metrics: Mapping[str, Any], better: Mapping[str, Any], chance: Mapping[str, float]) -> list[Any]:
    """Of lm-eval's ``acc,none`` and ``acc_stderr,none``."""
    scores = []
    for key in sorted(metrics):
        metric, _, filter_ = key.partition(",")
        value = metrics[key]
        if not filter_ or metric.endswith("_stderr") or not isinstance(value, int | float):
            continue
        if not math.isfinite(value):
            raise UserError(f"tasks: {name}: {metric} is {value}; the model's numbers are too large for its precision")
        error = metrics.get(f"{metric}_stderr,{filter_}")
        known = isinstance(error, int | float) and math.isfinite(error)
        scores.append(
            {
                "metric": metric,
                "filter": filter_,
                "value": float(value),
                "stderr": float(error) if known else None,
                "chance": chance.get(metric),
                "higher_is_better": bool(better.get(metric, True)),
            }
        )
    return scores


def chance_of(task: Any) -> dict[str, float]:
    """Metric -> the share of questions that guessing evenly among the choices gets right, of a task that was asked.

    Only for questions with choices that lm-eval itself scores: elsewhere guessing is not defined.
    """
    if task.OUTPUT_TYPE != "multiple_choice" or task.get_config("process_results") is not None:
        return {}
    documents = {instance.doc_id: instance.doc for instance in task.instances}
    right = []
    for document in documents.values():
        answer = task.doc_to_text(document) if task.multiple_input else task.doc_to_target(document)
        answers = len(set(answer)) if isinstance(answer, list) else 1
        right.append(answers / len(task.doc_to_choice(document)))
    return dict.fromkeys(_GUESSED, _mean(right, [1] * len(right)))


def _mean(values: list[float], weights: list[int]) -> float:
    return math.fsum(value * weight for value, weight in zip(values, weights, strict=True)) / sum(weights)
