"""Profiles: the data-sheet estimate, the fit to measurements, and what is refused."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from mxmoe_steps.errors import UserError
from mxmoe_steps.kernels.architectures import BUILT, PHASE_ROWS, PHASES
from mxmoe_steps.kernels.formats import kernel_format
from mxmoe_steps.kernels.sm90.architecture import HOPPER
from mxmoe_steps.profile import fit_profile
from mxmoe_steps.schemes import parse_scheme
from mxmoe_steps.tables import MEASUREMENTS, PROFILE, read_table, write_table
from mxmoe_steps.timing.estimate import HARDWARE, PEAK_SHARES, estimate_profile, read_hardware, roofline_kstep_us
from mxmoe_steps.timing.fit import errors, fit
from mxmoe_steps.timing.fit_constants import features, fit_constants, held_out, predict
from mxmoe_steps.timing.fit_tiles import fit_tiles
from mxmoe_steps.timing.launches import kernel_configs, mixtures, problem_launches, tile_launches
from mxmoe_steps.timing.sources import kernel_hashes


def test_every_shipped_gpu_has_a_source_and_all_fields():
    for name in json.loads(HARDWARE.read_text()):
        hardware = read_hardware(name)
        assert hardware["source"]
        assert hardware["sms"] > 0
        columns, facts = estimate_profile([parse_scheme("w4a16")], hardware)
        assert facts["estimate"] is True
        assert all(time > 0 for time in columns["kstep_us"] + columns["tile_us"])


def test_the_slower_of_tensor_cores_and_cache_counts():
    h100 = read_hardware("h100")
    loaded = 128 * 128 * 2 + 8 * 128 * 2
    assert roofline_kstep_us(parse_scheme("w16a16"), 128, 8, h100) == pytest.approx(loaded * 132 / 8e6)
    peak = 2 * 128 * 128 * 256 * 132 / 989e6
    assert roofline_kstep_us(parse_scheme("w4a16"), 128, 256, {**h100, "l2_gbs": 1e6}) == pytest.approx(peak)


def test_tiles_of_mma_sync_reach_the_measured_shares_of_a_peak():
    cells = json.loads((ROOT / "docs" / "measurements" / "mma.json").read_text())
    peaks = read_hardware("h100")["peak_tflops"]
    names = {("bf16", False): "w16a16", ("bf16", True): "w4a16_g128_asym", ("int8", False): "w8a8_g-1_sym",
             ("int8", True): "w4a8_g128_sym"}  # fmt: skip
    operations = 2 * 8192 * 4 * 2 * 1408 * 2048  # four experts of a token, gate and up
    for (kind, _), shares in PEAK_SHARES.items():
        name = names[kind, _]
        phases = PHASES if len(shares) == len(PHASES) else ("latency", "prefill")  # decode's largest tile is prefill's
        for phase, share in zip(phases, shares.values(), strict=True):
            key = ["qwen1.5-moe", name, "gate_up", phase, 8192]
            fields = ("workload", "run", "gemm", "phase", "T")
            (us,) = (cell["us"] for cell in cells if [cell[field] for field in fields] == key)
            assert operations / (us * 1e6 * peaks[kind]) == pytest.approx(share, abs=6e-4)
    rtx3090 = read_hardware("rtx3090")
    fast = {**rtx3090, "l2_gbs": 1e9}
    for name, kind, tokens, share in (("w16a16", "bf16", 64, 0.352), ("w4a16", "bf16", 8, 0.11),
                                      ("w8a8", "int8", 256, 0.355), ("w4a4", "int4", 96, 0.266)):  # fmt: skip
        perfect = 2 * 128 * 128 * tokens * 82 / (rtx3090["peak_tflops"][kind] * 1e6)
        assert roofline_kstep_us(parse_scheme(name), 128, tokens, fast) == pytest.approx(perfect / share)
    between = [roofline_kstep_us(parse_scheme("w4a16"), 128, tokens, fast) for tokens in (8, 36, 64)]
    assert between[1] == pytest.approx((between[0] + between[2]) / 2)


def test_unknown_gpu_and_missing_tensor_cores():
    with pytest.raises(UserError, match="known are a100, h100"):
        read_hardware("abacus")
    with pytest.raises(UserError, match="no fp8 tensor cores"):
        estimate_profile([parse_scheme("w8a8_fp8")], read_hardware("a100"))


ROOT = Path(__file__).parents[1]
SMS = 132
TRUE = {"launch_us": 6.0, "loop_launch_us": 0.15, "loop_tile_us": 0.05, "tail": 0.7, "exposed": 0.2,
        "bandwidth_gbs": 3000.0, "activation_gbs": 2000.0}  # fmt: skip
MACHINE = {"capability": [8, 0], "compiler": "none", "cuda": "13.0", "date": "2026-11-28", "driver": "", "sms": 108,
           "torch": "2.13.0"}  # fmt: skip
FORMATS = tuple(sorted(kernel_format(parse_scheme(name)) for name in ("w16a16", "w4a16", "w8a8_fp8", "w2a16")))


def row_of(launch, phase: str, us: list[float], apart: bool = False) -> dict:
    return {
        "kind": launch.kind, "model": launch.model, "block": launch.block, "tokens": launch.tokens,
        "out_features": launch.n, "in_features": launch.k, "phase": phase, "apart": apart,
        "carried": [f.name for f in launch.carried], "experts": len(launch.expert_rows), "rows": list(launch.rows),
        "schemes": list(launch.schemes), "us": us,
    }  # fmt: skip


def synthetic_machine(noise: float) -> list[dict]:
    """Measurements of a machine that obeys the model, with lognormal noise."""
    generator = np.random.default_rng(0)

    def rounds(us: float) -> list[float]:
        return (us * generator.lognormal(0, noise, 5)).tolist()

    tile = {}
    rows = []
    for launch, phase in tile_launches(HOPPER, FORMATS, SMS):
        scheme = parse_scheme(launch.schemes[0])
        tile_us, kstep_us = 0.5 + launch.tokens / 100, 0.1 + scheme.weight_bits / 40 + launch.tokens / 500
        tile.setdefault((phase, scheme.name), set()).add((launch.tokens, tile_us, kstep_us, 0.0))
        waves = len(launch.rows) * -(-launch.n // PHASE_ROWS[phase]) / SMS
        rows.append(row_of(launch, phase, rounds(5 + waves * (tile_us + kstep_us * launch.k / 128))))
    tiles = {key: np.array(sorted(cells)) for key, cells in tile.items()}
    for launch in problem_launches(FORMATS, 60):
        for phase in PHASES:
            row = row_of(launch, phase, [1.0])
            us = predict(features([row], tiles, SMS), TRUE)[0]
            rows.append({**row, "us": rounds(us)})
            if launch.mixed:
                rows.append({**row, "us": rounds(1.25 * us), "apart": True})
    return rows


def test_the_fit_finds_the_machine():
    rows = synthetic_machine(noise=0.01)
    columns, facts = fit(rows, SMS, HOPPER)
    for name, value in TRUE.items():
        assert facts[name] == pytest.approx(value, rel=0.1, abs=0.02), name
    for scheme, tokens, tile_us, kstep_us in zip(
        columns["scheme"], columns["tile_tokens"], columns["tile_us"], columns["kstep_us"], strict=True
    ):
        assert kstep_us == pytest.approx(0.1 + parse_scheme(scheme).weight_bits / 40 + tokens / 500, rel=0.05)
        assert tile_us == pytest.approx(0.5 + tokens / 100, rel=0.25, abs=0.2)
    assert facts["errors"]["single"]["median"] < 0.02
    assert facts["errors"]["mixed"]["p95"] < 0.05
    assert facts["repeat_spread"]["median"] == pytest.approx(0.023, rel=0.3)  # range of five normal draws: 2.33 sigma
    assert facts["fused_over_apart"][0]["median"] == pytest.approx(0.8, rel=0.02)
    assert fit(rows, SMS, HOPPER) == (columns, facts)


def test_errors_by_hand():
    found = errors(np.array([1.1, 2.0, 2.4]), np.array([1.0, 2.0, 3.0]))
    assert found == {"problems": 3, "median": pytest.approx(0.1), "p95": pytest.approx(0.1 + 0.9 * 0.1)}


def test_held_out_problems_do_not_reach_their_own_fit():
    rows = synthetic_machine(noise=0.0)
    problems = [row for row in rows if row["kind"] == "problem" and not row["apart"] and row["phase"] == "decode"]
    data = features(problems, fit_tiles([row for row in rows if row["kind"] == "tile"], SMS), SMS)
    spoiled = data.us.copy()
    spoiled[::5] *= 10
    honest = fit_constants(data[np.arange(len(spoiled)) % 5 > 0])
    kept = held_out(replace(data, us=spoiled))[::5]
    assert kept == pytest.approx(predict(data, honest)[::5])


def test_measurements_without_a_phase_are_refused():
    rows = [row for row in synthetic_machine(0.0) if row["phase"] != "latency"]
    with pytest.raises(UserError, match=r"no latency tiles of .*run measure again"):
        fit(rows, SMS, HOPPER)


def test_too_few_measurements_are_refused(tmp_path):
    rows = [row for row in synthetic_machine(0.0) if row["kind"] == "tile"]
    with pytest.raises(UserError, match="0 problems, fewer than"):
        fit(rows, SMS, HOPPER)
    write_table(MEASUREMENTS, tmp_path / "other.parquet", {name: [] for name in MEASUREMENTS.schema.names},
                {**MACHINE, "device": "NVIDIA Abacus"})  # fmt: skip
    with pytest.raises(UserError, match="no kernels for NVIDIA Abacus and no data sheet"):
        fit_profile(tmp_path / "other.parquet", [parse_scheme("w4a16")])


def test_a_known_gpu_without_kernels_gets_its_data_sheet(tmp_path, capsys):
    write_table(MEASUREMENTS, tmp_path / "a100.parquet", {name: [] for name in MEASUREMENTS.schema.names},
                {**MACHINE, "device": "NVIDIA A100-SXM4-80GB"})  # fmt: skip
    columns, facts = fit_profile(tmp_path / "a100.parquet", [parse_scheme("w4a16")])
    assert (columns, facts) == estimate_profile([parse_scheme("w4a16")], read_hardware("a100"))
    assert capsys.readouterr().err.count("no kernels for NVIDIA A100") == 1


def test_shipped_measurements_meet_the_bar():
    page = (ROOT / "docs" / "profile.md").read_text(encoding="utf-8")
    said = {"single": "| one scheme | 203 |", "mixed": "| mixed schemes | 197 |"}
    for hardware in ("h100", "h200"):
        table, measured = read_table(MEASUREMENTS, HARDWARE.with_name(f"{hardware}.parquet"))
        kernels = set(measured["kernels"]) & set(kernel_hashes(HOPPER))
        assert {"codes.w4a16", "sm90.config", "sm90.group_gemm"} <= kernels
        assert {"clocks", "compiler", "cuda", "date", "device", "driver", "torch"} <= set(measured)
        errors = fit(table.to_pylist(), measured["sms"], HOPPER)[1]["errors"]
        for kind, error in errors.items():
            assert error["problems"] >= 100
            assert error["median"] <= 0.10
            assert error["p95"] <= 0.20
            said[kind] += f" {100 * error['median']:.1f} % | {100 * error['p95']:.1f} % |"
        if hardware == "h100":
            single, mixed = (
                (f"{100 * error['median']:.1f} %", f"{100 * error['p95']:.1f} %")
                for error in (errors["single"], errors["mixed"])
            )
            readme = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
            assert f"{single[0]} at the median and {single[1]} at the 95th percentile" in readme
            assert f"{mixed[0].removesuffix(' %')} and {mixed[1]} for mixtures" in readme
    assert all(row in page for row in said.values())


@pytest.mark.parametrize("architecture", BUILT, ids=lambda one: one.name)
def test_launches_are_those_that_were_compiled(architecture):
    formats = tuple(format_ for format_ in FORMATS if format_.operand in architecture.operands)
    compiled = set(kernel_configs(architecture, formats))
    launches = problem_launches(formats, 50)
    assert all(config in compiled for launch in launches for p in PHASES
               for config in (launch.config(architecture, p), *launch.configs_apart(architecture, p)))  # fmt: skip
    assert launches == problem_launches(formats, 50)
    assert len({launch.model for launch in launches}) > 4
    assert all(sorted(launch.order) == list(range(len(launch.rows))) for launch in launches)
    assert not mixtures(FORMATS[:1])
    for launch, phase in tile_launches(architecture, formats, SMS):
        assert launch.config(architecture, phase) in compiled
        assert len(launch.rows) * -(-launch.n // 128) % (2 * SMS) == 0


def test_measuring_needs_a_gpu(tmp_path):
    if torch.cuda.is_available():
        pytest.skip("has a GPU")
    command = [sys.executable, "-m", "mxmoe_steps.measure", "--schemes", "w4a16", "--out", str(tmp_path / "m")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "measure needs a CUDA GPU and this machine has none" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("hardware", ["h20", "h100"])
def test_command_line_writes_the_same_bytes(tmp_path, hardware):
    for name in ("a", "b"):
        command = [sys.executable, "-m", "mxmoe_steps.profile", "--hardware", hardware, "--schemes", "w1a16", "w4a16",
                   "--out", str(tmp_path / name)]  # fmt: skip
        subprocess.run(command, check=True)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    table, facts = read_table(PROFILE, tmp_path / "a")
    assert {"w2a16_g128_asym", "w4a16_g128_asym"} <= set(table.column("scheme").to_pylist())
    assert facts["estimate"] is (hardware == "h20")
