"""A checked configuration from plain values, and errors that name the key and the fix."""

from typing import Any

from pydantic import ValidationError

from mxmoe_steps.config.existence import check_selectors
from mxmoe_steps.config.sections import Config
from mxmoe_steps.errors import UserError
from mxmoe_steps.models.families import is_local, open_original


def load_config(values: dict[str, Any], origin: str) -> Config:
    """Validate ``values``; `UserError` lists every mistake with its key. ``origin`` names the file(s)."""
    try:
        config = Config.model_validate(values)
    except ValidationError as error:
        lines = [f"  {_where(item['loc'])}{_message(item)}" for item in error.errors()]
        raise UserError(f"{origin} is not a valid configuration:\n" + "\n".join(lines)) from None
    if is_local(config.model.path):
        check_selectors(config.solve, open_original(config.model.path))
    return config


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
