"""frontier and solve from tables to allocation, by the command line and inside the process."""

import itertools
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from synthetic import run, write_losses, write_trace

from mxmoe_steps import frontier as frontier_step
from mxmoe_steps import profile as profile_step
from mxmoe_steps import solve as solve_step
from mxmoe_steps.allocation import build
from mxmoe_steps.allocation.blocks import read_losses
from mxmoe_steps.allocation.buys import Total
from mxmoe_steps.allocation.constraints import Constraints
from mxmoe_steps.allocation.files import read_allocation
from mxmoe_steps.allocation.minimize import minimize
from mxmoe_steps.allocation.relaxation import Relaxation
from mxmoe_steps.allocation.times import layer_times
from mxmoe_steps.errors import UserError
from mxmoe_steps.kernels.architectures import PHASES
from mxmoe_steps.schemes import SHARED, parse_scheme
from mxmoe_steps.tables import LOSSES, PROFILE, read_table, write_table
from mxmoe_steps.timing.predict import block_times
from mxmoe_steps.timing.profile import read_profile, timing_schemes
from mxmoe_steps.timing.traffic import sample_traffic

SCHEMES = ("w2a16", "w4a16", "w8a8_fp8")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> dict:
    """Two layers of three experts and a shared one."""
    folder = tmp_path_factory.mktemp("inputs")
    losses = write_losses(folder / "losses", SCHEMES, layers=2, experts=3)
    trace = write_trace(folder / "trace", layers=2, experts=3, top_k=2)
    run(profile_step, "--hardware", "h20", "--schemes", *SCHEMES, "w16a16", "--out", folder / "h100.parquet")
    return {"losses": losses, "trace": trace, "profile": str(folder / "h100.parquet")}


def frontier_arguments(inputs: dict, budget="4.5", tokens=16, **changes) -> list:
    given = {**inputs, **changes}
    return ["--losses", *given["losses"], "--trace", given["trace"], "--profile", given["profile"],
            f"--budget-bits={budget}", "--tokens", tokens,
            "--scope", "layer", "--metric", "out_sq", "--no-tie-gate-up"]  # fmt: skip


def allocate(folder: Path, inputs: dict, goal=("--r", 0.75), extra=(), **settings) -> dict:
    run(frontier_step, *frontier_arguments(inputs, **settings), *extra, "--out", folder / "frontier.json")
    run(solve_step, "--frontier", folder / "frontier.json", *goal, "--out", folder / "allocation.json")
    return read_allocation(str(folder / "allocation.json"))


def names_of(allocation: dict) -> set:
    return {name for row in allocation["assignment"] for name in row[2:]}


@pytest.mark.parametrize("scope", ["layer", "model"])
@pytest.mark.parametrize("granularity", ["block", "expert", "layer", "uniform"])
def test_reported_numbers_are_those_of_the_assignment(tmp_path, inputs, granularity, scope):
    allocation = allocate(tmp_path, inputs, extra=("--granularity", granularity, "--scope", scope))
    losses = read_losses(inputs["losses"], "out_sq", False)
    chosen = {tuple(row[:2]): row[2:] for row in allocation["assignment"]}
    blocks = losses.blocks
    assert len(chosen) * 3 == len(blocks)
    choice = np.array(
        [
            losses.schemes.index(parse_scheme(chosen[layer, expert][kind]))
            for layer, expert, kind in zip(blocks.layer, blocks.expert, blocks.kind, strict=True)
        ]
    )
    index = np.arange(len(blocks))
    assert allocation["loss"] == pytest.approx(np.sqrt(losses.loss[index, choice].sum()))
    bits = losses.bits[index, choice]
    assert allocation["bits"] == pytest.approx(bits.sum() / blocks.params.sum())
    for layer in (0, 1) if scope == "layer" else ():
        of = blocks.layer == layer
        assert bits[of].sum() <= 4.5 * blocks.params[of].sum()
    assert allocation["bits"] <= 4.5
    profile = read_profile(inputs["profile"])
    traffic = sample_traffic(inputs["trace"], [], 16)
    kernels = timing_schemes(losses.schemes, profile, {})
    times = block_times(blocks, kernels, traffic, profile)
    assert allocation["time_us"] == pytest.approx(sum(layer_times(blocks, times, choice).values()))
    assert allocation["time_is_estimate"] is True
    assert 0 <= allocation["gap"] <= 1e-4
    sizes = {"block": 24, "expert": 8, "layer": 2, "uniform": 1}
    depth = {"block": 3, "expert": 2, "layer": 1, "uniform": 0}[granularity]
    by_group: dict = {}
    for (layer, expert), row in chosen.items():
        for kind, name in enumerate(row):
            by_group.setdefault((layer, expert, kind)[:depth], set()).add(name)
    assert len(by_group) == sizes[granularity]
    assert all(len(members) == 1 for members in by_group.values())


