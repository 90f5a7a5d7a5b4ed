"""What a user may fix: a tiny grammar that selects blocks.

``all``, or conditions joined by "/", which must all hold: ``layer:0-3``, ``expert:7``, ``shared``,
``routed``, ``block:down``. Numbers may be a list with ranges, ``layer:0-1,26``; blocks too, ``block:gate,up``.
"""

import re
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from mxmoe_steps.allocation.blocks import Blocks
from mxmoe_steps.errors import UserError
from mxmoe_steps.schemes import BLOCKS, ORIGINAL, SHARED, Scheme, parse_scheme

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
    for key, ranges in parse_selector(selector):
        if key == "shared":
            mask &= blocks.expert == SHARED
        elif key == "routed":
            mask &= blocks.expert != SHARED
        elif key != "all":
            column = getattr(blocks, "kind" if key == "block" else key)
            mask &= np.any([(column >= first) & (column <= last) for first, last in ranges], 0)
    if not mask.any():
        raise UserError(f"selector {selector!r} names no block of this model")
    return mask


def parse_selector(selector: str) -> list[tuple[str, list[tuple[int, int]]]]:
    """The conditions of a selector: a key and ranges of numbers, first and last; blocks by their place in BLOCKS."""
    conditions = []
    for condition in selector.split("/"):
        key, _, text = condition.partition(":")
        if key in ("all", "shared", "routed") and condition == key:
            conditions.append((key, [(0, 0)]))
        elif key in ("layer", "expert") and text:
            conditions.append((key, [_range(part, selector) for part in text.split(",")]))
        elif key == "block" and text and set(text.split(",")) <= set(BLOCKS):
            conditions.append((key, [(BLOCKS.index(name), BLOCKS.index(name)) for name in text.split(",")]))
        else:
            raise UserError(f"selector {selector!r}: cannot read {condition!r}; write {GRAMMAR}")
    return conditions


def _range(text: str, selector: str) -> tuple[int, int]:
    """``0-3`` -> (0, 3), ``7`` -> (7, 7)."""
    match = re.fullmatch(r"(\d{1,18})(?:-(\d{1,18}))?", text)
    if match is None:
        raise UserError(f"selector {selector!r}: cannot read {text!r}; write {GRAMMAR}")
    return int(match[1]), int(match[2] or match[1])


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
            floor = float(bits)
        except ValueError:
            raise UserError(f"--min-bits {text!r}: {bits!r} is not a number of bits") from None
        if not 0 < floor <= ORIGINAL.weight_bits:  # nor NaN
            raise UserError(f"--min-bits {text!r}: bits lie above 0 and at most at {ORIGINAL.weight_bits}")
        floors.append((selector, floor))
    fixed = [(left, parse_scheme(right)) for left, right in (split_setting(text, "--fix") for text in fix)]
    for selector, _ in (*fixed, *floors):
        parse_selector(selector)
    if max_schemes is not None and max_schemes < 1:
        raise UserError(f"--max-schemes {max_schemes}: a layer needs at least one scheme")
    return Constraints(
        tuple(fixed),
        tuple(floors),
        max_schemes,
        tie_gate_up,
        {
            parse_scheme(left): parse_scheme(right)
            for left, right in (split_setting(text, "--time-as") for text in time_as)
        },
    )
