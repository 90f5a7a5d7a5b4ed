"""Loss against time at the size of a larger model: losses, traffic, the step, its file and its words."""

import copy
import json
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mutations import mutated_json, refusal
from synthetic import run, write_losses

from mxmoe_steps import extrapolate, profile
from mxmoe_steps.allocation.blocks import read_losses
from mxmoe_steps.allocation.enlarged import enlarged, layer_blocks, shares
from mxmoe_steps.allocation.pick import objective
from mxmoe_steps.errors import UserError
from mxmoe_steps.extrapolations import read_extrapolation
from mxmoe_steps.reporting.extrapolated import lines, verdicts
from mxmoe_steps.reporting.figures import frontiers, gpu
from mxmoe_steps.schemes import SHARED, parse_scheme
from mxmoe_steps.timing.launches import skewed_rows
from mxmoe_steps.timing.profile import read_profile
from mxmoe_steps.timing.roofline import layer_roofline
from mxmoe_steps.timing.shapes import MODELS, shape_like
from mxmoe_steps.timing.traffic import skewed_traffic

SCHEMES = ("w2a16", "w4a16", "w8a8_fp8")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Losses of two domains, a profile, an extrapolation to the demo model's shape."""
    folder = tmp_path_factory.mktemp("made")
    losses = write_losses(folder / "losses", SCHEMES, layers=2, experts=5, domains=("prose", "code"))
    run(profile, "--hardware", "h20", "--schemes", *SCHEMES, "w16a16", "--out", folder / "profile.parquet")
    asked = ["--losses", *losses, "--profile", folder / "profile.parquet", "--candidates", *SCHEMES]
    asked += ["--shape", "demo-moe", "--budget-bits", "4.5", "2.3", "--tokens", 16, 512, "--gap", 0]
    run(extrapolate, *asked, "--out", folder / "found.json")
    return folder


@pytest.mark.parametrize(("many", "few"), [(60, 16), (16, 16), (8, 16), (7, 3), (1, 5)])
def test_shares_are_overlaps_of_ranks(many: int, few: int) -> None:
    found = shares(many, few)
    np.testing.assert_allclose(found.sum(0), 1)
    for one in range(many):
        for other in range(few):
            low = max(Fraction(one, many), Fraction(other, few))
            high = min(Fraction(one + 1, many), Fraction(other + 1, few))
            assert found[one, other] == pytest.approx(float(few * max(high - low, 0)))


def test_losses_keep_their_sums_and_the_busiest_come_first(made: Path) -> None:
    losses = read_losses(sorted((made / "losses").glob("*.parquet")), "fisher", True)
    tokens = np.where(losses.blocks.expert == SHARED, 100, 10 + 7 * losses.blocks.expert % 13)
    losses = replace(losses, tokens=tokens)
    larger = enlarged(losses, layer_blocks([0, 1], 12, 512, 128, 384))
    assert losses.schemes[-1] == parse_scheme("w16a16")
    assert (larger.loss[:, -1] == 0).all()
    for layer in (0, 1):
        for kind in range(3):
            old, new = (
                (one.blocks.layer == layer) & (one.blocks.kind == kind) & (one.blocks.expert != SHARED)
                for one in (losses, larger)
            )
            np.testing.assert_allclose(larger.by_domain[:, new].sum(1), losses.by_domain[:, old].sum(1))
            order = np.flatnonzero(old)[np.argsort(-tokens[old], kind="stable")]
            np.testing.assert_allclose(larger.loss[new][:2], losses.loss[order[[0, 0]]] * 5 / 12)  # 2.4 ranks each
            assert (np.diff(larger.tokens[new]) <= 0).all()
    shared = larger.blocks.expert == SHARED
    np.testing.assert_allclose(larger.loss[shared], losses.loss[losses.blocks.expert == SHARED], rtol=1e-12)
    for block in np.flatnonzero(shared):
        expected = [
            round(s.bits(int(larger.blocks.in_features[block])) * larger.blocks.params[block]) for s in losses.schemes
        ]
        assert larger.bits[block].tolist() == expected
    same = enlarged(losses, losses.blocks)
    assert np.sort(same.loss, 0) == pytest.approx(np.sort(losses.loss, 0))


def test_traffic_is_skewed_as_asked() -> None:
    shape = shape_like("qwen1.5-moe", shared=True)
    even, skewed = (skewed_traffic(shape, (0, 3), 64, skew, 200, 1) for skew in (0.0, 0.5))
    assert even.layers == (0, 3)
    assert (even.rows.sum(2) == 64 * shape.top_k).all()
    assert even.rows.mean((0, 1)) == pytest.approx(64 * shape.top_k / shape.experts, rel=0.1)
    rows = skewed.rows.mean((0, 1))
    assert 3.5 < rows[0] / rows.mean() < 4.5
    assert (np.diff(rows[::10]) < 0).all()
    rare = skewed_traffic(shape, (0,), 1, 2.0, 2, 0)  # two tokens reach few of 60 experts, and none is free
    assert ((rare.rows * rare.weight).sum(1) > 0).all()
    generator, other = (np.random.default_rng(5) for _ in range(2))
    found = skewed_rows(shape, 30, 0.7, generator)
    noisy = -0.7 * np.log(other.permutation(60) + 1.0) + other.gumbel(size=(30, 60))
    assert found[:60].tolist() == np.bincount(np.argsort(-noisy, 1)[:, :4].ravel(), minlength=60).tolist()
    assert found[60:].tolist() == [30] * shape.slices


