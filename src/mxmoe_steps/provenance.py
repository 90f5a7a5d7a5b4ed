"""What makes Snakemake re-run a job: the code a step really uses, told by name. Stdlib only.

Snakemake compares the *values* of a rule's params. A rule therefore carries one stamp per module that
its step imports, directly or not, and one per package whose version can change results. A stamp is the
hash of the module's syntax tree without docstrings, so comments and layout re-run nothing.

A user's modules (`mxmoe_steps.extensions`) and what stands beside them are stamped in the same way, with the version of
every package that they import.

Modules that decide no bytes have no stamp: this one, the records of what results are made from, and `inference`,
which serves finished checkpoints and which no step runs.
"""

import ast
import hashlib
import itertools
import json
from collections.abc import Collection, Iterable
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

from mxmoe_steps.atomic import write_json

PACKAGE = "mxmoe_steps"
_ROOT = Path(__file__).parent
_UNSTAMPED = tuple(f"{PACKAGE}.{name}" for name in ("provenance", "made_from", "inference"))
_DECIDING = {  # packages whose version can change results, each with those that do its work
    **dict.fromkeys(("datasets", "matplotlib", "numpy", "ortools", "pandas", "pyarrow", "safetensors", "torch"), ()),
    "transformers": ("tokenizers",),
}


_FOLDERS: list[Path] = []  # of a user's modules


def add_folder(folder: Path) -> None:
    """Follow imports of modules in ``folder``, too."""
    if folder not in _FOLDERS:
        _FOLDERS.append(folder)
        module_file.cache_clear()
        imported.cache_clear()


@cache
def module_file(module: str) -> Path | None:
    """Source file of one of our modules or of a user's, None when ``module`` is neither."""
    first, *rest = module.split(".")
    for base in [_ROOT.joinpath(*rest)] if first == PACKAGE else [folder.joinpath(first, *rest) for folder in _FOLDERS]:
        for candidate in (base.with_suffix(".py"), base / "__init__.py"):
            if candidate.is_file():
                return candidate
    return None


@dataclass(frozen=True)
class _Source:
    """What is known of a module's code: its ``hash``, and every name that it ``imports``, inside functions too."""

    hash: str
    imports: frozenset[str]


@cache
def _source(module: str) -> _Source:
    """From the user's cache, where the same bytes have been read before: to parse all of our modules takes seconds."""
    file = module_file(module)
    assert file is not None
    code = file.read_bytes()
    remembered = _cache() / hashlib.sha256(b"\0".join([_own_code(), file.name.encode(), code])).hexdigest()
    try:
        known = json.loads(remembered.read_bytes())
        return _Source(known["hash"], frozenset(known["imports"]))
    except (OSError, ValueError, KeyError):
        pass
    tree = ast.parse(code)
    found = _Source(_hash(tree), _imported_names(tree, file.name != "__init__.py"))
    with suppress(OSError):  # a folder that is not ours to write
        remembered.parent.mkdir(parents=True, exist_ok=True)
        write_json(remembered, {"hash": found.hash, "imports": sorted(found.imports)})
    return found


def _cache() -> Path:
    """A file by a hash for all code that was ever read; it may be deleted."""
    return Path("~/.cache/mxmoe-steps/sources").expanduser()


@cache
def _own_code() -> bytes:
    """What decides how modules are read."""
    return Path(__file__).read_bytes()


def _imported_names(tree: ast.Module, whole: bool) -> frozenset[str]:
    """A package runs what stands outside functions whenever one of its modules is imported, and no more than that."""
    names: set[str] = set()
    todo: list[ast.AST] = [tree]
    while todo:
        node = todo.pop()
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            names.add(node.module)
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif whole or not isinstance(node, ast.FunctionDef):
            todo += ast.iter_child_nodes(node)
    return frozenset(names)


@cache
def imported(module: str) -> frozenset[str]:
    """Our modules that run when ``module`` does: those that it imports, and the packages that they are in."""
    names = (module, *_source(module).imports)
    parents = {part for name in names for part in itertools.accumulate(name.split("."), _join)}
    return frozenset(name for name in parents if module_file(name) is not None) - {module}


def _join(package: str, name: str) -> str:
    return f"{package}.{name}"


def file_marks(files: Iterable[Path]) -> list[list[Any]]:
    """What tells that files were replaced: name, size and time of each."""
    return [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files]


def closure(module: str, without: Collection[str] = ()) -> list[str]:
    """``module`` and all of our modules that it needs, sorted; ``without`` those, and what they alone need."""
    seen: set[str] = set()
    todo = [module]
    while todo:
        current = todo.pop()
        if current not in seen and current not in without and not _is_unstamped(current):
            seen.add(current)
            todo += imported(current)
    return sorted(seen)


def _is_unstamped(module: str) -> bool:
    return any(module == name or module.startswith(f"{name}.") for name in _UNSTAMPED)


def module_hash(module: str) -> str:
    """Hash of the module's code, the same under every version of Python: comments, docstrings and layout do not
    count."""
    return _source(module).hash


def _hash(tree: ast.Module) -> str:
    return hashlib.sha256(repr(_plain(tree)).encode()).hexdigest()[:10]


def _plain(node: object) -> object:
    """A syntax tree as nested lists, without docstrings, and without empty fields: versions of Python differ in
    those."""
    if isinstance(node, ast.AST):
        fields = {name: value for name, value in ast.iter_fields(node) if value is not None and value != []}
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            match node.body:
                case [ast.Expr(ast.Constant(str())), *rest]:
                    fields["body"] = rest or [ast.Pass()]
        return [type(node).__name__, *([name, _plain(value)] for name, value in fields.items())]
    return [_plain(one) for one in node] if isinstance(node, list) else repr(node)


def stamps(
    module: str, *packages: str, without: Collection[str] = (), extensions: Collection[str] = ()
) -> dict[str, str]:
    """Params of a rule: ``code_<module>`` for every module used, ``version_<package>`` for packages that matter.

    ``packages`` are added to those that the modules import. ``without``: modules that the rule's jobs never run, unless
    the user's modules ``extensions`` do.
    """
    modules = sorted({*closure(module, without), *(used for name in extensions for used in closure(name))})
    code = {f"code_{name.removeprefix(f'{PACKAGE}.')}": f"{name}@{module_hash(name)}" for name in modules}
    used = {name.partition(".")[0] for one in modules for name in _source(one).imports} & _DECIDING.keys()
    used |= {other for name in used for other in _DECIDING[name]} | set(packages)
    used |= {name for one in modules if not one.startswith(PACKAGE) for name in _packages(one)}
    versions = {f"version_{package}": f"{package} {metadata.version(package)}" for package in sorted(used)}
    return {key.replace(".", "_").replace("-", "_"): value for key, value in (code | versions).items()}


def _packages(module: str) -> set[str]:
    """The installed packages that a user's module imports."""
    names = {name.partition(".")[0] for name in _source(module).imports} - {PACKAGE}
    return {name for name in names if any(metadata.distributions(name=name))}
