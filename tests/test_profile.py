"""The roofline estimate."""

import json
import subprocess
import sys

import pytest

from mxmoe_steps.errors import UserError
from mxmoe_steps.profile import HARDWARE, estimate_profile, read_hardware, roofline_kstep_us
from mxmoe_steps.schemes import parse_scheme
from mxmoe_steps.tables import PROFILE, read_table


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
    assert roofline_kstep_us(parse_scheme("w16a16"), 8, h100) == pytest.approx(loaded * 132 / 8e6)
    peak = 2 * 128 * 128 * 256 * 132 / 989e6
    assert roofline_kstep_us(parse_scheme("w4a16"), 256, {**h100, "l2_gbs": 1e6}) == pytest.approx(peak)


def test_unknown_gpu_and_missing_tensor_cores():
    with pytest.raises(UserError, match="known are a100, h100"):
        read_hardware("abacus")
    with pytest.raises(UserError, match="no fp8 tensor cores"):
        estimate_profile([parse_scheme("w8a8_fp8")], read_hardware("a100"))


def test_command_line_writes_the_same_bytes(tmp_path):
    for name in ("a", "b"):
        command = [sys.executable, "-m", "mxmoe_steps.profile", "--hardware", "h100", "--schemes", "w1a16", "w4a16",
                   "--out", str(tmp_path / name)]  # fmt: skip
        subprocess.run(command, check=True)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    table, facts = read_table(PROFILE, tmp_path / "a")
    assert set(table.column("scheme").to_pylist()) == {"w2a16_g128_asym", "w4a16_g128_asym"}
    assert facts["estimate"] is True
