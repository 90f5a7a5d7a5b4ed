"""A checked configuration from plain values, and errors that name the key and the fix."""

import copy
from typing import Any

from pydantic import ValidationError

from mxmoe_steps.config.existence import check_selectors
from mxmoe_steps.config.sections import Config
from mxmoe_steps.errors import UserError
from mxmoe_steps.models.families import describe_model, is_local, open_original
from mxmoe_steps.models.published import published_scheme
from mxmoe_steps.schemes import PUBLISHED
from mxmoe_steps.values import expand


def load_config(values: dict[str, Any], origin: str) -> Config:
    """Validate ``values``; `UserError` lists every mistake with its key. ``origin`` names the file(s)."""
    try:
        config = Config.model_validate(_with_published(values))
    except ValidationError as error:
        lines = [f"  {_where(item['loc'])}{_message(item)}" for item in error.errors()]
        raise UserError(f"{origin} is not a valid configuration:\n" + "\n".join(lines)) from None
    if is_local(config.model.path):
        check_selectors(config.solve, open_original(config.model.path))
    return config


def _with_published(values: dict[str, Any]) -> dict[str, Any]:
    """``values`` with the name of the scheme of the model's own codes wherever a scheme is called `PUBLISHED`."""
    match values:
        case {"calibrate": {"schemes": [*schemes]}, "model": {"path": str(path)}} if PUBLISHED in schemes:
            name = published_scheme(describe_model(expand(path))[1]).name
        case _:
            return values

    def named(text: Any) -> Any:
        if not isinstance(text, str):
            return text
        return "=".join(name if part == PUBLISHED else part for part in text.split("="))

    values = copy.deepcopy(values)
    values["calibrate"]["schemes"] = [*map(named, schemes)]
    match values:
        case {"solve": dict(solve)}:
            solve |= {key: [*map(named, solve[key])] for key in ("fix", "time_as") if isinstance(solve.get(key), list)}
    return values


def _where(location: tuple[int | str, ...]) -> str:
    return ".".join(map(str, location)) + ": " if location else ""


def _message(item: Any) -> str:
    if item["type"] == "missing":
        return "this key is required"
    if item["type"] == "value_error":
        return str(item["ctx"]["error"])
    value = item["input"]
    advice = ""
    if isinstance(value, str) and item["type"] in ("int_type", "float_type"):
        advice = " (in YAML write numbers without quotes, and 1.0e-3 rather than 1e-3)"
    return f"{item['msg']}; found {value!r}{advice}"
