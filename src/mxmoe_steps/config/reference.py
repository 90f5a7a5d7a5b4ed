"""What is generated from the sections: the reference page README.md and the JSON schema schema.json.

``python -m mxmoe_steps.config.reference FOLDER`` writes both.
"""

import json
import sys
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from pydantic.fields import FieldInfo

from mxmoe_steps.config.sections import Config, Section
from mxmoe_steps.options.base import Option, option_of

_ANY = 2**31 - 1  # a limit that no value comes near
_HEAD = """# Configuration reference

`config.yaml` beside this file is the demo. Copy it, edit it, and run `snakemake --cores N --configfile my.yaml`.
Keys that it leaves out take the defaults below, which are those of the steps' command lines as well. To change a few
values of a configuration and keep the rest, name both files:
`snakemake --cores N --configfile config/config.yaml changes.yaml`.

Editors check and complete a configuration whose first line names the schema, as `config.yaml` does:
`# yaml-language-server: $schema=schema.json`.

This page and the schema are generated: `python -m mxmoe_steps.config.reference config`.

| key | type | unit | default | meaning |
|---|---|---|---|---|
"""


def reference() -> str:
    """The configuration reference in Markdown."""
    lines = []
    for name, field in Config.model_fields.items():
        option = option_of(field)
        if not (isinstance(option.kind, type) and issubclass(option.kind, Section)):
            lines.append(_row(name, field, option))
            continue
        lines.append(f"| **{name}** | | | | {(option.kind.__doc__ or '').splitlines()[0]} |")
        prefix = f"{name}[]" if option.several else name
        lines += [_row(f"{prefix}.{key}", inner, option_of(inner)) for key, inner in _ordered(option.kind).items()]
    return _HEAD + "\n".join(lines) + "\n"


def _ordered(section: type[Section]) -> dict[str, FieldInfo]:
    """The required keys of a section first."""
    return dict(sorted(section.model_fields.items(), key=lambda item: not item[1].is_required()))


def _row(name: str, field: FieldInfo, option: Option) -> str:
    default = "required" if field.is_required() else f"`{json.dumps(field.default)}`".replace('"', "")
    return f"| `{name}` | {_type(option)} | {option.flag.unit.lower()} | {default} | {field.description} |"


def _type(option: Option) -> str:
    """``whole number from 1 to 1024``, ``list of fisher or out_sq``."""
    if get_origin(option.kind) is Literal:
        text = " or ".join(f"`{choice}`" for choice in get_args(option.kind))
    else:
        text = {int: "whole number", float: "number", bool: "true or false", str: "text"}.get(option.kind, "mapping")
    words = {"ge": "from", "gt": "above", "le": "to", "lt": "below"}
    text += "".join(f" {words[key]} {limit}" for key, limit in sorted(option.limits.items()) if limit < _ANY)
    return f"list of {text}" if option.several else text


def schema() -> dict[str, Any]:
    """The JSON schema of a configuration, for editors; `loading.load_config` checks more."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **Config.model_json_schema()}


def main() -> None:
    """Command line."""
    folder = Path(sys.argv[1])
    (folder / "README.md").write_text(reference(), encoding="utf-8")
    (folder / "schema.json").write_text(json.dumps(schema(), indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