def test_finer_granularity_and_wider_scope_never_lose(tmp_path, inputs):
    objective = {}
    for scope, granularity in itertools.product(("layer", "model"), ("uniform", "layer", "expert", "block")):
        extra = ("--granularity", granularity, "--scope", scope, "--gap", 0)
        allocation = allocate(tmp_path, inputs, goal=("--r", 1), extra=extra)
        objective[scope, granularity] = allocation["loss"]
    for scope in ("layer", "model"):
        values = [objective[scope, granularity] for granularity in ("uniform", "layer", "expert", "block")]
        assert values == sorted(values, reverse=True)
    for granularity in ("layer", "expert", "block"):
        assert objective["model", granularity] <= objective["layer", granularity] * (1 + 1e-12)


def test_exact_budget_admits_its_uniform_scheme(tmp_path, inputs):
    allocation = allocate(tmp_path, inputs, budget="2.25", extra=("--granularity", "uniform"))
    assert names_of(allocation) == {"w2a16_g128_asym"}
    assert allocation["bits"] == 2.25
    with pytest.raises(UserError, match=r"smallest reachable average is 2\.2500"):
        allocate(tmp_path, inputs, budget="2.2499")


def test_same_bytes_whatever_the_order_and_the_run(tmp_path, inputs):
    texts = []
    for number, losses in enumerate((inputs["losses"], inputs["losses"][::-1])):
        out = tmp_path / str(number)
        arguments = frontier_arguments(inputs, losses=losses)
        for module, rest in (
            ("frontier", [*arguments, "--out", out / "f.json"]),
            ("solve", ["--frontier", out / "f.json", "--r", "0.75", "--out", out / "a.json"]),
        ):
            subprocess.run([sys.executable, "-m", f"mxmoe_steps.{module}", *map(str, rest)], check=True)
        texts.append((out / "f.json").read_bytes() + (out / "a.json").read_bytes())
    assert texts[0] == texts[1]


def test_ceilings(tmp_path, inputs):
    free = allocate(tmp_path, inputs, goal=("--r", 1), extra=("--scope", "model"))
    fast = allocate(tmp_path, inputs, goal=("--r", 0), extra=("--scope", "model"))
    ceiling = (free["time_us"] + fast["time_us"]) / 2
    capped = allocate(tmp_path, inputs, goal=("--max-time-us", ceiling), extra=("--scope", "model"))
    assert capped["time_us"] <= ceiling
    assert free["loss"] <= capped["bound"] <= capped["loss"] == capped["objective"]
    for scope in ("model", "layer"):
        again = allocate(tmp_path, inputs, goal=("--max-loss", capped["loss"] * 1.2), extra=("--scope", scope))
        assert again["loss"] <= capped["loss"] * 1.2
        assert again["bound"] <= again["time_us"] == pytest.approx(again["objective"])
    with pytest.raises(UserError, match="smallest value this frontier reaches"):
        allocate(tmp_path, inputs, goal=("--max-time-us", 1e-3))


