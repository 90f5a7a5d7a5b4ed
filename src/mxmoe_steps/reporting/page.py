"""The report as one self-contained HTML file."""

from collections.abc import Sequence
from html import escape

import pandas as pd

from mxmoe_steps.reporting.summary import time_columns
from mxmoe_steps.reporting.terminal import row_name

_STYLE = """
:root { color-scheme: light; }
body { font: 15px/1.5 system-ui, sans-serif; color: #222; margin: 2rem auto; max-width: 68rem; padding: 0 1rem; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.2rem; margin-top: 2.2rem; }
table { border-collapse: collapse; font-size: 13px; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .6rem; border-bottom: 1px solid #ddd; text-align: right; white-space: nowrap; }
th { background: #f6f6f6; position: sticky; top: 0; }
td:first-child, th:first-child, td.text, th.text { text-align: left; }
tr.ours td { background: #fdf3f1; } tr.original td { background: #eef4f8; }
tr.budget td { background: #fff; font-weight: 600; padding-top: .9rem; text-align: left; }
.scroll { overflow-x: auto; } figure { margin: 1rem 0; overflow-x: auto; } svg { max-width: 100%; height: auto; }
.note { background: #fff8e1; border-left: 4px solid #e6a23c; padding: .5rem .9rem; }
pre { background: #f6f6f6; padding: .8rem; overflow-x: auto; font-size: 12px; }
"""


def page(title: str, lines: Sequence[str], notes: Sequence[str], sections: Sequence[tuple[str, str, str]]) -> str:
    """HTML of the whole report.

    ``lines``: the conclusions; ``notes``: what a reader must know about the numbers; ``sections``:
    (heading, explanation, HTML body).
    """
    body = [f"<h1>{escape(title)}</h1>", "<ul>", *(f"<li>{escape(line)}</li>" for line in lines), "</ul>"]
    body += [f'<p class="note">{escape(note)}</p>' for note in notes]
    for heading, text, html in sections:
        body.append(f"<h2>{escape(heading)}</h2><p>{escape(text)}</p>{html}")
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        f"<style>{_STYLE}</style></head><body>\n" + "\n".join(body) + "\n</body></html>\n"
    )


def figure(svg: str) -> str:
    """An inline figure."""
    return f"<figure>{svg}</figure>"


def table_html(table: pd.DataFrame, estimate: bool) -> str:
    """The summary table, grouped by budget."""
    times = time_columns(table)
    texts = [name for name in table.columns if name.startswith("perplexity_")]
    label = "est." if estimate else "pred."
    heads = ["checkpoint", "quantizer", "bits", "perplexity", "KL", "MB", "not experts", "of 16 bits", "of published"]
    heads += [f"{label} µs, {tokens} tok" for tokens in times.values()]
    measured = {name: name.split("_")[3] for name in table.columns if name.startswith("measured_")}
    heads += [f"{'GEMMs' if '_gemms_' in name else 'layer'} µs, {tokens} tok" for name, tokens in measured.items()]
    heads += [f"ppl {name.removeprefix('perplexity_')}" for name in texts]
    rows = ["<tr>" + "".join(f"<th>{escape(head)}</th>" for head in heads) + "</tr>"]
    published = table.loc[table["kind"] == "original", "bits"].iloc[0]
    budget = None
    for _, row in table.iterrows():
        if pd.notna(row["budget_bits"]) and row["budget_bits"] != budget:
            budget = row["budget_bits"]
            shares = f"{budget / 16:.0%} of 16"
            if published != 16:
                shares += f", {budget / published:.0%} of the published {published:.2f}"
            rows.append(f'<tr class="budget"><td colspan="{len(heads)}">at most {budget:g} bits, {shares}</td></tr>')
        cells = [row_name(row), "" if pd.isna(row["quantizer"]) else row["quantizer"], f"{row['bits']:.3f}"]
        cells += [f"{row['perplexity']:.3f}", f"{row['kl']:.5f}", f"{row['size_mb']:.2f}", f"{row['other_mb']:.2f}"]
        cells += [f"{row['of_16_bit']:.1%}", f"{row['of_published']:.1%}"]
        cells += ["" if pd.isna(row[name]) else f"{row[name]:.2f}" for name in (*times, *measured)]
        cells += [f"{row[name]:.2f}" for name in texts]
        kind = row["kind"].split()[0]
        rows.append(f'<tr class="{kind}">' + "".join(f"<td>{escape(str(cell))}</td>" for cell in cells) + "</tr>")
    return f'<div class="scroll"><table>{"".join(rows)}</table></div>'


def domains_html(table: pd.DataFrame) -> str:
    """Our checkpoints beside uniform ones, text by text and as it was predicted, the worst first."""
    heads = ["checkpoint", "bits at most", "KL over uniform's, held-out text", "predicted, calibration text"]
    rows = ["<tr>" + "".join(f'<th class="text">{escape(head)}</th>' for head in heads) + "</tr>"]
    for _, row in table[table["kind"] == "ours"].iterrows():
        cells = [row_name(row), f"{row['budget_bits']:g}", row["texts_over_uniform"], row["predicted_over_uniform"]]
        rows.append("<tr>" + "".join(f'<td class="text">{escape(cell)}</td>' for cell in cells) + "</tr>")
    return f'<div class="scroll"><table>{"".join(rows)}</table></div>'
