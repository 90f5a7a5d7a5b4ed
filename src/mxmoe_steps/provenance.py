"""What makes Snakemake re-run a job: the code a step really uses, told by name. Stdlib only.

Snakemake compares the *values* of a rule's params. A rule therefore carries one stamp per module that
its step imports, directly or not, and one per package whose version can change results. A stamp is the
hash of the module's syntax tree without docstrings, so comments and layout re-run nothing.
"""

import ast
import hashlib
from collections.abc import Iterable
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

PACKAGE = "mxmoe_steps"
_ROOT = Path(__file__).parent


@cache
def module_file(module: str) -> Path | None:
    """Source file of one of our modules, None when ``module`` is not one."""
    parts = module.split(".")
    if parts[0] != PACKAGE:
        return None
    base = _ROOT.joinpath(*parts[1:])
    for candidate in (base.with_suffix(".py"), base / "__init__.py"):
        if candidate.is_file() and base != _ROOT:
            return candidate
    return None


@cache
def _parse(module: str) -> ast.Module:
    file = module_file(module)
    assert file is not None
    return ast.parse(file.read_text(encoding="utf-8"))


@cache
def imported(module: str) -> frozenset[str]:
    """Our modules that ``module`` imports anywhere, inside functions too."""
    names: set[str] = set()
    for node in ast.walk(_parse(module)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            names.add(node.module)
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return frozenset(name for name in names if module_file(name) is not None)


def file_marks(files: Iterable[Path]) -> list[list[Any]]:
    """What tells that files were replaced: name, size and time of each."""
    return [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files]


def closure(module: str) -> list[str]:
    """``module`` and all of our modules that it needs, sorted."""
    seen: set[str] = set()
    todo = [module]
    while todo:
        current = todo.pop()
        if current not in seen:
            seen.add(current)
            todo += imported(current)
    return sorted(seen)


@cache
def module_hash(module: str) -> str:
    """Hash of the module's code, the same under every version of Python: comments, docstrings and layout do not
    count."""
    return hashlib.sha256(repr(_plain(_parse(module))).encode()).hexdigest()[:10]


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


def stamps(module: str, *packages: str) -> dict[str, str]:
    """Params of a rule: ``code_<module>`` for every module used, ``version_<package>`` for ``packages``."""
    code = {f"code_{name.removeprefix(f'{PACKAGE}.')}": f"{name}@{module_hash(name)}" for name in closure(module)}
    versions = {f"version_{package}": f"{package} {metadata.version(package)}" for package in packages}
    return {key.replace(".", "_").replace("-", "_"): value for key, value in (code | versions).items()}
