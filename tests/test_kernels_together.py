"""Kernels that are compiled in processes of their own."""

import importlib.util
import logging
from pathlib import Path

import pytest

from mxmoe_steps.kernels.architectures import DEFAULT
from mxmoe_steps.kernels.build import TokenKernel, build, library_path
from mxmoe_steps.kernels.together import build_together

pytestmark = pytest.mark.skipif(importlib.util.find_spec("cutlass") is None, reason="needs the extra [cuda]")


def test_missing_kernels_are_compiled_and_the_others_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    kernels = tuple(TokenKernel(name) for name in ("sort_1", "combine_bf16", "combine_float32", "swiglu", "quantize"))
    monkeypatch.setenv("MXMOE_KERNEL_CACHE", str(tmp_path / "several"))
    written = build(kernels[0]).stat().st_mtime_ns
    with caplog.at_level(logging.WARNING, "mxmoe_steps"):
        assert build_together(kernels, 2) == [library_path(kernel) for kernel in kernels]
    assert [record.message[:41] for record in caplog.records] == ["compiling 4 GPU kernels in 2 processes; t"]
    assert library_path(kernels[0]).stat().st_mtime_ns == written
    for kernel in kernels[1:]:
        alone = build(kernel, tmp_path / "alone")
        assert library_path(kernel).with_suffix(".cubin").read_bytes() == alone.with_suffix(".cubin").read_bytes()


def test_what_fails_is_left_to_the_one_who_loads_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MXMOE_KERNEL_CACHE", str(tmp_path))
    kernels = tuple(TokenKernel(f"unheard-of_{number}", DEFAULT) for number in range(4))
    with pytest.raises(KeyError):
        build_together(kernels, 2)
    assert not any(library_path(kernel).exists() for kernel in kernels)
    with pytest.raises(KeyError):
        build(kernels[0])
