"""Which GPUs there are kernels for is said once, and everybody asks the registry."""

import re
from pathlib import Path

import pytest
import torch

from mxmoe_steps.errors import UserError
from mxmoe_steps.kernels import launch
from mxmoe_steps.kernels.architectures import ARCHITECTURES, BUILT, PHASE_ROWS, for_capability, for_target
from mxmoe_steps.kernels.build import TokenKernel, library_path
from mxmoe_steps.kernels.formats import FORMATS
from mxmoe_steps.kernels.sm90.architecture import HOPPER

SOURCE = Path(launch.__file__).parents[1]


def test_every_architecture_is_found_by_its_capability() -> None:
    assert [for_capability(one.capability) for one in ARCHITECTURES] == list(ARCHITECTURES)
    assert len({one.target for one in ARCHITECTURES}) == len({one.configuration for one in BUILT}) - 1
    assert for_capability((9, 0)) is HOPPER  # not that whose kernels are only checked there
    assert for_capability((7, 5)) is None
    assert [for_target(one.target) for one in ARCHITECTURES] == list(ARCHITECTURES)
    assert for_target("sm_75") is None


def test_phases_have_tiles_of_the_same_rows_everywhere() -> None:
    """Tables of times name the phase alone."""
    assert all(one.phase_rows == PHASE_ROWS for one in BUILT)


@pytest.mark.parametrize("architecture", BUILT, ids=lambda one: one.name)
def test_there_is_a_kernel_of_every_phase_for_every_format(architecture) -> None:
    for phase in architecture.phases:
        for format_ in FORMATS:
            if format_.operand not in architecture.operands:
                with pytest.raises(UserError, match=f"have no {format_.operand} tensor cores"):
                    architecture.check([format_])
                continue
            config = architecture.config((format_,), phase)
            assert isinstance(config, architecture.configuration)
            assert config.formats == (format_,)
            assert architecture.token_tiles(format_, phase) == tuple(sorted(architecture.token_tiles(format_, phase)))


def test_a_gpu_without_kernels_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    launch.architecture_of.cache_clear()
    with pytest.raises(UserError, match=r"Tesla T4 has compute capability 7.5; the kernels are for 9.0 \(H100, "):
        launch.architecture_of(torch.device("cuda", 0))


def test_capability_and_target_stand_in_one_place() -> None:
    places = [
        str(file.relative_to(SOURCE))
        for file in sorted(SOURCE.rglob("*.py"))
        if re.search(r"\(9, ?0\)|\[9, ?0\]|sm_90a", file.read_text(encoding="utf-8"))
    ]
    assert places == ["kernels/sm90/architecture.py"]


def test_nothing_branches_on_a_bit_count() -> None:
    branches = re.compile(r"\bbits (==|!=|<|>|<=|>=|in) [\d(]")
    kernels = [*(SOURCE / "kernels").rglob("*.py"), SOURCE / "timing" / "gpu.py"]
    assert not [file.name for file in kernels if branches.search(file.read_text(encoding="utf-8"))]


def test_other_weight_codes_do_not_rename_a_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """A new code, or a change of one, compiles nothing that does not use it."""
    from mxmoe_steps.kernels import build

    config = HOPPER.config((FORMATS[0],), "decode")
    by_token = library_path(TokenKernel("swiglu"))
    before = library_path(config)
    hashed = build.module_hash
    changed = ("kernels.codes.w6a16", "kernels.formats")
    monkeypatch.setattr(build, "module_hash", lambda name: "0" if name.endswith(changed) else hashed(name))
    assert (library_path(config), library_path(TokenKernel("swiglu"))) == (before, by_token)
    six = next(format_ for format_ in FORMATS if format_.bits == 6)
    spoilt = library_path(HOPPER.config((six,), "decode"))
    monkeypatch.setattr(build, "module_hash", hashed)
    assert library_path(HOPPER.config((six,), "decode")) != spoilt
