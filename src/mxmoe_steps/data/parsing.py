"""Text sources from plain dictionaries, as the config and the command lines give them."""

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from mxmoe_steps.data.sources import PACKAGES, FileText, HubText, MixText, PackageText, Source
from mxmoe_steps.errors import UserError

_KINDS: dict[str, type[Source]] = {"package": PackageText, "files": FileText, "mix": MixText}
_LISTS = {"files": "a.txt, b.txt", "test_files": "c.txt", "mix": "english, code"}  # keys that take a list, an example
_MAY_BE_EMPTY = ("join", "separator")  # nothing between rows, an empty line between documents


def parse_source(name: str, value: dict[str, Any]) -> Source:
    """One source: ``{package: wiki-en}``, ``{files: [a.txt]}``, ``{hub: wikitext, ...}`` or ``{mix: [a, b]}``.

    Other keys are the fields of the kind's dataclass; ``hub`` names `HubText.path`.
    `UserError` names the source and the key that is wrong.
    """
    kinds = sorted({*_KINDS, "hub"} & set(value))
    if len(kinds) != 1:
        raise UserError(f"texts.{name}: needs exactly one of the keys package, files, hub, mix; found {sorted(value)}")
    kind = _KINDS.get(kinds[0], HubText)
    known = {"hub" if field.name == "path" else field.name for field in fields(kind)}
    given: dict[str, Any] = {}
    for key, entry in value.items():
        if key not in known:
            raise UserError(f"texts.{name}: unknown key {key!r}; a {kinds[0]} source takes {', '.join(sorted(known))}")
        if key in _LISTS:
            if not isinstance(entry, list) or not entry or not all(isinstance(item, str) for item in entry):
                raise UserError(f"texts.{name}.{key}: must be a list of strings, e.g. {key}: [{_LISTS[key]}]")
            entry = tuple(entry)
        elif not isinstance(entry, str) or "\0" in entry:
            raise UserError(f"texts.{name}.{key}: must be a string, found {entry!r}")
        elif not entry and key not in _MAY_BE_EMPTY:
            raise UserError(f"texts.{name}.{key}: is empty; name one, or leave out the key")
        elif key == "separator" and "\n" in entry:
            raise UserError(f"texts.{name}.separator: is a whole line, so it holds no line break; found {entry!r}")
        elif key == "package" and entry not in PACKAGES:
            raise UserError(f"texts.{name}.package: {entry!r} is not known; known are {', '.join(sorted(PACKAGES))}")
        given["path" if key == "hub" else key] = entry
    if kind is FileText and "separator" in given and "column" in given:
        raise UserError(f"texts.{name}: separator divides texts and column names a part of records; give one of them")
    for key in _LISTS.keys() & given.keys():
        if len(set(given[key])) < len(given[key]):
            raise UserError(f"texts.{name}.{key}: lists something twice; every entry counts once")
    return kind(**given)


def parse_sources(values: Mapping[str, dict[str, Any]]) -> dict[str, Source]:
    """Named sources; `UserError` as of `parse_source`."""
    return {name: parse_source(name, value) for name, value in values.items()}
