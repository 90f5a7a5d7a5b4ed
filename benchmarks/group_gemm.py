"""Grouped GEMM times beside their floor and beside the peers in torch, in one process.

    python benchmarks/group_gemm.py --build            # compile what the benchmark loads; needs no GPU
    python benchmarks/group_gemm.py --out times.json   # measure; needs an H100

One cell is the two grouped GEMMs of one MoE layer, gate_up [T*topk, H] x [E, 2I, H]^T and down
[T*topk, I] x [E, H, I]^T, times added; activation quantization, permutation and SwiGLU are not in it.
Traffic is skewed (Gumbel top-k over popularity 1/sqrt(rank)). Each time is the median over CUDA-graph
replays with the L2 cache flushed before each; outputs are checked against float64 on a few experts.
The floor is max(operations / tensor rate, bytes / read rate) with the rates this GPU class reaches.
"""

import argparse
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from mxmoe_steps.kernels import reference
from mxmoe_steps.kernels.build import build
from mxmoe_steps.kernels.formats import PHASES, Format, default_config, kernel_format
from mxmoe_steps.kernels.launch import Activations, GroupGemmKernel, problem_table
from mxmoe_steps.kernels.layouts import KernelWeights, kernel_weights, original_weights
from mxmoe_steps.quantizers.grid import E4M3, QuantizedWeight
from mxmoe_steps.schemes import Scheme, parse_scheme
from mxmoe_steps.timing.timer import Timer

TOKENS = (1, 16, 64, 256, 1024, 4096, 8192)
SCHEMES = ("w16a16", "w8a8_fp8", "w8a8", "w8a16", "w4a16", "w4a8_fp8", "w4a8", "w3a16", "w2a16")
RATES = {"bf16": 801e12, "fp8": 1542e12, "int8": 1542e12}  # operations a second, measured on one H100
READ_BYTES = 3.04e12  # a second


@dataclass(frozen=True)
class Workload:
    name: str
    experts: int
    top_k: int
    hidden: int
    intermediate: int

    def choices(self, tokens: int) -> torch.Tensor:
        """Experts of every token, int64 [tokens, top_k]."""
        rank = torch.randperm(self.experts, generator=torch.Generator().manual_seed(7 + self.experts)) + 1
        logits = -0.5 * rank.double().log()
        u = torch.rand(
            tokens, self.experts, dtype=torch.float64, generator=torch.Generator().manual_seed(1000 + tokens)
        )
        return (logits - (-u.clamp(1e-12, 1 - 1e-12).log()).log()).topk(self.top_k, dim=1).indices

    def routing(self, tokens: int) -> list[int]:
        """Rows of each expert."""
        return torch.bincount(self.choices(tokens).flatten(), minlength=self.experts).tolist()

    @property
    def gemms(self) -> dict[str, tuple[int, int]]:
        """(N, K) of the layer's two grouped GEMMs."""
        return {"gate_up": (2 * self.intermediate, self.hidden), "down": (self.hidden, self.intermediate)}


WORKLOADS = (
    Workload("qwen1.5-moe", 60, 4, 2048, 1408),
    Workload("deepseek-v2-lite", 64, 6, 2048, 1408),
    Workload("mixtral-8x7b", 8, 2, 4096, 14336),
)


def floor_us(formats: list[Format], rows: list[list[int]], n: int, k: int) -> float:
    """Time floor of one grouped GEMM whose experts have ``rows[i]`` tokens under ``formats[i]``.

    Arithmetic at each format's rate, or memory: active experts' weights once, activations in, outputs out.
    """
    arithmetic = memory = 0.0
    for format_, counts in zip(formats, rows, strict=True):
        total, active = sum(counts), sum(count > 0 for count in counts)
        weight_bits = format_.bits + (16 * (1 + format_.zeros) / 128 if format_.grouped else 0)
        token_bytes = 2 if format_.operand == "bf16" else 1
        arithmetic += 2 * total * n * k / RATES[format_.operand]
        memory += (active * n * k * weight_bits / 8 + total * (k * token_bytes + n * 2)) / READ_BYTES
    return max(arithmetic, memory) * 1e6


