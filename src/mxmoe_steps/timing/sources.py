"""The kernels' source, as measured times depend on it."""

from collections.abc import Iterable

from mxmoe_steps.kernels.architecture import Architecture
from mxmoe_steps.kernels.architectures import DEFAULT, for_target
from mxmoe_steps.kernels.codes.format import Format
from mxmoe_steps.provenance import closure, module_hash

_KERNELS = "mxmoe_steps.kernels."
_FORMATS = f"{_KERNELS}formats"  # the registry: it decides no times


def kernel_hashes(architecture: Architecture, formats: Iterable[Format] | None = None) -> dict[str, str]:
    """Hash of every module that times of ``formats``, or of all, depend on: the generator and their codes."""
    codes = [_FORMATS] if formats is None else [type(format_).__module__ for format_ in formats]
    modules = {name for root in (architecture.generator, *codes) for name in closure(root)} - {_FORMATS}
    return {name.removeprefix(_KERNELS): module_hash(name) for name in sorted(modules) if name.startswith(_KERNELS)}


def changed_kernels(measured: dict[str, str], target: str) -> list[str]:
    """Modules whose hash is no longer that of the kernels that were measured, for GPUs that compilers call ``target``;
    codes that were not do not count."""
    architecture = for_target(target) or DEFAULT
    now, generator = kernel_hashes(architecture), kernel_hashes(architecture, formats=())
    return sorted(name for name in measured.keys() | generator if now.get(name) != measured.get(name))
