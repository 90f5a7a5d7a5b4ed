"""Objectives over domains against enumeration, and from the command line to the files."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from synthetic import run, write_losses, write_trace
from test_allocation import assignments, evaluated, random_problem
from test_solve import allocate

from mxmoe_steps import profile as profile_step
from mxmoe_steps.allocation.blocks import read_losses, with_least_tokens
from mxmoe_steps.allocation.coupled import CoupledSearch
from mxmoe_steps.allocation.domains import Domains, count_domains, uniform_within
from mxmoe_steps.allocation.hull import lower_left_hull
from mxmoe_steps.allocation.pick import Part, Vertex, objective, pick_by_r
from mxmoe_steps.allocation.problem import IDLE, Problem
from mxmoe_steps.errors import UserError
from mxmoe_steps.schemes import parse_scheme

SCHEMES = ("w2a16", "w3a16", "w4a16")
TEXTS = ("code", "english", "french")


def domain_losses(by_domain: NDArray[np.float64], choice: NDArray[np.int64]) -> NDArray[np.float64]:
    """Losses [D] of an assignment [U, N]."""
    units, bundles = np.nonzero(choice != IDLE)
    return by_domain[:, units, bundles, choice[units, bundles]].sum(1)


def with_domains(seed: int) -> tuple[Problem, Domains, NDArray[np.float64], NDArray[np.float64]]:
    """A problem, how its domains count, and losses by domain [X, D] and times [X] of all that keeps the ceilings."""
    problem, generator = random_problem(seed), np.random.default_rng(1000 + seed)
    count = int(generator.integers(1, 4))
    by_domain = problem.loss[None] * generator.lognormal(0, 1, (count, *problem.loss.shape[:2], 1))
    problem = replace(problem, by_domain=by_domain)
    points = []
    for choice in assignments(problem):
        _, time_us, bits = evaluated(problem, choice)
        if bits <= problem.budget:
            points.append((*domain_losses(by_domain, choice), time_us))
    losses, times = np.array(points)[:, :-1], np.array(points)[:, -1]
    worst, ceiling = seed % 3 != 0, np.full(count, np.inf)
    if seed % 3 != 1:
        ceiling[0] = losses[generator.integers(len(losses)), 0]
    kept = (losses <= ceiling * (1 + 1e-9)).all(1)
    return problem, Domains(generator.uniform(0.5, 2, count), ceiling, worst), losses[kept], times[kept]


@pytest.mark.parametrize("seed", range(60))
def test_the_certificate_holds_and_is_tight(seed: int) -> None:
    problem, domains, losses, times = with_domains(seed)
    search = CoupledSearch(problem, domains)
    for a, b in ((1.0, 1.0), (1.0, 0.1), (1.0, 0.0), (0.0, 1.0)):
        found = search.minimize(a, b)
        best = (a * domains.loss(losses.T) + b * times).min()
        taken = domain_losses(problem.by_domain, found.choice)
        assert (taken <= domains.ceiling * (1 + 1e-9)).all()
        assert found.loss == pytest.approx(float(domains.loss(taken)))
        assert found.bits <= problem.budget
        assert found.value == pytest.approx(best, rel=1e-7)
        assert found.bound <= best * (1 + 1e-9) + 1e-9
        assert found.bound == pytest.approx(best, rel=1e-5)


@pytest.mark.parametrize("seed", range(30))
def test_the_hull_is_optimal_for_every_r(seed: int) -> None:
    problem, domains, losses, times = with_domains(seed)
    hull = lower_left_hull(problem, 0.0, domains=domains)
    part = Part([Vertex(p.loss, p.time_us, p.bits, 0.0, "") for p in hull.solutions], hull.cuts)
    for r in (0.0, 0.5, 0.9, 1.0):
        _, value, bound = pick_by_r(part, r, 0.5)
        best = min(objective(*point, r, 0.5) for point in zip(domains.loss(losses.T), times, strict=True))
        assert value == pytest.approx(best, rel=1e-6, abs=1e-9)
        assert bound <= best * (1 + 1e-7)
        assert bound == pytest.approx(best, rel=1e-4, abs=1e-6)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict:
    """Two layers of three experts and a shared one, and a text of one domain."""
    folder = tmp_path_factory.mktemp("inputs")
    run(profile_step, "--hardware", "h20", "--schemes", *SCHEMES, "w16a16", "--out", folder / "h20.parquet")
    return {
        "losses": write_losses(folder / "losses", SCHEMES, layers=2, experts=3),
        "trace": write_trace(folder / "trace", layers=2, experts=3, top_k=2),
        "profile": str(folder / "h20.parquet"),
    }


@pytest.fixture(scope="module")
def texts(inputs: dict, tmp_path_factory: pytest.TempPathFactory) -> dict:
    """The same with losses of three domains that live in different blocks."""
    folder = tmp_path_factory.mktemp("texts")
    return inputs | {"losses": write_losses(folder, SCHEMES, layers=2, experts=3, domains=TEXTS)}


def ratios(allocation: dict) -> dict[str, float]:
    found = allocation["domains"]
    return {name: loss / found["uniform"][name] for name, loss in found["losses"].items()}


def test_objectives_from_tables_to_allocation(tmp_path: Path, texts: dict) -> None:
    found = {}
    for name, extra in {
        "sum": ("--domains", "sum"),
        "relative": (),
        "code": ("--domain-weights", "code=8"),
        "worst": ("--domains", "worst"),
        "ceiling": ("--no-worse-than-uniform", "code", "english"),
    }.items():
        flags = ("--scope", "model", *extra)
        found[name] = allocate(tmp_path, texts, goal=("--r", 1), extra=flags, budget="3.25")
        assert found[name]["gap"] < 1e-3
    uniform = allocate(
        tmp_path, texts, goal=("--r", 1), budget="3.25", extra=("--granularity", "uniform", "--domains", "sum")
    )
    assert list(ratios(uniform).values()) == pytest.approx([1.0] * 3)
    totals = {name: sum(one["domains"]["losses"].values()) for name, one in found.items()}
    assert totals["sum"] == pytest.approx(found["sum"]["loss"] ** 2)
    assert totals["sum"] == pytest.approx(min(totals.values()), rel=1e-4)
    means = {name: np.mean(list(ratios(one).values())) for name, one in found.items()}
    assert means["relative"] == pytest.approx(min(means.values()), rel=1e-4)
    assert ratios(found["code"])["code"] == min(ratios(one)["code"] for one in found.values())
    worst = {name: max(ratios(one).values()) for name, one in found.items()}
    assert worst["worst"] == min(worst.values()) <= 1
    assert max(ratios(found["ceiling"])["code"], ratios(found["ceiling"])["english"]) <= 1 + 1e-9
    assert means["ceiling"] >= means["relative"] * (1 - 1e-4)


def test_one_domain_counts_as_no_domains_do(tmp_path: Path, inputs: dict) -> None:
    """The same allocations to the last bit, whatever the objective; a maximum of one is its sum."""
    found = [
        allocate(tmp_path, inputs, extra=("--scope", "model", "--gap", "0", "--domains", name))
        for name in ("sum", "relative", "worst")
    ]
    for one in found:
        assert one["domains"].pop("objective")
    assert found[0] == found[1]
    assert found[2]["loss"] == pytest.approx(found[0]["loss"])
    assert found[2]["assignment"] == found[0]["assignment"]


def test_units_are_those_of_the_best_single_scheme(texts: dict) -> None:
    losses = read_losses(texts["losses"], "fisher", False)
    candidates = list(map(parse_scheme, SCHEMES))
    for budget, name in (("3.9", "w3a16"), ("4.25", "w4a16"), ("1", "w2a16")):  # the smallest, where none meets it
        uniform = uniform_within(losses, candidates, budget)
        assert uniform.scheme == parse_scheme(name)
        column = losses.schemes.index(uniform.scheme)
        assert uniform.losses == pytest.approx(losses.by_domain[:, :, column].sum(1))
        for objective_name in ("sum", "relative", "worst"):
            domains = count_domains(losses, uniform, objective_name, {"code": 3.0}, [])
            plain = count_domains(losses, uniform, objective_name, {}, [])
            assert domains.factor[0] / domains.factor[1] == pytest.approx(3 * plain.factor[0] / plain.factor[1])
            assert float(plain.loss(uniform.losses)) == pytest.approx(uniform.losses.sum())
    with pytest.raises(UserError, match="no domain 'cod': the calibration text has code, english, french"):
        count_domains(losses, uniform, "sum", {}, ["cod"])


def test_experts_with_few_tokens_count_as_if_they_had_more(texts: dict) -> None:
    losses = read_losses(texts["losses"], "fisher", False)
    blocks, generator = losses.blocks, np.random.default_rng(0)
    experts = {key: int(generator.integers(0, 50)) for key in zip(blocks.layer, blocks.expert, strict=True)}
    losses = replace(losses, tokens=np.array([experts[key] for key in zip(blocks.layer, blocks.expert, strict=True)]))
    for least in (0.0, 0.5, 1.0):
        found = with_least_tokens(losses, least)
        for number, key in enumerate(zip(blocks.layer, blocks.expert, strict=True)):
            mean = np.mean([count for (layer, expert), count in experts.items() if layer == key[0] and expert >= 0])
            scale = 1.0 if key[1] < 0 else max(1.0, least * mean / max(experts[key], 1))
            assert found.loss[number] == pytest.approx(losses.loss[number] * scale)
            assert found.by_domain[:, number] == pytest.approx(losses.by_domain[:, number] * scale)


def test_what_cannot_be_asked_for(tmp_path: Path, texts: dict, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        allocate(tmp_path, texts, extra=("--domains", "worst"))  # scope layer
    assert "use them with scope: model" in capsys.readouterr().err
    model = ("--scope", "model", "--domains", "worst")
    with pytest.raises(UserError, match="--prove confirms sums over blocks"):
        allocate(tmp_path, texts, extra=(*model, "--prove", "--gap", 0))
    with pytest.raises(UserError, match="no allocation was found that is no worse than uniform"):
        allocate(
            tmp_path, texts, budget="4.25", extra=(*model[:2], "--no-worse-than-uniform", "code", "--fix", "all=w2a16")
        )
