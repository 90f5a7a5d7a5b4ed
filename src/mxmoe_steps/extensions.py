"""A user's own modules, named in the configuration: their classes register in the same registries as ours.

A module is imported by its file, with the file's folder behind all others on the path, so that it may import what
stands beside it. `provenance` follows those imports: a step is stamped with them as with our own modules.
"""

import importlib
import sys
from collections.abc import Iterable
from pathlib import Path

from mxmoe_steps.errors import UserError
from mxmoe_steps.provenance import add_folder

_LOADED: dict[str, str] = {}  # module -> its file, as it was named first


def load(files: Iterable[str | Path]) -> None:
    """Import modules that are not yet imported; `UserError` names the file that is none, fails or clashes."""
    for file in map(str, files):
        path = Path(file).resolve()
        if not path.is_file():
            raise UserError(f"extensions: {file}: no such file; correct the path")
        if path.suffix != ".py" or not path.stem.isidentifier():
            raise UserError(f"extensions: {file}: is not named like a Python module; rename it, e.g. my_quantizers.py")
        if str(path.parent) not in sys.path:
            sys.path.append(str(path.parent))
        add_folder(path.parent)
        try:
            module = importlib.import_module(path.stem)
        except UserError as error:
            raise UserError(f"extensions: {file}: {error}") from None
        except Exception as error:  # whatever the user's code raises
            raise UserError(f"extensions: {file}: cannot be imported ({type(error).__name__}: {error})") from error
        if Path(module.__file__ or "").resolve() != path:
            raise UserError(f"extensions: {file}: {path.stem} is the name of another module; rename the file")
        _LOADED.setdefault(path.stem, file)


def file_of(kind: type) -> str | None:
    """The file that was named for the module of a class; None for one of ours."""
    return _LOADED.get(kind.__module__)


def modules_of(files: Iterable[str | Path]) -> list[str]:
    """Names of the modules in files, sorted."""
    return sorted({Path(file).stem for file in files})
