"""What `measure` launches, with the reference in place of the kernels; on a GPU, that it measures."""

import math

import numpy as np
import pytest
import torch
from gpu_marks import HAS_KERNELS, RUN_HERE

from mxmoe_steps.kernels import reference
from mxmoe_steps.kernels.architecture import Architecture, Configuration
from mxmoe_steps.kernels.architectures import BUILT
from mxmoe_steps.kernels.formats import kernel_format
from mxmoe_steps.kernels.layouts import KernelWeights, quantized_weight
from mxmoe_steps.kernels.mma.architecture import ON_HOPPER
from mxmoe_steps.kernels.plan import plan_layer
from mxmoe_steps.kernels.sm90.architecture import HOPPER
from mxmoe_steps.schemes import ORIGINAL, SHARED, parse_scheme
from mxmoe_steps.timing import gpu
from mxmoe_steps.timing.launches import Launch
from mxmoe_steps.timing.sources import kernel_hashes

NAMES = ("w16a16", "w4a16_g128_asym", "w8a8_g-1_sym_fp8")
FORMATS = tuple(sorted(kernel_format(parse_scheme(name)) for name in NAMES))


class ReferenceKernel:
    """Takes what a compiled kernel takes; the reference quantizes tokens itself."""

    x: torch.Tensor

    def __init__(self, config: Configuration) -> None:
        self.config = config

    def __call__(self, activations, weights, problems, offsets, out) -> None:
        assert [weight.format for weight in weights] == list(self.config.formats)
        assert set(activations) == set(self.config.operands)
        assert len(problems) <= self.config.max_problems
        result = reference.group_gemm(
            self.x, offsets.tolist(), problems.tolist(), [plain(w) for w in weights], out.shape[1]
        )
        out.add_(result)


def plain(weights: KernelWeights):
    return weights.data if weights.format.original else quantized_weight(weights, parse_scheme(weights.format.name))


def small_launch() -> Launch:
    rows = np.repeat([3, 0, 17, 5, 9], 2)  # the last expert is a slice of a shared one
    names = tuple(NAMES[i % 3] for i in range(10))
    return Launch("problem", "small", "gate_up", 9, 64, 128, tuple(rows.tolist()), names, FORMATS, slices=1)


@pytest.mark.parametrize("architecture", [one for one in BUILT if "fp8" in one.operands], ids=lambda one: one.name)
def test_fused_and_apart_multiply_the_same(architecture: Architecture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "GroupGemmKernel", ReferenceKernel)
    launch = small_launch()
    jobs = [gpu.Job(launch, "decode"), gpu.Job(launch, "decode", apart=True)]
    bench = gpu.Bench(jobs, architecture, "cpu")
    monkeypatch.setattr(ReferenceKernel, "x", bench._tokens("bf16", sum(launch.expert_rows), launch.k).values, False)
    results = []
    for job in jobs:
        run = bench.prepare(job)
        assert all(isinstance(config, architecture.configuration) for config in bench._kernels)
        bench._out.zero_()
        run()
        results.append(bench._out.clone())
    assert results[0].isfinite().all()
    assert (results[0] != 0).float().mean() > 0.99
    assert torch.equal(*results)


def test_problems_run_in_the_order_of_a_layer() -> None:
    launch = small_launch()
    gate_up = [parse_scheme(name) for name in launch.schemes]
    schemes = {e if e < 4 else SHARED: (gate_up[2 * e], gate_up[2 * e + 1], ORIGINAL) for e in range(5)}
    problems = plan_layer(schemes, launch.k, launch.n, launch.n).gate_up.problems
    assert launch.order == tuple(2 * expert + column // launch.n for expert, _, _, column in problems)


def test_kernel_hashes_cover_what_the_generator_imports() -> None:
    assert {"codes.w4a16", "sm90.config", "sm90.group_gemm"} <= set(kernel_hashes(HOPPER))
    assert {"codes.w4a16", "mma.config", "mma.group_gemm"} <= set(kernel_hashes(ON_HOPPER))
    assert "launch" not in kernel_hashes(HOPPER)


@pytest.mark.gpu
@pytest.mark.skipif(not HAS_KERNELS, reason="needs a GPU with kernels")
@pytest.mark.parametrize("architecture", RUN_HERE, ids=lambda one: one.name)
def test_a_launch_is_measured(architecture: Architecture) -> None:
    jobs = [gpu.Job(small_launch(), "decode"), gpu.Job(small_launch(), "decode", apart=True)]
    times, clocks = gpu.Bench(jobs, architecture).measure(rounds=3, repeats=3)
    assert len(clocks) == 3
    assert all(len(us) == 3 and min(us) > 1 and max(us) < math.inf for us in times)
    assert np.median(times[0]) < np.median(times[1])  # one launch against three
