"""Damaged artifacts: a step ends in an error that names the file, or in the right result, and in nothing else."""

import contextlib
import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mutations import mutated_bytes, mutated_columns, mutated_json, refusal
from synthetic import run, write_losses, write_trace

from mxmoe_steps import frontier, profile, solve
from mxmoe_steps.allocation.files import read_allocation, read_frontier
from mxmoe_steps.errors import UserError
from mxmoe_steps.kernels.sm90.architecture import HOPPER
from mxmoe_steps.schemes import parse_scheme
from mxmoe_steps.tables import LOSSES, MEASUREMENTS, PROFILE, TRAFFIC, read_table, write_table
from mxmoe_steps.timing import estimate
from mxmoe_steps.timing.estimate import HARDWARE, measured_file
from mxmoe_steps.timing.fit import fit
from mxmoe_steps.timing.measurements import read_measurements

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
    run(profile, "--hardware", "h20", "--schemes", *SCHEMES, "w16a16", "--out", folder / "profile.parquet")
    inputs = ("--losses", *losses, "--trace", trace, "--profile", folder / "profile.parquet")
    for scope in ("layer", "model"):
        out = folder / f"{scope}.json"
        run(frontier, *inputs, "--budget-bits", "4.5", "--tokens", 16, "--scope", scope, "--out", out)
    run(solve, "--frontier", folder / "model.json", "--r", 0.75, "--out", folder / "allocation.json")
    return folder


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


KINDS = {"losses": LOSSES, "traffic": TRAFFIC, "profile": PROFILE}


def damaged_inputs(made: Path, name: str, path: Path) -> dict[str, Any]:
    """Inputs of frontier with the damaged file ``path`` in the place of one of them."""
    inputs = {
        "losses": sorted((made / "losses").iterdir()),
        "trace": made / "trace",
        "profile": made / "profile.parquet",
    }
    if name == "losses":
        return inputs | {"losses": [path, *inputs["losses"][1:]]}
    return inputs | ({"profile": path} if name == "profile" else {"trace": path.parent})


def whole(made: Path, name: str) -> Path:
    return {
        "losses": min((made / "losses").iterdir()),
        "traffic": made / "trace" / "traffic.parquet",
        "routing": made / "trace" / "routing.safetensors",
        "profile": made / "profile.parquet",
    }[name]


def run_frontier(inputs: dict[str, Any], out: Path) -> None:
    arguments = ("--losses", *inputs["losses"], "--trace", inputs["trace"], "--profile", inputs["profile"])
    run(frontier, *arguments, "--budget-bits", "4.5", "--tokens", 16, "--scope", "model", "--out", out)


def check_frontier(made: Path, folder: Path, name: str, same: bool) -> None:
    """Run frontier on a damaged file of ``folder``: an error that names a file, or a frontier that can be read."""
    file = whole(made, name).name
    for other in (made / "trace").iterdir():
        if other.name != file:
            shutil.copy(other, folder)
    out = folder / "out" / "frontier.json"
    out.unlink(missing_ok=True)
    said = refusal(lambda: run_frontier(damaged_inputs(made, name, folder / file), out))
    if said:
        assert file in said or "trace" in said or "losses" in said
        assert not out.exists()
    else:
        read_frontier(str(out))
        assert not same or out.read_bytes() == (made / "model.json").read_bytes()


@pytest.mark.parametrize("name", ["losses", "traffic", "profile"])
@given(data=st.data())
@FUZZ
def test_a_damaged_table(made: Path, tmp_path: Path, name: str, data: st.DataObject) -> None:
    """Values that no step writes, under a checksum that fits."""
    source = whole(made, name)
    table, facts = read_table(KINDS[name], source)
    columns = data.draw(mutated_columns(table.to_pydict()))
    with contextlib.suppress(ValueError):  # a checksum of null does not exist
        write_table(KINDS[name], tmp_path / source.name, columns, facts)
        check_frontier(made, tmp_path, name, same=False)