def random_weights(
    scheme: Scheme, entries: int, n: int, k: int
) -> tuple[QuantizedWeight | torch.Tensor, KernelWeights]:
    """Random codes of ``scheme`` with plausible scales, as stored and in kernel order, on the GPU."""
    if scheme.is_original:
        dense = torch.empty(entries, n, k, dtype=torch.bfloat16, device="cuda").normal_(std=0.02)
        return dense, original_weights(dense)
    groups = k // scheme.group_size(k)
    scales = (torch.rand(entries, n, groups, device="cuda") * 0.01 + 0.005).bfloat16()
    zeros = None
    if not scheme.symmetric:
        middle = 2 ** (scheme.weight_bits - 1)
        zeros = (torch.rand(entries, n, groups, device="cuda") * 2 + middle - 1).bfloat16()
    codes = torch.randint(0, 2**scheme.weight_bits, (entries, n, k), device="cuda", dtype=torch.uint8)
    if scheme.fp8 and scheme.weight_bits == 8:
        codes = torch.randn(entries, n, k, device="cuda", dtype=torch.float16).to(E4M3)
    weight = QuantizedWeight(scheme, codes, scales, zeros)
    return weight, kernel_weights(weight)


def activations(rows: int, k: int, operand: str) -> tuple[torch.Tensor, Activations]:
    x = torch.randn(rows, k, device="cuda", dtype=torch.bfloat16) * 0.5
    return x, Activations(x) if operand == "bf16" else Activations(*reference.quantize_tokens(x, operand))


def offsets_of(rows: list[int]) -> torch.Tensor:
    return torch.tensor([0, *rows], device="cuda").cumsum(0).int()


