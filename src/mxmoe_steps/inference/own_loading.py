"""Packed experts take their tensors from the files by themselves, while transformers loads the rest of the model.

A checkpoint has thousands of them, and transformers compiles a pattern for the name of each: 0.2 ms of the host. Here
a tensor is a view of its mapped file, whose bytes are read when something touches them.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import nn


class OwnLoading:
    """Takes the modules at ``paths`` out of ``model`` until `finish`.

    ``names``: of their tensors in ``model``, which has no weights yet, -> in ``files``.
    """

    def __init__(self, model: Any, paths: Iterable[str], names: Mapping[str, str], files: Sequence[str | Path]) -> None:
        self._names, self._files = names, files
        self._modules = {path: model.get_submodule(path) for path in paths}
        names_begin = set(self._modules)  # in the model, and in the files
        for path in self._modules:
            model.set_submodule(path, nn.Module())
            own = next(name for name in names if name.startswith(f"{path}."))
            names_begin.add(names[own].removesuffix(own.removeprefix(path)))
        self._unexpected = model._keys_to_ignore_on_load_unexpected
        ours = {rf"^{re.escape(name)}\." for name in names_begin}
        model._keys_to_ignore_on_load_unexpected = {*(self._unexpected or ()), *ours}

    def finish(self, model: Any) -> None:
        """Put them back, with their tensors. Weights that are not packed get the precision of the model."""
        model._keys_to_ignore_on_load_unexpected = self._unexpected
        tensors = {}
        for file in self._files:
            with safe_open(file, "pt") as opened:
                tensors.update({name: opened.get_tensor(name) for name in {*opened.keys()} & {*self._names.values()}})
        for path, module in self._modules.items():
            own = {
                name: tensors[self._names[f"{path}.{name}"]].to(empty.dtype)
                for name, empty in module.state_dict().items()
            }
            module.load_state_dict(own, assign=True)
            model.set_submodule(path, module.train(model.training))
