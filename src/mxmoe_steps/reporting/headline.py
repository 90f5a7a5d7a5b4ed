"""The answer: which checkpoint to take, beside the uniform one of the same budget and the original."""

from collections.abc import Iterator

import pandas as pd

CLOSE = 1.05  # a perplexity within this factor of the original's is close to it


def answer(table: pd.DataFrame) -> pd.Series | None:
    """The smallest of our checkpoints that is `CLOSE` to the original, or else the nearest to it; None without ours."""
    ours = table[table["kind"].str.startswith("ours")]
    if ours.empty:
        return None
    original = table.loc[table["kind"] == "original", "perplexity"].iloc[0]
    close = ours[ours["perplexity"] <= CLOSE * original]
    order = ["budget_bits", "kl", "checkpoint"] if len(close) else ["kl", "budget_bits", "checkpoint"]
    return (close if len(close) else ours).sort_values(order).iloc[0]


def headline_table(table: pd.DataFrame) -> pd.DataFrame:
    """The answer first, then the best uniform checkpoint within its budget and the original; then other budgets' best.

    Rows of the summary.
    """
    best = answer(table)
    original = table[table["kind"] == "original"]
    if best is None:
        return original
    others = [budget for budget in sorted(table["budget_bits"].dropna().unique()) if budget != best["budget_bits"]]
    rows = [best.to_frame().T, *_best(table, best["budget_bits"], ours=False), original]
    for budget in others:
        rows += [*_best(table, budget, ours=True), *_best(table, budget, ours=False)]
    return pd.concat(rows).astype(table.dtypes)


def _best(table: pd.DataFrame, budget: float, ours: bool) -> Iterator[pd.DataFrame]:
    """Of a budget the checkpoint of ours, or the uniform one, of least KL divergence, if there is one."""
    within = table[(table["budget_bits"] == budget) & (table["kind"].str.startswith("ours") == ours)]
    if len(within):
        yield within.sort_values(["kl", "checkpoint"]).head(1)
