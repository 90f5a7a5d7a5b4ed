"""Reading a table of measurements, checked for what the fit takes for granted."""

from pathlib import Path
from typing import Any

from mxmoe_steps.errors import UserError
from mxmoe_steps.kernels.architectures import PHASES
from mxmoe_steps.schemes import is_canonical
from mxmoe_steps.tables import MEASUREMENTS, read_table
from mxmoe_steps.timing.launches import MODELS


def read_measurements(path: Path) -> tuple[list[dict[str, Any]], dict[str, Any]]:
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
