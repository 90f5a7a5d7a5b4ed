"""Damaged artifacts: a step ends in an error that names the file, or in the right result, and in nothing else."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mutations import mutated_json
from synthetic import run, write_losses, write_trace

from mxmoe_steps import frontier, profile, solve
from mxmoe_steps.allocation.files import read_allocation
from mxmoe_steps.errors import UserError

FUZZ = settings(
    max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
SCHEMES = ("w2a16", "w4a16", "w8a8_fp8")
GOALS = [("--r", "0.75"), ("--r", "0"), ("--r", "1"), ("--max-time-us", "20"), ("--max-loss", "5")]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Losses, a trace, a profile, a frontier of two layers and an allocation."""
    folder = tmp_path_factory.mktemp("made")
    losses = write_losses(folder / "losses", SCHEMES, layers=2, experts=3)
    trace = write_trace(folder / "trace", layers=2, experts=3, top_k=2)
    run(profile, "--hardware", "h200", "--schemes", *SCHEMES, "w16a16", "--out", folder / "profile.parquet")
    inputs = ("--losses", *losses, "--trace", trace, "--profile", folder / "profile.parquet")
    for scope in ("layer", "model"):
        out = folder / f"{scope}.json"
        run(frontier, *inputs, "--budget-bits", "4.5", "--tokens", 16, "--scope", scope, "--out", out)
    run(solve, "--frontier", folder / "model.json", "--r", 0.75, "--out", folder / "allocation.json")
    return folder


def refusal(call: Callable[[], Any]) -> str:
    """The message of the `UserError` that a call ends in, empty when there is none."""
    try:
        call()
    except UserError as error:
        return str(error)
    return ""


def finite(value: object) -> bool:
    """Whether JSON holds neither NaN nor infinity."""
    if isinstance(value, dict | list):
        return all(map(finite, value.values() if isinstance(value, dict) else value))
    return not isinstance(value, float) or math.isfinite(value)


@pytest.mark.parametrize("scope", ["layer", "model"])
@given(data=st.data())
@FUZZ
def test_a_damaged_frontier(made: Path, tmp_path: Path, scope: str, data: st.DataObject) -> None:
    path, out = tmp_path / "damaged.json", tmp_path / "allocation.json"
    path.write_text(data.draw(mutated_json(json.loads((made / f"{scope}.json").read_text()))))
    out.unlink(missing_ok=True)
    goal = data.draw(st.sampled_from(GOALS))
    said = refusal(lambda: run(solve, "--frontier", path, *goal, "--out", out))
    if said:
        assert "damaged.json: " in said or goal[0] in said
        assert not out.exists()
    else:
        assert finite(json.loads(out.read_text()))
        read_allocation(str(out))


@given(data=st.data())
@FUZZ
def test_a_damaged_allocation(made: Path, tmp_path: Path, data: st.DataObject) -> None:
    path = tmp_path / "damaged.json"
    original = json.loads((made / "allocation.json").read_text())
    path.write_text(data.draw(mutated_json(original)))
    said = refusal(lambda: read_allocation(str(path)))
    assert "damaged.json: " in said or finite(read_allocation(str(path)))
