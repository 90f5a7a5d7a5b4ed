"""Compile kernels without a GPU and read their machine code."""

import importlib.util
import os
from pathlib import Path

import pytest

from mxmoe_steps.gating import CLAMPED, Gating
from mxmoe_steps.kernels.architecture import ROTATED_KERNELS
from mxmoe_steps.kernels.build import TokenKernel, build, default_cache, library_path
from mxmoe_steps.kernels.codes.format import Format
from mxmoe_steps.kernels.formats import FORMATS, kernel_format
from mxmoe_steps.kernels.lint import disassemble, disassembler, inspect
from mxmoe_steps.kernels.sm90.architecture import HOPPER
from mxmoe_steps.kernels.sm90.config import SHARED_BYTES, UNIT, KernelConfig, Tile, by_warp
from mxmoe_steps.schemes import parse_scheme

needs_compiler = pytest.mark.skipif(
    importlib.util.find_spec("cutlass") is None or disassembler() is None,
    reason="nvidia-cutlass-dsl or nvidia-cuda-nvdisasm is not installed",
)
REGISTERS = {(1, 2): 232, (2, 2): 104, (1, 4): 112}  # a consumer thread may use, by blocks per SM and warpgroups
MIXTURES = {  # as the solver mixes them
    phase: [tuple(kernel_format(parse_scheme(name)) for name in names.split()) for names in mixtures]
    for phase, mixtures in {
        "prefill": ["w16a16 w4a16 w4a8_fp8 w8a8_fp8", "w16a16 w4a16 w4a8_fp8 w4a8", "w3a16 w4a8_fp8 w8a8_fp8"],
        "latency": ["w2a16 w4a16 w8a8_fp8", "w2a16 w4a8_fp8 w8a8_fp8"],
    }.items()
}
W16A16, W4A16 = (kernel_format(parse_scheme(name)) for name in ("w16a16", "w4a16"))
OF_HOPPER = tuple(format_ for format_ in FORMATS if format_.operand in HOPPER.operands)
OPCODE = {"bf16": "HGMMA", "fp8": "QGMMA", "int8": "IGMMA"}


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if "MXMOE_KERNEL_CACHE" in os.environ:
        return default_cache()
    return tmp_path_factory.getbasetemp().parent / "mxmoe-kernels"  # shared by xdist's workers


@needs_compiler
@pytest.mark.parametrize("phase", HOPPER.phases)
@pytest.mark.parametrize("format_", OF_HOPPER, ids=lambda format_: format_.name)
def test_main_loops_are_clean(format_: Format, phase: str, cache: Path) -> None:
    config = HOPPER.config((format_,), phase)
    code = inspect(disassemble(build(config, cache).with_suffix(".cubin")))
    if config.split > 1 and by_warp(format_):  # 128 features a slot
        assert code.matrix == ({"HMMA": 8} if format_.operand == "bf16" else {"IMMA": 4})
        assert code.groups == 0
    else:
        assert set(code.matrix) == {OPCODE[format_.operand]}
        assert sum(code.matrix.values()) == code.groups * 4, "serialized"
    assert code.spills == 0
    assert code.early_reads == []
    assert code.registers <= REGISTERS[config.blocks_per_sm, config.warpgroups]


@needs_compiler
@pytest.mark.parametrize(
    "formats",
    MIXTURES["prefill"],
    ids=lambda formats: "+".join(format_.name for format_ in formats),
)
def test_a_mixture_has_every_matrix_instruction_it_needs(formats: tuple[Format, ...], cache: Path) -> None:
    code = inspect(disassemble(build(HOPPER.config(formats, "prefill"), cache).with_suffix(".cubin")))
    assert set(code.matrix) == {OPCODE[format_.operand] for format_ in formats}
    assert sum(code.matrix.values()) > 2 * code.groups, "serialized"
    assert (code.spills, code.early_reads) == (0, [])


