"""Random damage to JSON and to bytes, for tests that hand broken files to readers and steps."""

import copy
import json
from collections.abc import Callable
from typing import Any

from hypothesis import strategies as st

from mxmoe_steps.errors import UserError

JUNK = st.sampled_from(
    [None, True, False, -1, 0, 1, 2**31, 2**70, -(2**70), 0.5, -0.5, 1e300, float("nan"), float("inf"), -float("inf"),
     "", "x", "1", "0.5", "../x", "w4a16", "w4a16_g128_asym", "w9a9", "\x00", [], {}, [[]], [None], {"x": 1}]
)  # fmt: skip


def refusal(call: Callable[[], Any]) -> str:
    """The message of the `UserError` that a call ends in, empty when there is none."""
    try:
        call()
    except UserError as error:
        return str(error)
    return ""


def places(value: Any) -> list[tuple[Any, Any]]:
    """(container, key) of everything inside a JSON value."""
    keys = list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    return [place for key in keys for place in ((value, key), *places(value[key]))]


@st.composite
def mutated_json(draw: st.DrawFn, original: Any) -> str:
    """The text of ``original`` after one or two random changes anywhere."""
    value = copy.deepcopy(original)
    for _ in range(draw(st.integers(1, 2))):
        found = places(value)
        if not found:
            break
        depth = draw(st.integers(0, 1))  # half of the draws among the outer keys, which are few
        container, key = draw(st.sampled_from(found if depth else [place for place in found if place[0] is value]))
        match draw(st.sampled_from(["replace", "delete", "repeat", "scale", "swap"])):
            case "replace":
                container[key] = copy.deepcopy(draw(JUNK))
            case "delete":
                del container[key]
            case "repeat" if isinstance(container, list):
                container.insert(key, copy.deepcopy(container[key]))
            case "scale" if isinstance(container[key], int | float):
                container[key] *= draw(st.sampled_from([-1, 0, 2, 1e-9, 1e30]))
            case "swap":
                _, other = draw(st.sampled_from(found))
                if other in container if isinstance(container, dict) else isinstance(other, int):
                    other = other if isinstance(container, dict) else other % len(container)
                    container[key], container[other] = container[other], container[key]
    text = json.dumps(value)
    cut = draw(st.integers(0, 20))  # now and then the end is missing
    return text[: -cut * len(text) // 20] if cut < 2 else text


@st.composite
def mutated_bytes(draw: st.DrawFn, original: bytes) -> bytes:
    """``original`` with some bytes changed, cut off, doubled or added."""
    data = bytearray(original)
    where = draw(st.integers(0, len(data) - 1))
    match draw(st.sampled_from(["flip", "flip", "flip", "cut", "append", "zero", "double"])):
        case "flip":
            data[where] ^= draw(st.integers(1, 255))
        case "cut":
            del data[where:]
        case "append":
            data += draw(st.binary(min_size=1, max_size=64))
        case "zero":
            data[where : where + 64] = bytes(len(data[where : where + 64]))
        case "double":
            data[where:where] = data[where : where + 64]
    return bytes(data)


@st.composite
def mutated_columns(draw: st.DrawFn, columns: dict[str, list[Any]]) -> dict[str, list[Any]]:
    """The columns of a table after a value was replaced by another of its type, or a row lost or doubled."""
    damaged = {name: list(values) for name, values in columns.items()}
    row = draw(st.integers(0, len(next(iter(damaged.values()))) - 1))
    match draw(st.sampled_from(["value", "value", "value", "lose", "double"])):
        case "lose":
            for values in damaged.values():
                del values[row]
        case "double":
            for values in damaged.values():
                values.append(values[row])
        case "value":
            values = damaged[draw(st.sampled_from(sorted(damaged)))]
            values[row] = draw(_other(values[row]))
    return damaged


def _other(value: Any) -> st.SearchStrategy[Any]:
    """Values that a column of such values can hold."""
    if isinstance(value, bool):
        return st.sampled_from([not value, None])
    if isinstance(value, int):
        return st.sampled_from([-1, -2, 0, 1, value + 1, 2**31 - 1, None])
    if isinstance(value, float):
        return st.sampled_from([float("nan"), float("inf"), -1.0, 0.0, value * 2, 1e300, None])
    if isinstance(value, str):
        return st.sampled_from(["", "x", "w4a16", "w8a16_g-1_sym", None])
    return st.just([]) | st.sampled_from([value[:-1], [*value, value[0]], None]) | _other(value[0]).map(lambda v: [v])
