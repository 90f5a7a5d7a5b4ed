"""Which source formats there are, and which ones a checkpoint's ``config.json`` names."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mxmoe_steps.errors import UserError
from mxmoe_steps.models.sources.format import FIX, SourceFormat
from mxmoe_steps.models.sources.fp8 import Fp8
from mxmoe_steps.models.sources.mxfp4 import Mxfp4
from mxmoe_steps.models.sources.nvfp4 import NvFp4
from mxmoe_steps.models.sources.pack_quantized import PackQuantized
from mxmoe_steps.models.sources.plain_quantized import PlainQuantized

FORMATS: Mapping[str, type[SourceFormat]] = {  # by quant_method, or, of compressed-tensors, by format
    "fp8": Fp8,
    "mxfp4": Mxfp4,
    "pack-quantized": PackQuantized,
    "float-quantized": PlainQuantized,
    "int-quantized": PlainQuantized,
    "naive-quantized": PlainQuantized,
    "nvfp4-pack-quantized": NvFp4,
}
_COMPRESSED = "compressed-tensors"  # a method of many formats, each for a group of layers


def source_formats(stated: Mapping[str, Any], file: Path) -> list[SourceFormat]:
    """The formats of a ``quantization_config`` of ``file``; `UserError` for one that is not read, by its name."""
    method = stated["quant_method"]
    groups = {method: [stated]} if method != _COMPRESSED else _groups(stated, file)
    for name in groups:
        if name not in FORMATS:
            of = f"{method}, {name}" if method == _COMPRESSED else name
            raise UserError(f"{file}: the weights are quantized already ({of}), in a format that is not read; {FIX}")
    return [FORMATS[name](name, settings, file) for name, settings in sorted(groups.items())]


def _groups(stated: Mapping[str, Any], file: Path) -> dict[str, list[Mapping[str, Any]]]:
    """Format -> what compressed-tensors says of the weights of its groups of layers."""
    groups: dict[str, list[Mapping[str, Any]]] = {}
    try:
        for group in stated["config_groups"].values():
            if group.get("weights") is not None:
                groups.setdefault(str(group.get("format") or stated["format"]), []).append(dict(group["weights"]))
    except (KeyError, TypeError, ValueError, AttributeError):
        raise UserError(
            f"{file}: quantization_config: config_groups do not say how {_COMPRESSED} weights are stored; {FIX}"
        ) from None
    return groups