@needs_compiler
@pytest.mark.parametrize("formats", MIXTURES["latency"], ids=lambda formats: formats[1].name)
def test_a_split_mixture_keeps_its_registers(formats: tuple[Format, ...], cache: Path) -> None:
    """Fragments that a warpgroup without slots leaves alone must not be kept for every configuration."""
    config = HOPPER.config(formats, "latency")
    code = inspect(disassemble(build(config, cache).with_suffix(".cubin")))
    assert code.matrix == ({"HMMA": 16, "QGMMA": 4} if by_warp(formats[1]) else {"HMMA": 8, "QGMMA": 8})
    assert code.matrix["QGMMA"] == code.groups * 4, "serialized"
    assert (code.spills, code.early_reads) == (0, [])
    assert code.registers <= REGISTERS[1, 4]


@needs_compiler
@pytest.mark.parametrize("phase", ["decode", "prefill"])
def test_mixtures_keep_what_all_lanes_share_in_uniform_registers(phase: str, cache: Path) -> None:
    """Four groups of 2-bit weights in a slot made hundreds of copies of addresses to uniform registers."""
    formats = MIXTURES["latency"][0]
    code = inspect(disassemble(build(HOPPER.config(formats, phase), cache).with_suffix(".cubin")))
    assert (code.spills, code.early_reads) == (0, [])
    assert code.to_uniform < 50


@needs_compiler
def test_a_table_of_512_problems_fits(cache: Path) -> None:
    config = HOPPER.config((W4A16,), "prefill", max_problems=512)
    assert config.stages >= 3
    code = inspect(disassemble(build(config, cache).with_suffix(".cubin")))
    assert (code.spills, code.early_reads) == (0, [])


@needs_compiler
@pytest.mark.parametrize(
    "name",
    [
        *HOPPER.token_kernels,
        *ROTATED_KERNELS,
        *Gating(CLAMPED, biased=True).token_kernels,
        "activate_gelu",
        "activate_relu2-ungated",
        "activate_clamped-biased_rotated",
    ],
)
def test_token_kernels_keep_to_registers_and_move_16_bytes_at_a_time(name: str, cache: Path) -> None:
    sass = disassemble(build(TokenKernel(name), cache).with_suffix(".cubin"))
    code = inspect(sass)
    assert (code.spills, code.early_reads, code.matrix) == (0, [], {})
    assert code.registers <= (96 if name == "quantize_rotated" else 64)  # a warp holds a row of float32
    if not name.startswith("sort"):
        assert "LDG.E.128" in sass
        assert ("STG.E.64" if name == "quantize" else "STG.E.128") in sass  # that one stores eight codes of a byte


@needs_compiler
def test_a_second_build_is_a_file_lookup(cache: Path) -> None:
    config = KernelConfig((Tile(W16A16, 16),))
    library = build(config, cache)
    before = library.stat().st_mtime_ns
    assert build(config, cache) == library == library_path(config, cache)
    assert library.stat().st_mtime_ns == before


def test_every_default_kernel_fits_in_shared_memory() -> None:
    for phase in HOPPER.phases:
        for format_ in OF_HOPPER:
            config = HOPPER.config((format_,), phase)
            assert config.stages >= 3
            assert config.ring_units * UNIT < SHARED_BYTES[config.blocks_per_sm]
        assert HOPPER.config(OF_HOPPER, phase).stages >= 2


def test_an_early_read_is_found() -> None:
    sass = """
        /*0010*/                   HGMMA.64x64x16.F32.BF16 R24, gdesc[UR8], R24, gsb0 ;
        /*0020*/                   FMUL R3, R25, R4 ;
        /*0030*/                   WARPGROUP.DEPBAR.LE gsb0, 0x0 ;
        /*0040*/                   FMUL R3, R26, R4 ;
        /*0050*/                   STL [R1], R3 ;
    """
    code = inspect(sass)
    assert code.early_reads == ["FMUL R3, R25, R4"]
    assert (code.matrix, code.groups, code.spills, code.registers) == ({"HGMMA": 1}, 1, 1, 27)
    assert (code.to_uniform, code.code_bytes) == (0, 80)