def test_constraints(tmp_path, inputs):
    extra = ("--fix", "shared=w8a8_fp8", "--fix", "layer:0/expert:0-1/block:down=w16a16", "--budget-bits", "9")
    for row in allocate(tmp_path, inputs, extra=extra)["assignment"]:
        if row[1] == SHARED:
            assert set(row[2:]) == {"w8a8_g-1_sym_fp8"}
        assert (row[4] == "w16a16") == (row[0] == 0 and row[1] in (0, 1))
    allocation = allocate(tmp_path, inputs, extra=("--min-bits", "block:down=4", "--tie-gate-up"))
    for *_, gate, up, down in allocation["assignment"]:
        assert gate == up
        assert down != "w2a16_g128_asym"
    for scope in ("layer", "model"):
        allocation = allocate(tmp_path, inputs, extra=("--max-schemes", 2, "--scope", scope))
        for layer in (0, 1):
            assert len({n for row in allocation["assignment"] if row[0] == layer for n in row[2:]}) <= 2
    tiled = allocate(tmp_path, inputs, extra=("--shared-tile",))
    assert len(tiled["tile_tokens"]) == 2
    with pytest.raises(UserError, match="names no block"):
        allocate(tmp_path, inputs, extra=("--fix", "layer:7=w4a16"))
    with pytest.raises(UserError, match="cannot read 'down'"):
        allocate(tmp_path, inputs, extra=("--fix", "down=w4a16"))
    with pytest.raises(UserError, match="no table of losses for w3a16"):
        allocate(tmp_path, inputs, extra=("--candidates", "w3a16", "w4a16"))


def test_shared_tile_is_the_best_single_tile(tmp_path, inputs):
    tiled = allocate(tmp_path, inputs, goal=("--r", 0.5), extra=("--shared-tile", "--scope", "model", "--gap", 0))
    free = allocate(tmp_path, inputs, goal=("--r", 0.5), extra=("--scope", "model", "--gap", 0))
    assert free["objective"] <= tiled["objective"] * (1 + 1e-12)
    assert tiled["bound"] == pytest.approx(tiled["objective"], rel=1e-6)


@pytest.mark.parametrize("bad", [float("nan"), -1.0])
def test_bad_losses_name_the_block_and_write_nothing(tmp_path, inputs, bad):
    table, facts = read_table(LOSSES, inputs["losses"][0])
    columns = table.to_pydict()
    columns["out_sq"][5] = bad
    path = tmp_path / "bad.parquet"
    write_table(LOSSES, path, columns, facts)
    with pytest.raises(UserError, match="out_sq of layer 0 expert 0"):
        allocate(tmp_path, inputs, losses=[str(path), *inputs["losses"][1:]])
    assert not (tmp_path / "frontier.json").exists()


def test_missing_blocks_and_mixed_quantizers(tmp_path, inputs):
    table, facts = read_table(LOSSES, inputs["losses"][0])
    columns = table.to_pydict()
    write_table(LOSSES, tmp_path / "short.parquet", {k: v[:-1] for k, v in columns.items()}, facts)
    with pytest.raises(UserError, match="same blocks"):
        allocate(tmp_path, inputs, losses=[*inputs["losses"][1:], str(tmp_path / "short.parquet")])
    with pytest.raises(UserError, match="layer 1 expert 2"):
        allocate(tmp_path, inputs, losses=[str(tmp_path / "short.parquet")])
    write_table(LOSSES, tmp_path / "gptq.parquet", columns, {**facts, "quantizer": "gptq"})
    with pytest.raises(UserError, match="different quantizers"):
        allocate(tmp_path, inputs, losses=[*inputs["losses"][1:], str(tmp_path / "gptq.parquet")])
    with pytest.raises(UserError, match="second table"):
        allocate(tmp_path, inputs, losses=[*inputs["losses"], inputs["losses"][0]])


def test_zero_loss_and_sum_of_norms(tmp_path, inputs):
    candidates = ("--candidates", "w16a16", "w4a16")
    allocation = allocate(tmp_path, inputs, budget="16", goal=("--r", 0.5), extra=candidates)
    assert allocation["loss"] == 0
    assert names_of(allocation) == {"w16a16"}
    assert allocation["gap"] == 0
    norms = allocate(tmp_path, inputs, goal=("--r", 1), extra=("--loss", "sum_of_norms"))
    losses = read_losses(inputs["losses"], "out_sq", False)
    chosen = [name for row in norms["assignment"] for name in row[2:]]
    columns = [losses.schemes.index(parse_scheme(name)) for name in chosen]
    assert norms["loss"] == pytest.approx(np.sqrt(losses.loss[np.arange(len(columns)), columns]).sum())


