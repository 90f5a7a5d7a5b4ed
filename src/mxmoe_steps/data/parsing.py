"""Text sources from plain dictionaries, as the config and the command lines give them."""

from collections.abc import Mapping
from dataclasses import fields
from typing import Any, get_type_hints

from pydantic import ConfigDict, TypeAdapter, ValidationError

from mxmoe_steps.data.sources import SOURCES, TextSource
from mxmoe_steps.errors import UserError

_EXAMPLES = {"files": "a.txt, b.txt", "test_files": "c.txt", "mix": "english, code"}  # of lists
_MAY_BE_EMPTY = ("join", "separator")  # nothing between rows, an empty line between documents


def parse_source(name: str, value: dict[str, Any]) -> TextSource:
    """One source: ``{package: wiki-en}``, ``{files: [a.txt]}``, ``{hub: wikitext, ...}`` or ``{mix: [a, b]}``.

    The key says which of the registered classes it is; the others are fields of the class.
    `UserError` names the source and the key that is wrong.
    """
    kinds = sorted(SOURCES.keys() & value.keys())
    if len(kinds) != 1:
        raise UserError(f"texts.{name}: needs exactly one of the keys {', '.join(SOURCES)}; found {sorted(value)}")
    kind = SOURCES[kinds[0]]
    hints = get_type_hints(kind)
    known = sorted(field.name for field in fields(kind))  # type: ignore[arg-type]
    given: dict[str, Any] = {}
    for key, entry in value.items():
        if key not in known:
            raise UserError(f"texts.{name}: unknown key {key!r}; a {kinds[0]} source takes {', '.join(known)}")
        given[key] = _checked(f"texts.{name}.{key}", key, hints[key], entry)
    source = kind(**given)
    if (complaint := source.complaint()) is not None:
        key, text = complaint
        raise UserError(f"texts.{name}{key and '.'}{key}: {text}")
    return source


def _checked(where: str, key: str, hint: Any, entry: Any) -> Any:
    """The value of a field of type ``hint``: texts, several different ones, or what the type says."""
    if hint == tuple[str, ...]:
        if not isinstance(entry, list) or not entry or not all(isinstance(item, str) for item in entry):
            example = _EXAMPLES.get(key, "a, b")
            raise UserError(f"{where}: must be a list of strings, e.g. {key}: [{example}]")
        if len(set(entry)) < len(entry):
            raise UserError(f"{where}: lists something twice; every entry counts once")
        return tuple(entry)
    if hint in (str, str | None):
        if not isinstance(entry, str) or "\0" in entry:
            raise UserError(f"{where}: must be a string, found {entry!r}")
        if not entry and key not in _MAY_BE_EMPTY:
            raise UserError(f"{where}: is empty; name one, or leave out the key")
        return entry
    try:
        return TypeAdapter(hint, config=ConfigDict(strict=True)).validate_python(entry)
    except ValidationError as error:
        raise UserError(f"{where}: {error.errors()[0]['msg']}; found {entry!r}") from None


def parse_sources(values: Mapping[str, dict[str, Any]]) -> dict[str, TextSource]:
    """Named sources; `UserError` as of `parse_source`."""
    return {name: parse_source(name, value) for name, value in values.items()}
