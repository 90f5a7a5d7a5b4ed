"""The torch reference of the grouped GEMM, and what the launcher refuses before any GPU is touched."""

import importlib.util
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from mxmoe_steps.errors import UserError
from mxmoe_steps.kernels import launch, reference
from mxmoe_steps.kernels.architecture import Configuration
from mxmoe_steps.kernels.architectures import BUILT
from mxmoe_steps.kernels.formats import kernel_format
from mxmoe_steps.kernels.layouts import KernelWeights, original_weights
from mxmoe_steps.kernels.moe_layer import MoeLayer
from mxmoe_steps.kernels.sm90.architecture import HOPPER
from mxmoe_steps.kernels.sm90.config import KernelConfig, Tile
from mxmoe_steps.quantizers.grid import quantize_activations, round_to_nearest
from mxmoe_steps.schemes import parse_scheme

W16A16, W4A16 = (kernel_format(parse_scheme(name)) for name in ("w16a16", "w4a16_g128_sym"))


def test_reference_multiplies_each_expert_under_its_own_scheme() -> None:
    torch.manual_seed(0)
    names = ["w16a16", "w4a16", "w8a8_fp8"]
    x = torch.randn(13, 128).bfloat16()
    offsets = [0, 6, 6, 13]  # the middle expert has no token
    dense = [torch.randn(2, 64, 128).bfloat16() for _ in names]
    stacks = [
        w if n == "w16a16" else round_to_nearest(w.float(), parse_scheme(n)) for n, w in zip(names, dense, strict=True)
    ]
    problems = [(0, 1, 1, 0), (1, 0, 0, 0), (2, 2, 0, 0), (2, 0, 1, 64)]
    out = reference.group_gemm(x, offsets, problems, stacks, 128)
    fp8 = parse_scheme("w8a8_fp8")
    torch.testing.assert_close(out[:6, :64], (x[:6].float() @ stacks[1][1].dequantize().T).bfloat16())
    quantized = quantize_activations(x[6:], fp8).float()
    torch.testing.assert_close(out[6:, :64], (quantized @ stacks[2][0].dequantize().T).bfloat16())
    torch.testing.assert_close(out[6:, 64:], (x[6:].float() @ stacks[0][1].float().T).bfloat16())
    assert (out[:6, 64:] == 0).all()


@pytest.mark.parametrize("name", ["w8a8_fp8", "w8a8", "w4a4", "w4a4_g128"])
def test_quantized_tokens_are_the_values_calibration_uses(name: str) -> None:
    torch.manual_seed(1)
    scheme = parse_scheme(name)
    x = torch.randn(9, 192) * torch.logspace(-3, 3, 9)[:, None]
    codes, scales = reference.quantize_tokens(x, kernel_format(scheme).operand)
    if scheme.act_bits == 4:
        low, high = codes << 4, codes & 0xF0  # two a byte
        codes = torch.stack((low, high), -1).flatten(-2).view(torch.int8) // 16
    else:
        codes = codes.view(torch.float8_e4m3fn if scheme.fp8 else torch.int8)
    values = codes.float() * scales[:, None]
    torch.testing.assert_close(values, quantize_activations(x, scheme))


@pytest.mark.parametrize(
    ("problem", "said"),
    [
        ((3, 0, 0, 0), "expert 3 of 3"),
        ((0, 1, 0, 0), "weight stack 1 of 1"),
        ((0, 0, 2, 0), "entry 2 of 2"),
        ((0, 0, 0, 4), "multiple of 8"),
        ((0, 0, 0, 72), "output columns 72..136 of 128"),
    ],
)
def test_problems_out_of_range_are_refused(problem: tuple[int, int, int, int], said: str) -> None:
    weights = original_weights(torch.zeros(2, 64, 64, dtype=torch.bfloat16))
    with pytest.raises(UserError, match=said):
        launch.problem_table([(0, 0, 0, 0), problem], [weights], 3, 128, "cpu")


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> launch.GroupGemmKernel:
    """A kernel that must not be reached."""

    def fail(*_: object) -> None:
        raise AssertionError("launched")

    monkeypatch.setattr(launch, "load_kernel", lambda kernel: fail)
    monkeypatch.setattr(launch, "check_device", lambda tensor, name: None)
    return launch.GroupGemmKernel(HOPPER.config((W16A16,), "decode"))


def arguments(rows: int = 4, features: int = 64) -> dict:
    return {
        "activations": {"bf16": launch.Activations(torch.zeros(rows, features, dtype=torch.bfloat16))},
        "weights": [original_weights(torch.zeros(2, 64, 64, dtype=torch.bfloat16))],
        "problems": torch.zeros(2, 4, dtype=torch.int32),
        "offsets": torch.zeros(3, dtype=torch.int32),
        "out": torch.zeros(rows, 64, dtype=torch.bfloat16),
    }


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"out": torch.zeros(4, 64)}, "out: torch.float32"),
        ({"out": torch.zeros(64, 4, dtype=torch.bfloat16).T}, "contiguous"),
        ({"out": torch.zeros(4, 60, dtype=torch.bfloat16)}, "multiple of 8"),
        ({"problems": torch.zeros(200, 4, dtype=torch.int32)}, "at most 128"),
        ({"offsets": torch.zeros(3, dtype=torch.int64)}, "offsets: torch.int64"),
        ({"offsets": torch.zeros(1026, dtype=torch.int32)}, "1 to 1024 experts"),
        ({"activations": {}}, "this kernel takes"),
        ({"activations": {"bf16": launch.Activations(torch.zeros(4, 128, dtype=torch.bfloat16))}}, "expected"),
        ({"weights": []}, "this kernel takes w16a16"),
        (
            {"weights": [KernelWeights(W16A16, 2, 64, 64, torch.zeros(2, 64, 64), None)]},
            "w16a16 weights: torch.float32",
        ),
    ],
)
def test_what_a_launch_refuses(kernel: launch.GroupGemmKernel, changed: dict, said: str) -> None:
    with pytest.raises(UserError, match=said):
        kernel(**(arguments() | changed))