def error_of(
    out: torch.Tensor,
    x: torch.Tensor,
    weight: QuantizedWeight | torch.Tensor,
    rows: list[int],
) -> float:
    """Relative error of the busiest, the median and the least busy active expert of ``rows``."""
    active = sorted((count, expert) for expert, count in enumerate(rows) if count)
    if not active:
        return 0.0
    starts = [0, *torch.tensor(rows).cumsum(0).tolist()]
    worst = 0.0
    for _, expert in {active[0], active[len(active) // 2], active[-1]}:
        part = slice(starts[expert], starts[expert] + min(rows[expert], 300))
        one = weight[expert : expert + 1] if isinstance(weight, torch.Tensor) else QuantizedWeight(
            weight.scheme, weight.codes[expert : expert + 1], weight.scales[expert : expert + 1],
            None if weight.zeros is None else weight.zeros[expert : expert + 1],
        )  # fmt: skip
        count = part.stop - part.start
        exact = reference.group_gemm(x[part], [0, count], [(0, 0, 0, 0)], [one], out.shape[1], torch.float64)
        worst = max(worst, ((out[part].double() - exact).norm() / exact.norm()).item())
    return worst


def kernel_of(formats: tuple[Format, ...], phase: str) -> GroupGemmKernel:
    return GroupGemmKernel(default_config(formats, phase))


def measure_gemm(
    timer: Timer, scheme: Scheme, workload: Workload, n: int, k: int, tokens: tuple[int, ...]
) -> list[dict]:
    """Our kernels on one grouped GEMM over the token counts."""
    format_ = kernel_format(scheme)
    weight, packed = random_weights(scheme, workload.experts, n, k)
    table = problem_table([(e, 0, e, 0) for e in range(workload.experts)], [packed], workload.experts, n, "cuda")
    cells = []
    for count in tokens:
        rows = workload.routing(count)
        x, given = activations(sum(rows), k, format_.operand)
        offsets = offsets_of(rows)
        out = torch.empty(sum(rows), n, dtype=torch.bfloat16, device="cuda")
        for phase in PHASES:
            kernel = kernel_of((format_,), phase)
            out.fill_(math.nan)
            us = timer(lambda: kernel({format_.operand: given}, [packed], table, offsets, out))  # noqa: B023
            error = error_of(out, x, weight, rows)
            floor = floor_us([format_], [rows], n, k)
            cells.append({"run": f"{scheme.name} {phase}", "T": count, "us": us, "floor_us": floor, "error": error})
    return cells


def measure_peers(timer: Timer, workload: Workload, n: int, k: int, tokens: tuple[int, ...]) -> list[dict]:
    """torch's grouped GEMMs (bf16; fp8 with row scales) and a cuBLAS loop over experts."""
    weight = torch.empty(workload.experts, n, k, dtype=torch.bfloat16, device="cuda").normal_(std=0.02)
    weight8 = weight.to(E4M3)
    weight_scales = torch.rand(workload.experts, n, device="cuda") * 0.01 + 0.005
    cells = []
    for count in tokens:
        rows = workload.routing(count)
        ends = offsets_of(rows)[1:]
        starts = [0, *torch.tensor(rows).cumsum(0).tolist()]
        x, _ = activations(sum(rows), k, "bf16")
        bits, x_scales = reference.quantize_tokens(x, "fp8")
        x8 = bits.view(E4M3)
        out = torch.empty(sum(rows), n, dtype=torch.bfloat16, device="cuda")
        active = [expert for expert, number in enumerate(rows) if number]

        def loop() -> None:
            for expert in active:  # noqa: B023
                part = slice(starts[expert], starts[expert + 1])  # noqa: B023
                torch.mm(x[part], weight[expert].T, out=out[part])  # noqa: B023

        runs: dict[str, tuple[str, Callable[[], object]]] = {
            "torch grouped_mm": ("bf16", lambda: torch._grouped_mm(x, weight.transpose(1, 2), offs=ends)),  # noqa: B023
            "cublas loop": ("bf16", loop),
            "torch scaled_grouped_mm": (
                "fp8",
                lambda: torch._scaled_grouped_mm(
                    x8, weight8.transpose(1, 2), x_scales, weight_scales, offs=ends,  # noqa: B023
                    out_dtype=torch.bfloat16, use_fast_accum=True,
                ),
            ),
        }  # fmt: skip
        for name, (operand, run) in runs.items():
            format_ = Format("bf16", 16) if operand == "bf16" else Format("fp8", 8)
            cell = {"run": name, "T": count, "floor_us": floor_us([format_], [rows], n, k), "error": 0.0}
            try:
                cells.append(cell | {"us": timer(run)})
            except RuntimeError as error:
                print(f"{name} T={count}: {str(error).splitlines()[0]}", flush=True)
    return cells


def print_table(workload: Workload, cells: list[dict], tokens: tuple[int, ...]) -> None:
    """One row per run, gate_up + down: microseconds / multiple of the floor, and the worst error."""
    print(f"{workload.name}: us / x floor" + "".join(f"{count:>14}" for count in tokens) + "   worst error")
    for run in dict.fromkeys(cell["run"] for cell in cells):
        text, worst = "", 0.0
        for count in tokens:
            mine = [cell for cell in cells if cell["run"] == run and cell["T"] == count]
            if len(mine) < len(workload.gemms):
                text += f"{'-':>14}"
                continue
            us, floor = sum(cell["us"] for cell in mine), sum(cell["floor_us"] for cell in mine)
            worst = max(worst, *(cell["error"] for cell in mine))
            text += f"{f'{us:.1f}/{us / floor:.2f}':>14}"
        print(f"{run:<34}{text}   {worst:.1e}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--build", action="store_true", help="compile the kernels and stop")
    parser.add_argument("--schemes", nargs="*", default=list(SCHEMES))
    parser.add_argument("--workloads", nargs="*", default=[workload.name for workload in WORKLOADS])
    parser.add_argument("--tokens", nargs="*", type=int, default=list(TOKENS))
    parser.add_argument("--no-peers", action="store_true")
    parser.add_argument("--out", type=Path, help="write every cell as JSON")
    arguments = parser.parse_args()
    schemes = [parse_scheme(name) for name in arguments.schemes]
    if arguments.build:
        for scheme in schemes:
            for phase in PHASES:
                print(build(default_config((kernel_format(scheme),), phase)), scheme, phase)
        return
    torch.manual_seed(0)
    timer, tokens = Timer(), tuple(arguments.tokens)
    print(torch.cuda.get_device_name(), "torch", torch.__version__, flush=True)
    everything = []
    for workload in (w for w in WORKLOADS if w.name in arguments.workloads):
        cells: list[dict] = []
        for gemm, (n, k) in workload.gemms.items():
            for scheme in schemes:
                cells += [cell | {"gemm": gemm} for cell in measure_gemm(timer, scheme, workload, n, k, tokens)]
                torch.cuda.empty_cache()
            if not arguments.no_peers:
                cells += [cell | {"gemm": gemm} for cell in measure_peers(timer, workload, n, k, tokens)]
                torch.cuda.empty_cache()
        print_table(workload, cells, tokens)
        everything += [cell | {"workload": workload.name} for cell in cells]
        if arguments.out:
            arguments.out.write_text(json.dumps(everything, indent=1))


if __name__ == "__main__":
    main()
