"""Measured launches: the rows of a MEASUREMENTS table, checked for what the fit takes for granted."""

from pathlib import Path
from typing import Any, TypedDict

import numpy as np

from mxmoe_steps.errors import UserError
from mxmoe_steps.kernels.architectures import PHASES
from mxmoe_steps.schemes import is_canonical
from mxmoe_steps.tables import MEASUREMENTS, read_table
from mxmoe_steps.timing.shapes import MODELS


class Measurement(TypedDict):
    """One timed launch, columns as in `tables.MEASUREMENTS`."""

    kind: str
    model: str
    block: str
    tokens: int
    out_features: int
    in_features: int
    phase: str
    apart: bool
    carried: list[str]
    experts: int
    rows: list[int]
    schemes: list[str]
    us: list[float]


def median_us(one: Measurement) -> float:
    """Median over the rounds, microseconds."""
    return float(np.median(one["us"]))


def spread(one: Measurement) -> float:
    """(most - least) / median over the rounds."""
    return float(np.ptp(one["us"]) / np.median(one["us"]))


def problem_of(one: Measurement) -> tuple[Any, ...]:
    """What launches of the same problem share."""
    return (one["model"], one["block"], one["tokens"], tuple(one["rows"]), tuple(one["schemes"]), tuple(one["carried"]))


def read_measurements(path: Path) -> tuple[list[Measurement], dict[str, Any]]:
    """Rows and facts of a MEASUREMENTS table; `UserError` names the row and column that the fit cannot use."""
    table, facts = read_table(MEASUREMENTS, path)
    rows = table.to_pylist()
    models = {one.model for one in MODELS}
    missing = sorted({"kernels", "repeats", "rounds", "clocks"} - set(facts)) if rows else []
    if missing:
        raise UserError(f"{path}: {missing[0]}: Field required; run the measure step again")
    for row in rows:
        wrong = [
            name
            for name, right in {
                "phase": row["phase"] in PHASES,
                "model": row["kind"] == "tile" or row["model"] in models,
                "carried": all(map(is_canonical, row["carried"])),
                "rows": sum(row["rows"]) > 0,
                "schemes": len(row["schemes"]) == len(row["rows"]) and set(row["schemes"]) <= set(row["carried"]),
                "us": len(row["us"]) > 0,
            }.items()
            if not right
        ]
        if wrong:
            raise UserError(
                f"{path}: {wrong[0]} of launch {row['number']} is {row[wrong[0]]!r:.60}, which no launch has; run the"
                " measure step again"
            )
    return rows, facts
