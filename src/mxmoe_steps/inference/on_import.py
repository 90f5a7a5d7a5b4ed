"""Registers our quantizer with transformers as soon as both packages are imported, in either order. Stdlib only.

transformers has no way to announce a quantizer before it is imported, and importing it takes seconds that a step
without a model must not pay.
"""

import importlib
import importlib.util
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

_LOADER_OF_MODELS = "transformers.modeling_utils"  # nothing is loaded from a checkpoint without it
_PLUGIN = "mxmoe_steps.inference.plugin"


class _Finder(MetaPathFinder):
    """Imports the plugin right after the module that loads models."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != _LOADER_OF_MODELS:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_and_register(module: ModuleType) -> None:
                execute(module)
                importlib.import_module(_PLUGIN)

            spec.loader.exec_module = execute_and_register  # type: ignore[method-assign]
        return spec


def register_with_transformers() -> None:
    """Now if transformers can load models already, else when it can."""
    if _LOADER_OF_MODELS in sys.modules:
        importlib.import_module(_PLUGIN)
    else:
        sys.meta_path.insert(0, _Finder())