def test_a_good_launch_reaches_the_kernel(kernel: launch.GroupGemmKernel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel, "counters", lambda device: SimpleNamespace(of_current_stream=lambda: torch.zeros(2)))
    monkeypatch.setattr(launch, "processors", lambda device: 132)
    with pytest.raises(AssertionError, match="launched"):
        kernel(**arguments(), blocks=2)


def test_the_phase_follows_the_rows_of_an_expert() -> None:
    for by_warp in (True, False):
        limits = (4 * 60, 32 * 60)
        few, some = ([HOPPER.phase_for(limit + more, 60, 0, 44, 132, by_warp) for more in (0, 1)] for limit in limits)
        assert (few, some) == (["latency", "decode"], ["decode", "prefill"])


def test_decode_kernels_take_launches_that_just_need_a_second_round() -> None:
    """gate+up of Qwen1.5-MoE for one token: 4 experts, and 4 slices, of 44 strips of 64 rows; 132 multiprocessors."""
    for rows, slices, by_warp, expected in (
        (3, 0, False, "latency"),  # 132 tiles: one round
        (4, 0, False, "decode"),
        (4, 0, True, "latency"),  # tiles are cheaper
        (4, 4, False, "latency"),  # 352 tiles
        (5, 0, False, "latency"),  # 220 tiles
    ):
        assert HOPPER.phase_for(rows, 60, slices, 44, 132, by_warp) == expected


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_tensors_that_are_not_on_a_gpu_are_refused() -> None:
    with pytest.raises(UserError, match="run on a Hopper, A100, Ampere, Ada or consumer Blackwell GPU"):
        MoeLayer.__new__(MoeLayer)(*(torch.zeros(3, 2) for _ in range(3)))
    kernel = launch.GroupGemmKernel.__new__(launch.GroupGemmKernel)
    kernel.config = HOPPER.config((W16A16,), "decode")
    with pytest.raises(UserError, match="run on a Hopper, A100, Ampere, Ada or consumer Blackwell GPU"):
        kernel(**arguments())


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: Tile(W16A16, 24), "multiple of 16"),
        (lambda: Tile(W4A16, 16, 1), "1 or 2 groups"),
        (lambda: KernelConfig(()), "at least one tile"),
        (lambda: KernelConfig((Tile(W16A16, 16),), 100), "multiple of 32"),
        (lambda: KernelConfig((Tile(W16A16, 16),), 128, 3), "cluster is 3"),
        (
            lambda: KernelConfig((Tile(W16A16, 16), Tile(W16A16, 32, 1, 64))),
            "64 in all of them",
        ),
        (lambda: KernelConfig((Tile(W16A16, 16),), 128, 1, 2, 2), "4 warpgroups"),
        (lambda: KernelConfig((Tile(W16A16, 16, 1, 64),), 128, 1, 1, 4), "takes 8 tokens"),
        (lambda: KernelConfig((Tile(W4A16, 8, 4, 64),), 128, 1, 1, 4), "one group"),
        (lambda: KernelConfig((Tile(W4A16, 16, 4, 64),), 128, 1, 1, 4), "slots of one group"),
        (lambda: KernelConfig((Tile(W16A16, 256, 4),)), "has no room for two slots"),
    ],
)
def test_configurations_that_cannot_run_are_refused(make, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        make()


def test_the_command_compiles_what_a_mixture_needs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mxmoe_steps.kernels import build

    asked = []

    def fake(kernel: Configuration | build.TokenKernel, cache: Path | None) -> Path:
        asked.append(kernel)
        return tmp_path / f"{len(asked)}.so"

    monkeypatch.setattr(build, "build", fake)
    out = tmp_path / "kernels.json"
    monkeypatch.setattr("sys.argv", ["build", "--schemes", "w8a8_fp8", "w4a16", "w1a16", "--out", str(out)])
    build.main()
    record = json.loads(out.read_text())
    assert record["formats"] == ["w2a16_g128_asym", "w4a16_g128_asym", "w8a8_g-1_sym_fp8"]
    assert list(record["libraries"]) == sorted([*HOPPER.phases, *HOPPER.token_kernels])
    formats = tuple(kernel_format(parse_scheme(name)) for name in ("w8a8_fp8", "w4a16", "w1a16"))
    assert asked[: len(HOPPER.phases)] == [HOPPER.config(formats, phase) for phase in HOPPER.phases]


def test_architectures_of_one_target_have_token_kernels_of_their_own() -> None:
    from mxmoe_steps.kernels import build

    paths = {build.library_path(build.TokenKernel("quantize", one)) for one in BUILT}
    assert len(paths) == len(BUILT)
    assert len({one.target for one in BUILT}) < len(BUILT)


def test_importing_the_package_loads_neither_torch_nor_the_compiler() -> None:
    import subprocess
    import sys

    code = "import sys, mxmoe_steps.kernels.formats; sys.exit('torch' in sys.modules or 'cutlass' in sys.modules)"
    assert importlib.util.find_spec("torch") is not None
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
