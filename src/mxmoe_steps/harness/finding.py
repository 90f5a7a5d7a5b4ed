"""A task of lm-evaluation-harness with its data, found before any model is loaded."""

import difflib
import logging
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

from mxmoe_steps.errors import UserError
from mxmoe_steps.harness.names import check_installed, is_alone, local_tasks

Found = dict[str, Any]  # ``tasks`` and ``groups`` by name, as `lm_eval.evaluate` takes them


def find_task(name: str, folder: Path | None, shots: int | None, seed: int) -> Found:
    """The task ``name``, or a group with a score of its own, and its data; ``folder``: of tasks besides lm-eval's.

    ``shots``: worked examples before each question, None for as many as the task itself says, drawn by ``seed``.
    Data that is not in the cache is downloaded. `UserError` for a name that is unknown or stands for several tasks,
    for data that cannot be had, and for tasks that need more than a language model.
    """
    check_installed()
    logging.getLogger("lm_eval").setLevel(logging.ERROR)  # defaults that it takes, at length
    local = {} if folder is None else local_tasks(folder)
    manager = _manager(folder if name in local else None, not is_alone(name, local))
    entry = manager.task_index.get(name)
    if entry is None:
        close = difflib.get_close_matches(name, [*local, *manager.all_tasks], n=1)
        hint = f"did you mean {close[0]!r}?" if close else "`python -m lm_eval ls tasks` lists them"
        raise UserError(f"tasks: {name!r} is no task of lm-eval{f' or {folder}' if folder else ''}; {hint}")
    if entry.kind.name == "TAG":
        raise UserError(f"tasks: {name} stands for several tasks; list those you want: {', '.join(sorted(entry.tags))}")
    found = _load(manager, name)
    if name in found["groups"] and not found["groups"][name].has_aggregation:
        children = ", ".join(found["groups"][name].child_names)
        raise UserError(f"tasks: {name} is a group without a score of its own; list those you want: {children}")
    for task in found["tasks"].values():
        _check(name, task, folder if name in local else None)
        _set_shots(name, task, shots, seed)
    return found


@cache
def _manager(folder: Path | None, include_defaults: bool) -> Any:
    """Reading the 15,000 tasks of lm-eval takes seconds."""
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=folder, include_defaults=include_defaults)


def _load(manager: Any, name: str) -> Found:
    """The task with its data; whatever goes wrong with either inside lm-eval and datasets is a `UserError`."""
    try:
        return dict(manager.load([name]))
    except OSError as error:
        raise UserError(
            f"tasks: the data of {name} is neither in the cache nor can it be read or downloaded ({_line(error)});"
            " run once where there is a network, copy HF_HOME from such a machine, or describe a local copy of it"
            " in evaluate.task_folder (docs/tasks.md)"
        ) from error
    except Exception as error:
        raise UserError(f"tasks: lm-eval cannot make {name} ({type(error).__name__}: {_line(error)})") from error


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())


def _check(name: str, task: Any, folder: Path | None) -> None:
    """`UserError` for what a causal language model is no answer to, and for local data whose changes go unseen."""
    for attribute, what in (("UNSAFE_CODE", "runs code that the model writes"), ("MULTIMODAL", "is not text alone")):
        if getattr(task, attribute, False):
            raise UserError(f"tasks: {name} {what}; use lm-eval itself for it")
    for file in _local_files(task):
        if folder is not None and not file.resolve().is_relative_to(folder.resolve()):
            raise UserError(f"tasks: {name} reads {file}; move it to {folder}, so that a change of it is seen")


def _local_files(task: Any) -> Iterator[Path]:
    """Files and folders that a task's own description names."""
    named: list[Any] = [task.get_config("dataset_path"), task.get_config("dataset_kwargs")]
    while named:
        value = named.pop()
        if isinstance(value, dict | list):
            named += value.values() if isinstance(value, dict) else value
        elif isinstance(value, str) and Path(value).exists():
            yield Path(value)


def _set_shots(name: str, task: Any, shots: int | None, seed: int) -> None:
    """As ``lm_eval --num_fewshot --seed`` does, but for what it would ignore."""
    own = task.get_config("num_fewshot")
    if shots and own == 0:
        raise UserError(f"few_shot: {task.task_name} of {name} takes no worked examples; leave it out")
    task.set_config(key="num_fewshot", value=(own or 0) if shots is None else shots)
    task.set_fewshot_seed(seed=seed)
