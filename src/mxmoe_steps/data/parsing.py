"""Text sources from plain dictionaries, as the config and the command lines give them."""

import json
from dataclasses import fields
from typing import Any

from mxmoe_steps.data.sources import FileText, HubText, MixText, PackageText, Source
from mxmoe_steps.errors import UserError

_KINDS: dict[str, type[Source]] = {"package": PackageText, "files": FileText, "mix": MixText}
_LISTS = {"files": "a.txt, b.txt", "test_files": "c.txt", "mix": "english, code"}  # keys that take a list, an example


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
        elif not isinstance(entry, str):
            raise UserError(f"texts.{name}.{key}: must be a string, found {entry!r}")
        given["path" if key == "hub" else key] = entry
    if kind is FileText and "separator" in given and "column" in given:
        raise UserError(f"texts.{name}: separator divides texts and column names a part of records; give one of them")
    for key in _LISTS.keys() & given.keys():
        if len(set(given[key])) < len(given[key]):
            raise UserError(f"texts.{name}.{key}: lists something twice; every entry counts once")
    return kind(**given)


def parse_sources(text: str) -> dict[str, Source]:
    """Named sources from a JSON object; `UserError` for anything else."""
    try:
        values = json.loads(text)
        return {name: parse_source(name, value) for name, value in values.items()}
    except (json.JSONDecodeError, AttributeError, TypeError) as error:
        raise UserError(
            f"--sources is not a JSON object of text sources ({error}); for example"
            ' \'{"en": {"package": "wiki-en"}, "mine": {"files": ["notes.txt"]}}\''
        ) from error
