"""Single values of a configuration: as people write them, and as results are named after them. Stdlib only."""

import contextlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_NO_PATH = "{}\n\r\0"  # Snakemake reads braces as wildcards


def distinct(names: list[str]) -> list[str]:
    """The same names; `ValueError` for one that comes twice."""
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"{name!r} is listed twice; list everything once")
    return names


def expand(path: str) -> str:
    """``~`` and variables of the environment as a shell expands them; `ValueError` for what is no path."""
    found = os.path.expandvars(os.path.expanduser(path))
    for character in _NO_PATH:
        if character in found:
            raise ValueError(f"{found!r}: a path cannot hold {character!r} here; rename it")
    try:
        Path(found).exists()
    except OSError as error:
        raise ValueError(f"{found!r}: {error.strerror}; correct the path") from None
    return found


def expand_files(source: dict[str, Any]) -> dict[str, Any]:
    """A text source with `expand` of its files; what is no list of texts is left to `parse_source`."""
    return {
        key: [expand(file) if isinstance(file, str) else file for file in value]
        if key in ("files", "test_files") and isinstance(value, list)
        else value
        for key, value in source.items()
    }


def typed(value: Any) -> Any:
    """What Snakemake's ``--config`` gives, whose values inside braces are all strings, with numbers, true and null."""
    if isinstance(value, Mapping):
        return {key: typed(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [typed(inner) for inner in value]
    if not isinstance(value, str):
        return value
    constants = {"true": True, "false": False, "null": None}
    if value.lower() in constants:
        return constants[value.lower()]
    for kind in (int, float):
        with contextlib.suppress(ValueError):
            return kind(value)
    return value


def exact(value: float) -> str:
    """A number in as few digits as tell it from every other: 3, 2.25, 0.3333333333333333."""
    short = f"{value:g}"
    return short if float(short) == value else repr(value)


def from_json(value: Any) -> Any:
    """What the command line gives as one JSON object; anything else is left to be refused by its type."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except ValueError as error:
        raise ValueError(
            f"not a JSON object ({error}); for example"
            ' \'{"en": {"package": "wiki-en"}, "mine": {"files": ["notes.txt"]}}\''
        ) from None
