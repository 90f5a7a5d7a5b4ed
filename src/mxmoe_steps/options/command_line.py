"""The command line of a class of options: its parser, and its canonical text."""

import argparse
import shlex
from collections.abc import Sequence
from inspect import get_annotations
from typing import Any, Literal, TypeVar, get_args, get_origin

from pydantic import ValidationError
from pydantic.fields import FieldInfo

from mxmoe_steps.atomic import canonical_json
from mxmoe_steps.options.base import Options, option_of
from mxmoe_steps.values import exact

Kind = TypeVar("Kind", bound=Options)


def parse(kind: type[Kind], doc: str | None, words: Sequence[str] | None = None) -> Kind:
    """Options from ``words``, or from this process's command line; ``doc``, a step's docstring, is the help.

    What is wrong with them ends the process with exit status 2 and one line that names the option.
    """
    parser = _parser(kind, doc)
    given = vars(parser.parse_args(words))
    try:
        return kind.model_validate(given)
    except ValidationError as error:
        parser.error(_complaint(kind, error))


def flags(kind: type[Options], *sections: Options, **values: Any) -> str:
    """The command line that gives ``values`` and those fields of ``sections`` that ``kind`` has, as one canonical text.

    Names are sorted and every value is spelled in one way. None and empty lists are left out.
    """
    found = {
        name: getattr(section, name)
        for section in sections
        for name in type(section).model_fields
        if name in kind.model_fields
    }
    words: list[str] = []
    for name, value in sorted((found | values).items()):
        option = option_of(kind.model_fields[name])
        if value is None or value == []:
            continue
        if isinstance(value, bool):
            words.append(_flag(name) if value else _flag(f"no_{name}"))
        else:
            words += [_flag(name), *map(_word, value if option.several else [value])]
    return shlex.join(words)


def _flag(name: str) -> str:
    return f"--{name}".replace("_", "-")


def _word(value: Any) -> str:
    if isinstance(value, dict):
        return canonical_json(value)
    return exact(value) if isinstance(value, float) else str(value)


def _parser(kind: type[Options], doc: str | None) -> argparse.ArgumentParser:
    """Options of the class itself before those that it inherits; values stay text, and absent ones are left out."""
    parser = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter, argument_default=argparse.SUPPRESS
    )
    for name in dict.fromkeys(name for owner in kind.__mro__ for name in get_annotations(owner)):
        if name in kind.model_fields:
            _add(parser, name, kind.model_fields[name])
    return parser


def _add(parser: argparse.ArgumentParser, name: str, field: FieldInfo) -> None:
    option = option_of(field)
    text = f"{field.description}{_default(field)}".replace("%", "%%")
    if option.kind is bool:
        parser.add_argument(_flag(name), action=argparse.BooleanOptionalAction, help=text)
        return
    settings: dict[str, Any] = {"required": field.is_required(), "help": text}
    if get_origin(option.kind) is Literal:
        settings["choices"] = get_args(option.kind)
    else:
        settings["metavar"] = option.flag.unit or name.upper()
    if option.several:  # `--fix a=b --fix c=d` and `--fix a=b c=d` are the same
        settings |= {"nargs": "+", "action": "extend"}
    elif get_origin(option.kind) is tuple:
        settings |= {"nargs": len(get_args(option.kind))}
    parser.add_argument(_flag(name), **settings)


def _default(field: FieldInfo) -> str:
    """The default where there is one to be told."""
    if field.is_required() or field.default in (None, []):
        return ""
    return f" (default: {'yes' if field.default is True else 'no' if field.default is False else field.default})"


def _complaint(kind: type[Options], error: ValidationError) -> str:
    """The first mistake, with the flag that it is about."""
    first = error.errors(include_url=False)[0]
    text = str(first["ctx"]["error"]) if first["type"] == "value_error" else f"{first['msg']}; found {first['input']!r}"
    if not first["loc"]:
        return text
    name = str(first["loc"][0])
    option = option_of(kind.model_fields[name])
    if option.kind in (int, float):
        text = f"{first['input']!r} is not {_expected(option.kind, option.limits)}"
    return f"argument {_flag(name)}: {text}"


def _expected(kind: type, limits: dict[str, float]) -> str:
    """``a whole number from 1 to 1024``."""
    number = "a whole number" if kind is int else "a number" if "le" in limits else "a finite number"
    least = f" from {limits['ge']}" if "ge" in limits else f" above {limits['gt']}" if "gt" in limits else ""
    most = "" if "le" not in limits else f" to {limits['le']}" if "ge" in limits else f" and up to {limits['le']}"
    return number + least + most