@pytest.mark.parametrize("name", ["losses", "traffic", "profile"])
@given(data=st.data())
@FUZZ
def test_damaged_facts_of_a_table(made: Path, tmp_path: Path, name: str, data: st.DataObject) -> None:
    source = whole(made, name)
    table, facts = read_table(KINDS[name], source)
    text = data.draw(mutated_json(facts))
    with contextlib.suppress(ValueError):  # NaN, and text that is cut, do not get into a table
        write_table(KINDS[name], tmp_path / source.name, table.to_pydict(), json.loads(text))
        check_frontier(made, tmp_path, name, same=False)


@pytest.mark.parametrize("name", ["losses", "traffic", "routing", "profile"])
@given(data=st.data())
@FUZZ
def test_a_file_with_damaged_bytes(made: Path, tmp_path: Path, name: str, data: st.DataObject) -> None:
    source = whole(made, name)
    (tmp_path / source.name).write_bytes(data.draw(mutated_bytes(source.read_bytes())))
    check_frontier(made, tmp_path, name, same=True)


@pytest.fixture(scope="module")
def measured() -> tuple[dict[str, list[Any]], dict[str, Any]]:
    """Columns and facts of a few of the shipped measurements."""
    table, facts = read_table(MEASUREMENTS, measured_file("h100") or "")
    return table.take(list(range(0, table.num_rows, 40))).to_pydict(), facts


@given(data=st.data())
@FUZZ
def test_damaged_measurements(
    measured: tuple[dict[str, list[Any]], dict[str, Any]], tmp_path: Path, data: st.DataObject
) -> None:
    columns, facts = measured
    path = tmp_path / "measured.parquet"
    with contextlib.suppress(ValueError):  # a checksum of null does not exist
        if data.draw(st.booleans()):
            columns = data.draw(mutated_columns(columns))
        else:
            facts = json.loads(data.draw(mutated_json(facts)))
        write_table(MEASUREMENTS, path, columns, facts)
        said = refusal(lambda: read_measurements(path))
        if said:
            assert "measured.parquet: " in said
        else:
            refusal(lambda: fit(*_rows_and_sms(path), HOPPER))


def _rows_and_sms(path: Path) -> tuple[list[dict[str, Any]], int]:
    rows, facts = read_measurements(path)
    return rows, facts["sms"]


@pytest.mark.parametrize(
    ("column", "value", "said"),
    [
        ("phase", "nap", "phase of launch 0 is 'nap'"),
        ("carried", [], "schemes of launch 0"),
        ("schemes", ["w4a16_g128_asym"], "schemes of launch 0"),
        ("rows", [0, 0], "rows of launch 0"),
        ("us", [], "us of launch 0"),
        ("us", [0.0], "us of number 0 is .*, which is not from 0.001 to 1e"),
        ("schemes", ["w4a16"], "schemes of number 0 is .*, which is not one that it can be"),
        ("kind", "other", "kind of number 0 is 'other'"),
    ],
)
def test_measurements_that_no_launch_has(
    measured: tuple[dict[str, list[Any]], dict[str, Any]], tmp_path: Path, column: str, value: object, said: str
) -> None:
    columns, facts = measured
    columns = columns | {column: [value, *columns[column][1:]]}
    write_table(MEASUREMENTS, tmp_path / "measured.parquet", columns, facts)
    with pytest.raises(UserError, match=rf"measured.parquet: {said}"):
        read_measurements(tmp_path / "measured.parquet")


@given(data=st.data())
@FUZZ
def test_damaged_data_sheets(tmp_path: Path, data: st.DataObject) -> None:
    original = json.loads(HARDWARE.read_text(encoding="utf-8"))
    damaged = tmp_path / "hardware.json"
    damaged.write_text(data.draw(mutated_json(original)), encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(estimate, "HARDWARE", damaged)
        said = refusal(lambda: estimate.estimate_profile([parse_scheme("w4a16")], estimate.read_hardware("h20")))
    assert not said or "hardware.json" in said or "has no bf16 tensor cores" in said