def test_steps_never_load_torch_and_help_is_light(tmp_path, inputs):
    code = (
        "import sys; from mxmoe_steps import frontier, profile, solve;"
        "assert not {'numpy', 'ortools', 'pyarrow', 'torch'} & set(sys.modules), 'heavy import';"
        "sys.argv = ['frontier', *sys.argv[1:]]; frontier.main(); assert 'torch' not in sys.modules"
    )
    arguments = [*frontier_arguments(inputs), "--out", tmp_path / "f.json"]
    subprocess.run([sys.executable, "-c", code, *map(str, arguments)], check=True)
    assert json.loads((tmp_path / "f.json").read_text())["kind"] == "frontier"


def test_user_errors_end_in_one_line(tmp_path, inputs):
    command = [sys.executable, "-m", "mxmoe_steps.frontier", *map(str, frontier_arguments(inputs, budget="1")),
               "--out", str(tmp_path / "f.json")]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert "smallest reachable average" in done.stderr
    assert not (tmp_path / "f.json").exists()


@pytest.fixture(scope="module")
def toy(tmp_path_factory) -> dict:
    """One layer of two experts: 729 assignments, with a GPU on which compute and memory compete."""
    folder = tmp_path_factory.mktemp("toy")
    losses = write_losses(folder / "losses", SCHEMES, layers=1, experts=2, shared=0)
    trace = write_trace(folder / "trace", layers=1, experts=2, top_k=1)
    cells = [(phase, parse_scheme(text).name, tile, 0.05 * index + tile / 400, 0.02 * (3 - index) + tile / 600, 0.0)
             for phase in PHASES for index, text in enumerate(SCHEMES) for tile in (8, 32)]  # fmt: skip
    columns = dict(zip(PROFILE.schema.names, map(list, zip(*cells, strict=True)), strict=True))
    facts = {
        "sms": 4,
        "bandwidth_gbs": 60.0,
        "activation_gbs": 60.0,
        "launch_us": 0.5,
        "estimate": True,
        "device": "toy",
        "arch": "toy",
        "loop_launch_us": 0.1,
        "loop_tile_us": 0.03,
        "tail": 0.7,
        "exposed": 0.2,
    }
    write_table(PROFILE, folder / "toy.parquet", columns, {**facts, "source": "made up"})
    return {"losses": losses, "trace": trace, "profile": str(folder / "toy.parquet")}


@pytest.mark.parametrize("tokens", [8, 48])
@pytest.mark.parametrize(
    "flags",
    [
        ("--granularity", "block"),
        ("--granularity", "block", "--tie-gate-up"),
        ("--granularity", "expert"),
        ("--granularity", "layer"),
        ("--granularity", "uniform"),
        ("--granularity", "block", "--shared-tile"),
        ("--granularity", "expert", "--shared-tile"),
        ("--granularity", "block", "--max-schemes", 2),
        ("--granularity", "block", "--min-bits", "block:down=4"),
    ],
)
def test_every_r_against_all_assignments(tmp_path, toy, flags, tokens):
    losses = read_losses(toy["losses"], "out_sq", False)
    profile = read_profile(toy["profile"])
    traffic = sample_traffic(toy["trace"], [], tokens)
    kernels = timing_schemes(losses.schemes, profile, {})
    tiles = [profile.only_tile(8), profile.only_tile(32)] if "--shared-tile" in flags else [profile]
    carried = kernels if "--shared-tile" in flags else None
    times = [block_times(losses.blocks, kernels, traffic, tile, carried) for tile in tiles]
    index = np.arange(6)
    points = []
    for choice in map(np.array, itertools.product(range(3), repeat=6)):
        gate_up, whole = choice.reshape(2, 3)[:, :2], choice.reshape(2, 3)
        tied = (gate_up == gate_up[:, :1]).all()
        legal = {"block": tied or "--tie-gate-up" not in flags, "expert": (whole == whole[:, :1]).all()}
        if not legal.get(flags[1], (choice == choice[0]).all()):
            continue
        if "--max-schemes" in flags and len(set(choice.tolist())) > 2:
            continue
        bits = losses.bits[index, choice]
        if "--min-bits" in flags and (bits < 4 * losses.blocks.params)[losses.blocks.kind == 2].any():
            continue
        if bits.sum() <= 5.5 * losses.blocks.params.sum():
            loss = np.sqrt(losses.loss[index, choice].sum())
            points += [(loss, sum(layer_times(losses.blocks, part, choice).values())) for part in times]
    run(frontier_step, *frontier_arguments(toy, "5.5", tokens), *flags, "--gap", 0, "--out", tmp_path / "f.json")
    for r in (0, 0.3, 0.5, 0.75, 0.9, 1):
        run(solve_step, "--frontier", tmp_path / "f.json", "--r", r, "--out", tmp_path / "a.json")
        allocation = read_allocation(str(tmp_path / "a.json"))
        best = min(loss**r * time_us ** (1 - r) for loss, time_us in points)
        assert allocation["objective"] == pytest.approx(best, rel=1e-9)
        assert allocation["loss"] ** r * allocation["time_us"] ** (1 - r) == pytest.approx(best, rel=1e-9)
        assert allocation["bound"] == pytest.approx(best, rel=1e-6)


