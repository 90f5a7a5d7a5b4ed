"""Documents: figures are those of the measurements, and links lead somewhere."""

import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = ["README.md", "CONTRIBUTING.md", *sorted(str(path.relative_to(ROOT)) for path in (ROOT / "docs").rglob("*.md"))]


@pytest.fixture
def tables(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import tables

    return tables


@pytest.mark.parametrize("page", PAGES)
def test_marked_figures_are_those_of_the_measurements(tables, page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    assert tables.filled(text) == text, "run python benchmarks/tables.py"
    assert text.count("<!-- table:") == text.count("<!-- end -->") == len(tables.REGION.findall(text))


def test_every_table_has_a_place(tables) -> None:
    text = "".join((ROOT / page).read_text(encoding="utf-8") for page in PAGES)
    assert set(re.findall(r"<!-- table: (\S+) -->", text)) == set(tables.TABLES)


def test_regions_by_hand(tables, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "TABLES", {"one": lambda: "| a |\n| b |", "two": lambda: "3 us"})
    text = "x\n<!-- table: one -->\nold\n<!-- end -->\nIt takes <!-- table: two --><!-- end -->.\n"
    new = "x\n<!-- table: one -->\n| a |\n| b |\n<!-- end -->\nIt takes <!-- table: two -->3 us<!-- end -->.\n"
    assert tables.filled(text) == tables.filled(new) == new
    with pytest.raises(KeyError, match="three"):
        tables.filled("<!-- table: three --><!-- end -->")


def test_figures_of_the_shipped_files_by_hand(tables) -> None:
    cells = json.loads((ROOT / "docs" / "measurements" / "layer.json").read_text(encoding="utf-8"))
    hot = next(c["us"] for c in cells if (c["workload"], c["run"], c["T"]) == ("mixtral-8x7b", "hot", 4096))
    head, _, *rows = tables.layer("mixtral-8x7b").split("\n")
    row = next(row for row in rows if row.startswith("| hot |")).split(" | ")
    assert row[head.split(" | ").index("4096")] == f"{hot:.0f}"
    steps = json.loads((ROOT / "docs" / "measurements" / "generate.json").read_text(encoding="utf-8"))
    assert f"| {steps['static']['1']['w4a16']:.2f} |" in tables.generate_steps()


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    for target, anchor in re.findall(r"\]\(([^)#:]*)(?:#([^)]*))?\)", text):
        file = (ROOT / page).parent / target if target else ROOT / page
        assert file.exists(), f"{page}: {target}"
        if anchor:
            heads = re.findall(r"^#+ (.*)$", file.read_text(encoding="utf-8"), re.MULTILINE)
            assert anchor in [re.sub(r"[^\w -]", "", head.lower()).replace(" ", "-") for head in heads], anchor
