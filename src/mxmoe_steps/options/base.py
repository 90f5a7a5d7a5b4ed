"""What classes of options are made of: the base class, the types of single options with their limits and units."""

import os
from dataclasses import dataclass
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import AfterValidator, BaseModel, ConfigDict, Field
from pydantic.fields import FieldInfo

from mxmoe_steps.errors import UserError
from mxmoe_steps.registry import NAME
from mxmoe_steps.schemes import parse_scheme
from mxmoe_steps.values import distinct

LARGEST = 1 << 20  # sequences, tokens of a sequence or of a step; more is a slip of the pen
MOST_BITS = 16  # of a weight: the original's


@dataclass(frozen=True)
class Flag:
    """What an option's type does not say: the ``unit`` of a value, or what kind of name or file it is.

    ``decides``: False where the bytes of the result do not depend on it, as on where the result goes.
    """

    unit: str
    decides: bool = True


class Options(BaseModel):
    """Named values with types, defaults and descriptions; unknown names are errors."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False, frozen=True)


class StepOptions(Options):
    """Of every step."""

    made_from: Annotated[str | None, Flag("DIGEST", decides=False)] = Field(
        None, description="what decides the result, for the record beside it (made_from.py)"
    )

    def deciding(self) -> dict[str, Any]:
        """The options that the bytes of the result depend on, by name."""
        undecided = {name for name, field in type(self).model_fields.items() if not option_of(field).flag.decides}
        return self.model_dump(mode="json", exclude=undecided)


@dataclass(frozen=True)
class Option:
    """What a field's annotation says: the type of a value, its limits, whether there may be ``several``."""

    kind: Any
    limits: dict[str, float]
    several: bool
    flag: Flag


def option_of(field: FieldInfo) -> Option:
    """Without ``None``, a list and the annotations around the type of one value."""
    kind: Any = field.annotation
    notes, several = list(field.metadata), False
    while get_origin(kind) in (Annotated, list, Union, UnionType):
        several |= get_origin(kind) is list
        notes += getattr(kind, "__metadata__", ())
        kind = next(inner for inner in get_args(kind) if inner is not type(None))
    notes += [inner for note in notes if isinstance(note, FieldInfo) for inner in note.metadata]
    limits = {name: getattr(note, name) for note in notes for name in ("gt", "ge", "lt", "le") if hasattr(note, name)}
    return Option(kind, limits, several, next((note for note in notes if isinstance(note, Flag)), Flag("")))


def description_of(options: type[Options], name: str) -> str:
    """The help of an option, for another field that means the same."""
    description = options.model_fields[name].description
    assert description is not None
    return description


def _canonical_scheme(text: str) -> str:
    """The canonical name of a scheme."""
    try:
        return parse_scheme(text).name
    except UserError as error:
        raise ValueError(str(error)) from None


def _file_to_write(path: Path) -> Path:
    """A file that can be written, known before anything is computed."""
    if path.is_dir():
        raise ValueError(f"{path} is a folder; give the name of a file")
    _check_place(path)
    return path


def _folder_to_write(path: Path) -> Path:
    """A folder that can be written, known before anything is computed."""
    if path.exists() and not path.is_dir():
        raise ValueError(f"{path} is a file; give the name of a folder")
    _check_place(path)
    return path


def _check_place(path: Path) -> None:
    """`ValueError` unless ``path`` can be made where it is to be."""
    above = next(parent for parent in path.absolute().parents if parent.exists())
    if not above.is_dir():
        raise ValueError(f"{above} is a file, so {path} cannot be made")
    if not os.access(above, os.W_OK):
        raise ValueError(f"no permission to write in {above}")


InFile = Annotated[Path, Flag("FILE")]
InFiles = Annotated[list[Path], Flag("FILE")]
InFolder = Annotated[Path, Flag("FOLDER")]
InFolders = Annotated[list[Path], Flag("FOLDER")]
OutFile = Annotated[Path, AfterValidator(_file_to_write), Flag("FILE", decides=False)]
OutFolder = Annotated[Path, AfterValidator(_folder_to_write), Flag("FOLDER", decides=False)]

Count = Annotated[int, Field(ge=1, le=2**31 - 1)]
Natural = Annotated[int, Field(ge=0, le=2**31 - 1)]
Sequences = Annotated[int, Field(ge=1, le=LARGEST), Flag("SEQUENCES")]
Length = Annotated[int, Field(ge=2, le=LARGEST), Flag("TOKENS")]
Tokens = Annotated[int, Field(ge=1, le=LARGEST), Flag("TOKENS")]
Threads = Annotated[int, Field(ge=1, le=1024), Flag("THREADS")]
Seed = Annotated[int, Field(ge=0, le=(1 << 63) - 1)]
Bits = Annotated[float, Field(gt=0, le=MOST_BITS), Flag("BITS")]
Exponent = Annotated[float, Field(ge=0, le=1)]
Ceiling = Annotated[float, Field(gt=0)]
Names = Annotated[list[str], AfterValidator(distinct), Flag("NAME")]
SchemeName = Annotated[str, AfterValidator(_canonical_scheme), Flag("SCHEME")]
Schemes = Annotated[list[SchemeName], Flag("SCHEME")]
Settings = Annotated[list[str], Flag("SELECTOR=VALUE")]
Device = Annotated[str, Field(pattern=r"^(cpu|auto|cuda(:\d+)?)$")]

Dtype = Literal["float32", "bfloat16", "float16", "auto"]
Granularity = Literal["block", "expert", "layer", "uniform"]
Scope = Literal["model", "layer"]
LossName = Annotated[str, Field(pattern=rf"^{NAME}$"), Flag("NAME")]