def test_what_more_would_give(tmp_path, inputs):
    """The sentences beside what steps find that are asked for it."""
    here = allocate(tmp_path, inputs, budget="3")
    scheme, bits, time = here["buys"]
    richer = allocate(tmp_path, inputs, budget="3.5")
    said = float(re.search(r"would give ([0-9.]+) % less loss", bits)[1]) / 100
    assert "0.5 bits more, 3.5 a weight" in bits
    assert said == pytest.approx(1 - richer["loss"] / here["loss"], abs=0.02)
    slower = allocate(tmp_path, inputs, ("--max-time-us", 1.1 * here["time_us"]), budget="3")
    gain = 1 - slower["loss"] / here["loss"]
    assert f"10 % more time would give {100 * gain:.1f} % less loss." == time or (gain < 5e-4 and "nothing" in time)
    used = {name for row in here["assignment"] for name in row[2:]}
    unused = set(here["candidates"]) - used
    assert any(name in scheme for name in unused) if unused else scheme == "It uses all 3 candidates."


def test_what_is_more_than_no_loss_has_no_percentage():
    """Where published codes fit the budget."""
    here, there = Total(0.0, 100.0), Total(0.5, 90.0)
    assert here.beside(there) == "some loss where it has none and 10.0 % less time"
    assert there.beside(here) == "100.0 % less loss and 11.1 % more time"
    assert here.beside(Total(0.0, 100.0)) == ""


def test_of_many_schemes_a_launch_of_few_is_timed_by_what_it_carries(toy, monkeypatch):
    monkeypatch.setattr(build, "MOST_SETS", 1)
    monkeypatch.setattr(build, "FEW", 1)
    losses, profile = read_losses(toy["losses"], "out_sq", False), read_profile(toy["profile"])
    kernels = timing_schemes(losses.schemes, profile, {})
    times = block_times(losses.blocks, kernels, sample_traffic(toy["trace"], [], 48), profile)
    everything = np.ones(6, bool)
    problem, assigned = build.build_problem(
        losses, list(losses.schemes), times, "block", "8", Constraints(tie_gate_up=True), everything
    )
    found = []
    for gate_up, down in itertools.product(itertools.product(range(3), repeat=2), repeat=2):
        assignment = np.array([gate_up, down])
        columns = assigned.schemes(assignment)
        charged, true = problem.evaluate(assignment)[1], layer_times(losses.blocks, times, columns)[0]
        found.append(charged)
        if len(set(gate_up)) == len(set(down)) == 1:
            assert charged == pytest.approx(true)
        else:
            assert charged > true
    best = minimize(Relaxation(problem), 0.0, 1.0)
    assert best.value == pytest.approx(min(found))
    assert best.bound == pytest.approx(best.value)


@pytest.mark.parametrize("budget", ["0", "-1", "nan", "inf", "1/0", "1e400", "two"])
def test_budgets_that_are_no_bits_of_a_weight(tmp_path, inputs, budget, capsys):
    with pytest.raises(SystemExit):
        allocate(tmp_path, inputs, budget=budget)
    assert f"argument --budget-bits: '{budget}' is not a number above 0 and up to 16" in capsys.readouterr().err
