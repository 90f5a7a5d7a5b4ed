"""The ``quantization_config`` in ``config.json`` of a packed checkpoint::

    {"quant_method": "mxmoe", "version": 1, "schemes": ["w2a16_g128_asym", ...],
     "blocks": {"0": {"-1": [1, 1, 2], "0": [0, 0, 1], ...}, ...}, "rotation": "hadamard"}

``blocks[layer][expert]`` are the scheme numbers of gate, up and down; expert -1 is the shared expert. Where there is
a ``rotation``, every packed block multiplies inputs that `mxmoe_steps.quantizers.hadamard.rotate` has rotated.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, NotRequired

from pydantic import Field
from typing_extensions import TypedDict

from mxmoe_steps.errors import UserError
from mxmoe_steps.records import STRICT, Index, SchemeName, parse_record

_FIX = "run the quantize step again"

_Number = Annotated[str, Field(pattern=r"^(0|[1-9]\d{0,8})$")]
_ExpertNumber = Annotated[str, Field(pattern=r"^(-1|0|[1-9]\d{0,8})$")]


class _Quantization(TypedDict):
    __pydantic_config__ = STRICT  # type: ignore[misc]

    quant_method: Literal["mxmoe"]
    version: Literal[1]
    schemes: Annotated[list[SchemeName], Field(min_length=1)]
    blocks: Annotated[
        dict[_Number, Annotated[dict[_ExpertNumber, tuple[Index, Index, Index]], Field(min_length=1)]],
        Field(min_length=1),
    ]
    rotation: NotRequired[Literal["hadamard"] | None]


def checked_quantization(stated: Mapping[str, Any], file: str | Path = "config.json") -> dict[str, Any]:
    """The keys of a ``quantization_config``; `UserError` for what is missing, of another type or out of range."""
    content = parse_record(f"{file}: quantization_config", _Quantization, _FIX, json.dumps(stated))
    for layer, experts in content["blocks"].items():
        for expert, numbers in experts.items():
            if max(numbers) >= len(content["schemes"]):
                raise UserError(
                    f"{file}: quantization_config: blocks.{layer}.{expert}: {max(numbers)} is not the number of"
                    f" one of {len(content['schemes'])} schemes; {_FIX}"
                )
    return content


def assignment_of(config: Mapping[str, Any]) -> list[list[Any]]:
    """Rows [layer, expert, gate, up, down] with names of schemes, of a packed checkpoint's ``config.json``."""
    stated = checked_quantization(config["quantization_config"])
    return [
        [int(layer), int(expert), *(stated["schemes"][number] for number in numbers)]
        for layer, experts in stated["blocks"].items()
        for expert, numbers in experts.items()
    ]
