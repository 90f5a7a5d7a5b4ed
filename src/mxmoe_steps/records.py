"""Reading JSON that a step hands on: whole, of the right types, finite and in range, or a `UserError`.

A file's schema is a TypedDict made of the types below; what a type cannot say is a function of the content, which
raises `ValueError`.
"""

from collections.abc import Callable
from functools import cache
from os import PathLike
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, ConfigDict, Field, TypeAdapter, ValidationError

from mxmoe_steps.errors import UserError
from mxmoe_steps.schemes import SHARED, parse_scheme

STRICT = ConfigDict(strict=True, allow_inf_nan=False)  # ``__pydantic_config__`` of a schema

_MOST = 2**31 - 1  # of anything counted
_LARGEST = 1e100  # sums and products of such numbers stay finite


def _canonical(name: str) -> str:
    try:
        canonical = parse_scheme(name).name
    except UserError as error:
        raise ValueError(str(error)) from None
    if canonical != name:
        raise ValueError(f"scheme {name!r} is not canonical; write {canonical}")
    return name


Count = Annotated[int, Field(ge=1, le=_MOST)]
Index = Annotated[int, Field(ge=0, le=_MOST)]
Expert = Annotated[int, Field(ge=SHARED, le=_MOST)]
Total = Annotated[int, Field(ge=0, lt=2**63)]
Seed = Annotated[int, Field(ge=0, lt=2**64)]
Name = Annotated[str, Field(min_length=1)]
Quantity = Annotated[float, Field(ge=0, le=_LARGEST)]
Positive = Annotated[float, Field(gt=0, le=_LARGEST)]
Share = Annotated[float, Field(ge=0, le=1)]
SchemeName = Annotated[str, AfterValidator(_canonical)]


@cache
def _adapter(schema: Any) -> TypeAdapter[Any]:
    return TypeAdapter(schema)


def read_record(
    path: str | PathLike[str], schema: Any, fix: str, check: Callable[[Any], None] | None = None
) -> dict[str, Any]:
    """The JSON file ``path`` as ``schema`` describes it, and as ``check`` accepts it.

    Keys that the schema does not name are left out. `UserError` names the file and the key, and ends with ``fix``.
    """
    try:
        text = Path(path).read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); {fix}") from None
    return parse_record(path, schema, fix, text, check)


def parse_record(
    path: str | PathLike[str], schema: Any, fix: str, text: str | bytes, check: Callable[[Any], None] | None = None
) -> dict[str, Any]:
    """The same for JSON that was found inside the file ``path``."""
    try:
        content: dict[str, Any] = _adapter(schema).validate_json(text)
        if check is not None:
            check(content)
    except ValidationError as error:
        raise UserError(f"{path}: {_first(error)}; {fix}") from None
    except ValueError as error:
        raise UserError(f"{path}: {error}; {fix}") from None
    return content


def _first(error: ValidationError) -> str:
    """The first complaint, with its place as one would write it: ``parts[0].vertices[2].bits: ...``."""
    first = error.errors(include_url=False, include_context=False)[0]
    place = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in first["loc"]).removeprefix(".")
    message = first["msg"].removeprefix("Value error, ")
    return f"{place}: {message}" if place else message
