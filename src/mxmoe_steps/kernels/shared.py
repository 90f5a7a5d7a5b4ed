"""How the slices of a shared expert lie in a launch. Stdlib only."""

from collections import Counter
from collections.abc import Hashable, Sequence

SHARED_SPREAD = 0.8  # part of a launch that slices of a shared expert are spread over: long tiles must not come last


def interleave(kinds: Sequence[tuple[bool, Hashable]]) -> list[int]:
    """Order of problems, of which ``kinds`` says whether they are slices of a shared expert, and their format.

    Measured (docs/kernels.md): slices have many rows and compute, most others wait for memory.
    """
    count, seen = Counter(kinds), Counter[tuple[bool, Hashable]]()
    keys = []
    for index, kind in enumerate(kinds):
        place = (seen[kind] + 0.5) / count[kind]
        keys.append((place * SHARED_SPREAD, 0, index) if kind[0] else (place, 1, index))
        seen[kind] += 1
    return [index for *_, index in sorted(keys)]
