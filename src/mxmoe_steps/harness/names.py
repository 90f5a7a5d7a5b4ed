"""Names of tasks as a configuration has them: what is known of them without lm-eval, which takes seconds to import."""

import re
from collections.abc import Iterable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from mxmoe_steps.errors import UserError

VERSION = "0.4.13"  # of lm-eval: what a task asks, and how it is scored, is of one version
_NAME = r"[A-Za-z0-9][\w.+-]*"  # a word on command lines, no part of a path


def check_installed() -> None:
    """`UserError` unless the version of lm-eval that the extra [eval] names is installed."""
    found = next((one.version for one in metadata.distributions(name="lm-eval")), None)
    if found != VERSION:
        there = "it is not installed" if found is None else f"{found} is installed"
        raise UserError(f"tasks need lm-eval {VERSION}, and {there}: pip install 'mxmoe-steps[eval]'")


def check_names(tasks: Sequence[str], folder: str | None, few_shot: Sequence[str]) -> None:
    """`UserError` for what a configuration says of tasks that cannot be right, whatever lm-eval knows."""
    for name in tasks:
        if not re.fullmatch(_NAME, name):
            raise UserError(f"tasks: {name!r} is no name for a task; use letters, digits and _ . + -")
    if tasks:
        check_installed()
    if folder is not None:
        local_tasks(folder)
    for name in shots_of(few_shot):
        if name not in tasks:
            raise UserError(f"few_shot: {name!r} is not in evaluate.tasks")


def shots_of(few_shot: Iterable[str]) -> dict[str, int]:
    """Task -> worked examples before each of its questions, of settings like ``mmlu=5``."""
    shots = {}
    for text in few_shot:
        name, _, count = text.partition("=")
        if not count.isdecimal():
            raise UserError(f"few_shot: {text!r} is not of the form TASK=EXAMPLES, e.g. mmlu=5")
        shots[name] = int(count)
    return shots


def local_tasks(folder: str | Path) -> dict[str, list[str]]:
    """Tasks that the YAML files in a folder define, and the members of those that are groups of others."""
    import yaml

    class Loader(yaml.SafeLoader):
        """Reads ``!function`` as nothing."""

    Loader.add_multi_constructor("!", lambda *_: None)
    if not Path(folder).is_dir():
        raise UserError(f"task_folder: no such folder {folder}")
    found: dict[str, list[str]] = {}
    for file in sorted(Path(folder).rglob("*.yaml")):
        try:
            content: Any = yaml.load(file.read_text(encoding="utf-8"), Loader)
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            problem = " ".join(str(error).split())
            raise UserError(f"task_folder: {file} cannot be read as YAML ({problem})") from None
        if isinstance(content, Mapping):
            name = content.get("group", content.get("task"))
            if isinstance(name, str):
                members = content["task"] if isinstance(content.get("task"), list) else []
                found[name] = [
                    str(one.get("task", one.get("group")) if isinstance(one, Mapping) else one) for one in members
                ]
    if not found:
        raise UserError(f"task_folder: no YAML file in {folder} defines a task (docs/tasks.md)")
    return found


def is_alone(name: str, local: Mapping[str, Sequence[str]]) -> bool:
    """Whether a task is one of the `local_tasks`, and so are all in it."""
    return name in local and all(member != name and is_alone(member, local) for member in local[name])
