"""What a user may fix: a tiny grammar that selects blocks.

``all``, or conditions joined by "/", which must all hold: ``layer:0-3``, ``expert:7``, ``shared``,
``routed``, ``block:down``. Numbers may be a list with ranges, ``layer:0-1,26``; blocks too, ``block:gate,up``.
"""

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from mxmoe_steps.allocation.blocks import Blocks
from mxmoe_steps.errors import UserError
from mxmoe_steps.schemes import BLOCKS, SHARED, Scheme, parse_scheme

GRAMMAR = "all | layer:0-3 | expert:7 | shared | routed | block:down, joined by '/' (layer:0/block:gate,up)"


@dataclass(frozen=True)
class Constraints:
    """Limits beside the budget. ``fixed`` and ``min_bits`` hold (selector, value); a later one wins."""

    fixed: tuple[tuple[str, Scheme], ...] = ()
    min_bits: tuple[tuple[str, float], ...] = ()
    max_schemes: int | None = None  # different schemes in one layer
    tie_gate_up: bool = False
    time_as: dict[Scheme, Scheme] = field(default_factory=dict)  # scheme without a kernel -> scheme that times it


def select(selector: str, blocks: Blocks) -> NDArray[np.bool_]:
    """Which blocks a selector names, bool [B]; `UserError` when it is malformed or names none."""
    mask = np.ones(len(blocks), bool)
    for condition in selector.split("/"):
        key, _, text = condition.partition(":")
        if key == "shared" and not text:
            mask &= blocks.expert == SHARED
        elif key == "routed" and not text:
            mask &= blocks.expert != SHARED
        elif key in ("layer", "expert") and text:
            mask &= np.isin(getattr(blocks, key), _numbers(text, selector))
        elif key == "block" and text and set(text.split(",")) <= set(BLOCKS):
            mask &= np.isin(blocks.kind, [BLOCKS.index(name) for name in text.split(",")])
        elif condition != "all":
            raise UserError(f"selector {selector!r}: cannot read {condition!r}; write {GRAMMAR}")
    if not mask.any():
        raise UserError(f"selector {selector!r} names no block of this model")
    return mask


def _numbers(text: str, selector: str) -> list[int]:
    """``0-3,7`` -> [0, 1, 2, 3, 7]."""
    numbers: list[int] = []
    for part in text.split(","):
        first, _, last = part.partition("-")
        if not first.isdecimal() or (last and not last.isdecimal()):
            raise UserError(f"selector {selector!r}: cannot read {part!r}; write {GRAMMAR}")
        numbers += range(int(first), int(last or first) + 1)
    return numbers


def split_setting(text: str, flag: str) -> tuple[str, str]:
    """``left=right`` of a repeatable flag."""
    left, equals, right = text.partition("=")
    if not (left and equals and right):
        raise UserError(f"{flag} {text!r}: expected LEFT=RIGHT")
    return left, right


def parse_constraints(
    fix: list[str],
    min_bits: list[str],
    time_as: list[str],
    max_schemes: int | None,
    tie_gate_up: bool,
) -> Constraints:
    """From the text of the command line; `UserError` shows the grammar."""
    floors = []
    for text in min_bits:
        selector, bits = split_setting(text, "--min-bits")
        try:
            floors.append((selector, float(bits)))
        except ValueError:
            raise UserError(f"--min-bits {text!r}: {bits!r} is not a number of bits") from None
    if max_schemes is not None and max_schemes < 1:
        raise UserError(f"--max-schemes {max_schemes}: a layer needs at least one scheme")
    return Constraints(
        tuple((left, parse_scheme(right)) for left, right in (split_setting(text, "--fix") for text in fix)),
        tuple(floors),
        max_schemes,
        tie_gate_up,
        {
            parse_scheme(left): parse_scheme(right)
            for left, right in (split_setting(text, "--time-as") for text in time_as)
        },
    )
