"""Frontier and allocation files: JSON, read and checked in one place. Stdlib only."""

import json
from pathlib import Path
from typing import Any

from mxmoe_steps.allocation.pick import Part, Vertex
from mxmoe_steps.atomic import write_json
from mxmoe_steps.errors import UserError
from mxmoe_steps.schemes import parse_scheme

DIGITS = "0123456789abcdefghijklmnopqrstuvwxyz"  # a scheme's place in "schemes", one character per block
VERSION = 1


def _read(path: str, kind: str) -> dict[str, Any]:
    if not Path(path).is_file():
        raise UserError(f"{path}: no such {kind}; run the step that writes it")
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not readable JSON ({error})") from error
    found = (content.get("kind"), content.get("version")) if isinstance(content, dict) else (None, None)
    if found != (kind, VERSION):
        raise UserError(f"{path}: is {found[0]} version {found[1]}; expected a {kind} of version {VERSION}")
    return dict(content)


def write_frontier(path: str, facts: dict[str, Any], parts: list[Part]) -> None:
    """Write the parts (each with its layers in ``facts["parts"]`` order) and the facts."""
    content = {
        "kind": "frontier",
        "version": VERSION,
        **facts,
        "parts": [
            {"vertices": [vars(vertex) for vertex in part.vertices], "cuts": [list(cut) for cut in part.cuts]}
            for part in parts
        ],
    }
    write_json(path, content)


def read_frontier(path: str) -> tuple[dict[str, Any], list[Part]]:
    """The facts and parts of a frontier file."""
    facts = _read(path, "frontier")
    parts = [
        Part([Vertex(**vertex) for vertex in part["vertices"]], [tuple(cut) for cut in part["cuts"]])
        for part in facts.pop("parts")
    ]
    return facts, parts


def write_allocation(path: str, content: dict[str, Any]) -> None:
    """Write an allocation; see `read_allocation`."""
    write_json(path, {"kind": "allocation", "version": VERSION, **content})


def read_allocation(path: str) -> dict[str, Any]:
    """An allocation; ``assignment`` rows are [layer, expert, gate, up, down] with canonical scheme names."""
    content = _read(path, "allocation")
    seen = set()
    for row in content["assignment"]:
        if len(row) != 5:
            raise UserError(f"{path}: {row} is not [layer, expert, gate, up, down]")
        if tuple(row[:2]) in seen:
            raise UserError(f"{path}: layer {row[0]} expert {row[1]} is assigned twice")
        seen.add(tuple(row[:2]))
        for name in row[2:]:
            if parse_scheme(name).name != name:
                raise UserError(f"{path}: scheme {name!r} is not canonical; write {parse_scheme(name).name}")
    return content
