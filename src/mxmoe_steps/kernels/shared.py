"""How a shared expert is cut into slices, and how these lie in a launch. Stdlib only."""

from collections import Counter
from collections.abc import Hashable, Iterable, Sequence

from mxmoe_steps.kernels.codes.format import HALF_ROWS

SHARED_SPREAD = 0.8  # part of a launch that slices of a shared expert are spread over: long tiles must not come last


def shared_slices(shared: int, routed: int) -> int:
    """Experts of the routed size that a shared expert runs as, widths or weights given; 0 if it is no multiple."""
    slices, rest = divmod(shared, routed)
    return 0 if rest else slices


def strips(out_features: Iterable[int]) -> int:
    """Strips of 64 weight rows in blocks of so many output features."""
    return sum(-(-features // HALF_ROWS) for features in out_features)


def interleave(kinds: Sequence[tuple[bool, Hashable]]) -> list[int]:
    """Order of problems, of which ``kinds`` says whether they are slices of a shared expert, and their format.

    Measured (docs/measurements/scheduler.md): slices have many rows and compute, most others wait for memory.
    """
    count, seen = Counter(kinds), Counter[tuple[bool, Hashable]]()
    keys = []
    for index, kind in enumerate(kinds):
        place = (seen[kind] + 0.5) / count[kind]
        keys.append((place * SHARED_SPREAD, 0, index) if kind[0] else (place, 1, index))
        seen[kind] += 1
    return [index for *_, index in sorted(keys)]
