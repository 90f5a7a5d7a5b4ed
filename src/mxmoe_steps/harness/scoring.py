"""From what lm-eval found to scores, and what guessing would have scored."""

import math
from collections.abc import Mapping
from typing import Any

from mxmoe_steps.errors import UserError
from mxmoe_steps.harness.finding import Found

_GUESSED = ("acc", "acc_norm", "acc_bytes", "acc_mutual_info")  # is the answer that is best by some measure right?


def scores_of(found: Found, name: str, results: Mapping[str, Any]) -> dict[str, Any]:
    """Scores of the task ``name`` and, if it is a group, of all in it; ``results``: what `lm_eval.evaluate` gave."""
    guessed = {task: chance_of(one) for task, one in found["tasks"].items()}
    sizes = {task: results["results"][task]["sample_len"] for task in found["tasks"]}
    for group in found["groups"].values():
        members = [task.task_name for task in group.get_all_tasks()]
        guessed[group.name] = {}
        for one in group.aggregate_metric_list or []:
            if all(one.metric in guessed[task] for task in members):
                weights = [sizes[task] if one.weight_by_size else 1 for task in members]
                guessed[group.name][one.metric] = _mean([guessed[task][one.metric] for task in members], weights)
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
    for key, value in metrics.items():
        metric, _, filter_ = key.partition(",")
        if not filter_ or metric.endswith("_stderr") or not isinstance(value, int | float):
            continue
        if not math.isfinite(value):
            raise UserError(f"tasks: {name}: {metric} is {value}; the model's numbers are too large for its precision")
        error = metrics.get(f"{metric}_stderr,{filter_}")  # or "N/A"
        scores.append(
            {
                "metric": metric,
                "filter": filter_,
                "value": float(value),
                "stderr": float(error) if isinstance(error, int | float) and math.isfinite(error) else None,
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
