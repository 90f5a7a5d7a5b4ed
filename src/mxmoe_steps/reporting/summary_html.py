"""Tables of the report that are made of rows of the summary."""

from html import escape

import pandas as pd

from mxmoe_steps.reporting.headline import headline_table
from mxmoe_steps.reporting.page import plain_table
from mxmoe_steps.reporting.summary import rate_columns, time_columns
from mxmoe_steps.reporting.terminal import row_name
from mxmoe_steps.schemes import ORIGINAL

_BITS = ORIGINAL.weight_bits
_TIMES = 2  # columns of times in the headline table: of the fewest and of the most tokens


def headline_html(table: pd.DataFrame, estimate: bool) -> str:
    """The answer in the first row, beside the uniform checkpoint of its budget, the original, and other budgets.

    Times are measured ones where there are any.
    """
    times = list(time_columns(table).items())
    times = times if len(times) <= _TIMES else [times[0], times[-1]]
    measured = [(name, tokens) for _, tokens in times if (name := f"measured_moe_us_{tokens}_tokens") in table]
    rates = list(rate_columns(table).items())
    rates = rates if len(rates) <= _TIMES else [rates[0], rates[-1]]
    heads = ["checkpoint", "perplexity", "KL", "KL over uniform's", "bits", "MB", "of 16 bits"]
    if measured:
        heads += [f"layer µs, {tokens} tok" for _, tokens in measured]
    else:
        heads += [f"{'est.' if estimate else 'pred.'} µs, {tokens} tok" for _, tokens in times]
    heads += [f"tok/s, {phase} {tokens}" for _, (phase, tokens) in rates]
    rows = ["<tr>" + "".join(f"<th>{escape(head)}</th>" for head in heads) + "</tr>"]
    for place, (_, row) in enumerate(headline_table(table).iterrows()):
        over = row.get("kl_over_uniform")
        cells = [row_name(row), f"{row['perplexity']:.2f}", f"{row['kl']:.4f}", "" if pd.isna(over) else f"{over:.2f}"]
        cells += [f"{row['bits']:.2f}", f"{row['size_mb']:.2f}", f"{row['of_16_bit']:.0%}"]
        cells += ["" if pd.isna(row[name]) else f"{row[name]:.1f}" for name, _ in measured or times]
        cells += ["" if pd.isna(row[name]) else f"{row[name]:,.0f}" for name, _ in rates]
        kind = row["kind"].split()[0]
        name = f"answer {kind}" if place == 0 and kind == "ours" else kind
        rows.append(f'<tr class="{name}">' + "".join(f"<td>{escape(cell)}</td>" for cell in cells) + "</tr>")
    return f'<div class="scroll"><table>{"".join(rows)}</table></div>'


def table_html(table: pd.DataFrame, estimate: bool) -> str:
    """The summary table, grouped by budget; what was measured has a table of its own."""
    times = time_columns(table)
    texts = [name for name in table.columns if name.startswith("perplexity_")]
    label = "est." if estimate else "pred."
    published = table.loc[table["kind"] == "original", "bits"].iloc[0]
    heads = ["checkpoint", "quantizer", "bits", "perplexity", "KL", "MB", "not experts", "of 16 bits"]
    heads += ["of published"] if published != _BITS else []
    heads += [f"{label} µs, {tokens} tok" for tokens in times.values()]
    heads += [f"ppl {name.removeprefix('perplexity_')}" for name in texts]
    rows = ["<tr>" + "".join(f"<th>{escape(head)}</th>" for head in heads) + "</tr>"]
    budget = None
    for _, row in table.iterrows():
        if pd.notna(row["budget_bits"]) and row["budget_bits"] != budget:
            budget = row["budget_bits"]
            shares = f"{budget / _BITS:.0%} of {_BITS}"
            if published != _BITS:
                shares += f", {budget / published:.0%} of the published {published:.2f}"
            rows.append(f'<tr class="budget"><td colspan="{len(heads)}">at most {budget:g} bits, {shares}</td></tr>')
        cells = [row_name(row), "" if pd.isna(row["quantizer"]) else row["quantizer"], f"{row['bits']:.3f}"]
        cells += [f"{row['perplexity']:.3f}", f"{row['kl']:.5f}", f"{row['size_mb']:.2f}", f"{row['other_mb']:.2f}"]
        cells += [f"{row['of_16_bit']:.1%}"]
        cells += [f"{row['of_published']:.1%}"] if published != _BITS else []
        cells += ["" if pd.isna(row[name]) else f"{row[name]:.2f}" for name in times]
        cells += [f"{row[name]:.2f}" for name in texts]
        kind = row["kind"].split()[0]
        rows.append(f'<tr class="{kind}">' + "".join(f"<td>{escape(str(cell))}</td>" for cell in cells) + "</tr>")
    return f'<div class="scroll"><table>{"".join(rows)}</table></div>'


def domains_html(table: pd.DataFrame) -> str:
    """Our checkpoints beside uniform ones, text by text and as it was predicted, the worst first."""
    heads = ["checkpoint", "bits at most", "KL over uniform's, held-out text", "predicted, calibration text"]
    rows = [
        [row_name(row), f"{row['budget_bits']:g}", row["texts_over_uniform"], row["predicted_over_uniform"]]
        for _, row in table[table["kind"].str.startswith("ours")].iterrows()
    ]
    return plain_table(heads, rows, text=len(heads))
