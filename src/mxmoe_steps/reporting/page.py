"""The report as one self-contained HTML file."""

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

_STYLE = """
:root { color-scheme: light dark; --paper: #fff; --ink: #222; --soft: #f4f5f7; --line: #d9dbe0; --muted: #666b75;
  --ours: #fbeeea; --original: #e9f2f8; --answer: #f6d9d0; --note: #fff6dd; --edge: #d99a2b; --link: #1d6fa5; }
@media (prefers-color-scheme: dark) { :root { --paper: #15181d; --ink: #dde1e7; --soft: #1f242b; --line: #363c46;
  --muted: #98a0ad; --ours: #2e2220; --original: #1b2833; --answer: #4d2c24; --note: #2d2717; --edge: #b9852c;
  --link: #7fbde6; } }
* { box-sizing: border-box; }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper); margin: 0 auto;
  max-width: 76rem; padding: 1.2rem 1rem 3rem; overflow-wrap: anywhere; }
h1 { font-size: 1.6rem; line-height: 1.25; margin: .5rem 0; } h2 { font-size: 1.2rem; margin: 2.2rem 0 .3rem; }
p { max-width: 52rem; margin: .5rem 0; } a { color: var(--link); } ul { padding-left: 1.2rem; }
nav { font-size: 13px; margin: .8rem 0; } nav a { margin-right: .9rem; display: inline-block; }
table { border-collapse: collapse; font-size: 13px; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .5rem; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap; }
th { background: var(--soft); white-space: normal; overflow-wrap: normal; vertical-align: bottom; font-weight: 600;
  min-width: 3.6rem; }
td:first-child, th:first-child, td.text, th.text { text-align: left; white-space: normal; }
td:first-child { min-width: 11rem; }
tr.ours td { background: var(--ours); } tr.original td { background: var(--original); }
tr.answer td { background: var(--answer); font-weight: 600; }
tr.budget td { background: var(--paper); font-weight: 600; padding-top: .9rem; text-align: left; }
.scroll { overflow-x: auto; max-width: 100%; } figure { margin: 1rem 0; overflow-x: auto; }
svg { display: block; max-width: 100%; height: auto; }
.note { background: var(--note); border-left: 4px solid var(--edge); padding: .5rem .9rem; max-width: none; }
pre { background: var(--soft); padding: .8rem; overflow-x: auto; font-size: 12px; white-space: pre-wrap; }
summary { cursor: pointer; }
@media (max-width: 50rem) { body { padding: .6rem .7rem 2rem; } figure svg { max-width: none; width: 44rem; }
  h1 { font-size: 1.3rem; } th, td { padding: .2rem .35rem; } table { font-size: 12px; } }
@media print { :root { --paper: #fff; --ink: #000; --soft: #f4f5f7; --line: #ccc; --ours: #fbeeea; --original: #e9f2f8;
  --answer: #f6d9d0; --note: #fff6dd; --muted: #555; } @page { size: A4 landscape; margin: 12mm; }
  body { max-width: none; padding: 0; font-size: 11px; } nav { display: none; } table { font-size: 9px; }
  figure, tr, section { break-inside: avoid; } h2, section > p { break-after: avoid; }
  .scroll, figure, pre { overflow: visible; } }
"""


@dataclass(frozen=True)
class Section:
    """A part of the page: its heading, what it shows, its HTML; ``name`` is its anchor."""

    name: str
    heading: str
    text: str
    html: str


def page(title: str, opening: str, lines: Sequence[str], notes: Sequence[str], sections: Sequence[Section]) -> str:
    """HTML of the whole report.

    ``opening``: the HTML that comes first; ``lines``: the conclusions; ``notes``: what a reader must know about the
    numbers.
    """
    body = [f"<h1>{escape(title)}</h1>", opening, "<ul>", *(f"<li>{escape(line)}</li>" for line in lines), "</ul>"]
    body += [f'<p class="note">{escape(note)}</p>' for note in notes]
    links = (f'<a href="#{one.name}">{escape(one.heading)}</a>' for one in sections)
    body.append(f"<nav>{' '.join(links)}</nav>")
    for one in sections:
        heading = f"<h2>{escape(one.heading)}</h2><p>{escape(one.text)}</p>"
        body.append(f'<section id="{one.name}">{heading}{one.html}</section>')
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><title>{escape(title)}</title>'
        f"<style>{_STYLE}</style></head><body>\n" + "\n".join(body) + "\n</body></html>\n"
    )


def figure(svg: str) -> str:
    """An inline figure."""
    return f"<figure>{svg}</figure>"


def plain_table(heads: Sequence[str], rows: Sequence[Sequence[str]], text: int = 1) -> str:
    """A table; the first ``text`` columns are words, the others numbers."""

    def line(tag: str, cells: Sequence[str]) -> str:
        opened = (f'<{tag} class="text">' if place < text else f"<{tag}>" for place in range(len(cells)))
        found = (f"{start}{escape(cell)}</{tag}>" for start, cell in zip(opened, cells, strict=True))
        return f"<tr>{''.join(found)}</tr>"

    body = "".join(line("td", row) for row in rows)
    return f'<div class="scroll"><table>{line("th", heads)}{body}</table></div>'


def folded(summary: str, text: str) -> str:
    """Text that is shown on demand."""
    return f"<details><summary>{escape(summary)}</summary><pre>{escape(text)}</pre></details>"