def test_the_step_solves_the_larger_problem(made: Path) -> None:
    found = read_extrapolation(made / "found.json")
    losses = read_losses(sorted((made / "losses").glob("*.parquet")), "fisher", False)
    sums = {scheme.name: losses.loss[:, place].sum() for place, scheme in enumerate(losses.schemes)}
    assert [case["tokens"] for case in found["cases"]] == [16, 512]
    for case in found["cases"]:
        assert {one["scheme"]: one["loss"] for one in case["uniform"]} == pytest.approx(sums)
        by_scheme = {one["scheme"]: one for one in case["uniform"]}
        assert by_scheme["w2a16_g128_asym"]["bits"] == 2.25
        for frontier in case["frontiers"]:
            vertices = frontier["vertices"]
            values = [objective(one["loss"], one["time_us"], found["r"], 0.5) for one in vertices]
            assert values[frontier["picked"]] <= min(values) * (1 + 0.2)  # re-timed by the schemes that are used
            assert all(one["bits"] <= frontier["budget_bits"] + 1e-9 for one in vertices)
            assert all(sum(one["shares"].values()) == pytest.approx(1) for one in vertices)
            within = [one["loss"] for one in case["uniform"] if one["bits"] <= frontier["budget_bits"]]
            assert vertices[0]["loss"] <= min(within)


def test_bad_input_is_refused(made: Path, tmp_path: Path) -> None:
    asked = ["--losses", *sorted((made / "losses").glob("*.parquet")), "--profile", made / "profile.parquet"]
    asked += ["--candidates", *SCHEMES, "--out", tmp_path / "out.json"]
    said = refusal(lambda: run(extrapolate, *asked, "--shape", "mixtral-8x7b"))
    assert "mixtral-8x7b has no shared expert, the model to quantize has one; choose one of qwen1.5-moe" in said
    said = refusal(lambda: run(extrapolate, *asked, "--shape", "demo-moe", "--budget-bits", "1.5"))
    assert "1.5" in said
    assert not (tmp_path / "out.json").exists()


@given(data=st.data())
@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_damaged_extrapolation(made: Path, tmp_path: Path, data: st.DataObject) -> None:
    path = tmp_path / "damaged.json"
    path.write_text(data.draw(mutated_json(json.loads((made / "found.json").read_text()))))
    said = refusal(lambda: read_extrapolation(path))
    assert "damaged.json: " in said or verdicts(read_extrapolation(path))


def test_words_and_figure_of_an_extrapolation(made: Path) -> None:
    found = read_extrapolation(made / "found.json")
    (spot,) = (one for one in found["cases"][0]["uniform"] if one["scheme"] == "w4a16_g128_asym")
    case: dict[str, Any] = copy.deepcopy(found["cases"][0])
    case["frontiers"] = [
        {"budget_bits": budget, "picked": 0, "vertices": [copy.deepcopy(spot)]} for budget in (4.5, 2.3, 1)
    ]
    for factor, ratio, verdict in ((1.0, 0.5, "wins"), (1.2, 0.5, "loses less, in more time"), (1.0, 1.0, "is even"),
                                   (0.8, 1.3, "takes less time, loses more"), (1.1, 1.0, "does not win")):  # fmt: skip
        case["frontiers"][0]["vertices"][0] |= {"time_us": factor * spot["time_us"], "loss": ratio * spot["loss"]}
        rows = verdicts(found | {"cases": [case]})
        assert rows[0][2] == "w4a16"
        assert rows[0][7:10] == [f"{factor:.2f}", f"{ratio:.2f}", verdict]
    assert rows[2][2:5] == ["none", "", ""]
    assert "w4a16 (4.25 bits)" in rows[1][-1]
    (line,) = lines(found | {"cases": [case]})
    assert line.startswith("On layers of demo-moe, 16 tokens in a step: at 4.5 bits the mixture does not win (1.10 of")
    svg = frontiers.extrapolated(found)
    assert ">w8a8_fp8<" in svg
    assert "ours, at most 4.5 bits" in svg


def test_the_roofline_of_a_layer(made: Path) -> None:
    losses = read_losses(sorted((made / "losses").glob("*.parquet")), "fisher", True)
    shape = replace(next(one for one in MODELS if one.model == "demo-moe"), experts=5, top_k=2)
    traffic, gpu_profile = skewed_traffic(shape, (0, 1), 512, 0.5, 3, 0), read_profile(made / "profile.parquet")
    experts = [[layer, expert, *["w16a16"] * 3] for layer in (0, 1) for expert in range(-1, 5)]
    found = layer_roofline({"assignment": experts, "timed_as": {}}, losses.blocks, traffic, gpu_profile, 1)
    assert len(found["experts"]) == 12
    for point in found["experts"]:
        shared = point["expert"] == SHARED
        rows = 512 if shared else traffic.rows[1, :, point["expert"]].mean()
        out, inner = (256, 256 if shared else 128) if point["launch"] == "down" else (256 if shared else 128, 256)
        times = 1 if point["launch"] == "down" else 2
        slices = 2 if shared else 1  # of the routed width, each of which reads the tokens
        read = inner + (slices - 1) * (256 if point["launch"] == "gate+up" else 0)
        wrote = out + (slices - 1) * (256 if point["launch"] == "down" else 0)
        moved = times * 2 * (out * inner + rows * (read + wrote))
        assert point["intensity"] == pytest.approx(times * 2 * rows * out * inner / moved)
        assert (
            point["tflops"]
            <= min(found["peaks_tflops"]["bf16"], point["intensity"] * found["bandwidth_gbs"] / 1e3) * 1.01
        )
    svg = gpu.roofline([found], estimate=True)
    assert "bf16 roof" in svg
    assert "down, w16a16" in svg


def test_a_shape_without_a_shared_expert() -> None:
    assert shape_like("mixtral-8x7b", shared=False).top_k == 2
    with pytest.raises(UserError, match=r"qwen1\.5-moe has a shared expert, the model to quantize has none"):
        shape_like("qwen1.5-moe", shared=False)
