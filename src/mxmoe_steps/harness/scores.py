"""What a model scored on a task: metrics with standard errors, beside what guessing would score."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field
from typing_extensions import TypedDict

from mxmoe_steps.records import STRICT, Count, Index, Name, Quantity, Share, read_record

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
