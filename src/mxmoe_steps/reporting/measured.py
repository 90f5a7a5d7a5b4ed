"""What was measured on this machine's GPU, beside what was predicted: a row per checkpoint and tokens in a step."""

from math import nan

import pandas as pd

from mxmoe_steps.reporting.summary import rate_columns, time_columns
from mxmoe_steps.reporting.terminal import row_name

MEASURED_HEADS = (
    "checkpoint",
    "tokens in a step",
    "GEMMs predicted, µs",
    "measured, µs",
    "error of the prediction",
    "layer, µs",
    "layer / original's",
    "whole model, tokens/s",
    "tokens/s / original's",
)


def measured_rows(table: pd.DataFrame) -> list[list[str]]:
    """Rows of the summary under `MEASURED_HEADS`, a group for each number of tokens and phase of a step."""
    predicted = {tokens: name for name, tokens in time_columns(table).items()}
    rates = {(tokens, phase): name for name, (phase, tokens) in rate_columns(table).items()}
    layers = {int(name.split("_")[3]) for name in table.columns if name.startswith("measured_moe_us_")}
    alone = {(tokens, "") for tokens in layers - {tokens for tokens, _ in rates}}
    original = table[table["kind"] == "original"].iloc[0]
    rows = []
    for tokens, phase in sorted({*rates, *alone}):
        gemms, layer = f"measured_gemms_us_{tokens}_tokens", f"measured_moe_us_{tokens}_tokens"
        rate = rates.get((tokens, phase))
        for _, row in table.iterrows():
            guess, taken = (row.get(name, nan) for name in (predicted.get(tokens), gemms))
            if pd.isna(row.get(layer, nan)) and pd.isna(row.get(rate, nan)):
                continue
            off = guess / taken - 1
            rows.append(
                [
                    row_name(row), f"{tokens} {phase}".strip(), _shown("{:.1f}", guess if taken > 0 else nan),
                    _shown("{:.1f}", taken), _shown("{:+.1%}", off), _shown("{:.1f}", row.get(layer, nan)),
                    _shown("{:.2f}", row.get(layer, nan) / original.get(layer, nan)),
                    _shown("{:,.0f}", row.get(rate, nan)),
                    _shown("{:.2f}", row.get(rate, nan) / original.get(rate, nan)),
                ]
            )  # fmt: skip
    return rows


def _shown(how: str, value: float) -> str:
    return "" if pd.isna(value) else how.format(value)
