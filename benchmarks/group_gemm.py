"""Grouped GEMM times beside their floor and beside the peers in torch, in one process.

    python benchmarks/group_gemm.py --build            # compile what the benchmark loads; needs no GPU
    python benchmarks/group_gemm.py --out times.json   # measure; needs an H100
    python benchmarks/group_gemm.py --architectures "Hopper by mma.sync" Hopper    # kernels of other GPUs beside

One cell is the two grouped GEMMs of one MoE layer, gate_up [T*topk, H] x [E, 2I, H]^T and down
[T*topk, I] x [E, H, I]^T, times added; activation quantization, permutation and SwiGLU are not in it.
Traffic is skewed (Gumbel top-k over popularity 1/sqrt(rank)). All runs of a GEMM and number of tokens are captured in
CUDA graphs and visited in rounds in random order, L2 flushed before every replay; a time is the median over rounds.
Outputs are checked against float64 on a few experts. A row named after a scheme alone is of the kernels that a layer
picks; kernels of the GPU's second and further --architectures have its name behind their scheme.
The floor is max(operations / tensor rate, bytes / read rate) with the rates this GPU class reaches.
"""

import argparse
import json
import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch

from mxmoe_steps.kernels import reference
from mxmoe_steps.kernels.architecture import Architecture
from mxmoe_steps.kernels.architectures import BUILT, DEFAULT
from mxmoe_steps.kernels.build import build
from mxmoe_steps.kernels.codes.format import GROUP, HALF_ROWS, TILE_ROWS, Format
from mxmoe_steps.kernels.formats import kernel_format
from mxmoe_steps.kernels.launch import Activations, GroupGemmKernel, problem_table, processors
from mxmoe_steps.kernels.layouts import KernelWeights, kernel_weights, original_weights
from mxmoe_steps.quantizers.grid import E4M3, QuantizedWeight, from_e8m0, to_e8m0
from mxmoe_steps.schemes import Scheme, parse_scheme
from mxmoe_steps.timing.timer import Timer

TOKENS = (1, 16, 64, 256, 1024, 4096, 8192)
ROUNDS, REPEATS = 7, 3
SCHEMES = ("w16a16", "w8a8_fp8", "w8a8", "w8a16", "w4a16", "w4a8_fp8", "w4a8", "w3a16", "w2a16")
# Operations a second, measured on one H100, which makes int4 instructions of int8 ones
RATES = {"bf16": 801e12, "fp8": 1542e12, "int8": 1542e12, "int4": 1542e12}
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
        weight_bits = 8 * format_.chunk_bytes / (TILE_ROWS * GROUP)
        token_bytes = format_.act_bits / 8
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
    if scheme.floats is not None:
        scales = from_e8m0(to_e8m0(scales))
    zeros = None
    if not scheme.symmetric:
        middle = 2 ** (scheme.weight_bits - 1)
        zeros = (torch.rand(entries, n, groups, device="cuda") * 2 + middle - 1).bfloat16()
    codes = torch.randint(0, 2**scheme.weight_bits, (entries, n, k), device="cuda", dtype=torch.uint8)
    if scheme.fp8 and scheme.weight_bits == 8:
        codes = torch.randn(entries, n, k, device="cuda", dtype=torch.float16).to(E4M3)
    weight = QuantizedWeight(scheme, codes, scales, zeros)
    return weight, kernel_weights(weight)


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


def kernel_of(formats: tuple[Format, ...], phase: str, architecture: Architecture = DEFAULT) -> GroupGemmKernel:
    return GroupGemmKernel(architecture.config(formats, phase))


class Step:
    """What one forward step gives to a grouped GEMM, by operand type, and where it writes ``columns`` a row; all on the
    GPU."""

    def __init__(self, rows: list[int], columns: int, k: int, operands: set[str]) -> None:
        self.rows = rows
        self.x = torch.randn(sum(rows), k, dtype=torch.bfloat16, device="cuda") * 0.5
        self.given = {"bf16": Activations(self.x)}
        for operand in operands - {"bf16"}:
            self.given[operand] = Activations(*reference.quantize_tokens(self.x, operand))
        self.offsets = offsets_of(rows)
        self.out = torch.empty(sum(rows), columns, dtype=torch.bfloat16, device="cuda")


def our_runs(
    architecture: Architecture, packed: KernelWeights, step: Step, table: torch.Tensor
) -> dict[str, Callable[[], object]]:
    """Our kernels on one grouped GEMM, by phase."""
    format_ = packed.format
    given = {format_.operand: step.given[format_.operand]}
    kernels = {phase: kernel_of((format_,), phase, architecture) for phase in architecture.phases}
    return {phase: partial(kernel, given, [packed], table, step.offsets, step.out) for phase, kernel in kernels.items()}


def torch_runs(
    weight: torch.Tensor, weight8: torch.Tensor, weight_scales: torch.Tensor, step: Step
) -> dict[str, tuple[Format, Callable[[], object]]]:
    """torch's grouped GEMMs (bf16; fp8 with row scales) and a cuBLAS loop over experts."""
    ends = step.offsets[1:]
    starts = step.offsets.tolist()
    x8 = step.given["fp8"].values.view(E4M3)
    active = [expert for expert, number in enumerate(step.rows) if number]

    def loop() -> None:
        for expert in active:
            part = slice(starts[expert], starts[expert + 1])
            torch.mm(step.x[part], weight[expert].T, out=step.out[part])

    bf16, fp8 = (kernel_format(parse_scheme(name)) for name in ("w16a16", "w8a8_fp8"))
    return {
        "torch grouped_mm": (bf16, lambda: torch._grouped_mm(step.x, weight.transpose(1, 2), offs=ends)),
        "cublas loop": (bf16, loop),
        "torch scaled_grouped_mm": (
            fp8,
            lambda: torch._scaled_grouped_mm(
                x8, weight8.transpose(1, 2), step.given["fp8"].scales, weight_scales, offs=ends,
                out_dtype=torch.bfloat16, use_fast_accum=True,
            ),
        ),
    }  # fmt: skip


def measure_gemm(
    timer: Timer,
    architectures: list[Architecture],
    schemes: list[Scheme],
    workload: Workload,
    gemm: str,
    tokens: tuple[int, ...],
    peers: bool,
) -> list[dict[str, Any]]:
    """Our kernels and torch's on one grouped GEMM over the token counts; all runs of a count take turns."""
    n, k = workload.gemms[gemm]
    made = [random_weights(scheme, workload.experts, n, k) for scheme in schemes]
    operands = {packed.format.operand for _, packed in made}
    if peers:
        dense = torch.empty(workload.experts, n, k, dtype=torch.bfloat16, device="cuda").normal_(std=0.02)
        dense8, dense_scales = dense.to(E4M3), torch.rand(workload.experts, n, device="cuda") * 0.01 + 0.005
        operands.add("fp8")
    problems = [(expert, 0, expert, 0) for expert in range(workload.experts)]
    sms = processors(torch.device("cuda"))
    cells = []
    for count in tokens:
        step = Step(workload.routing(count), n, k, operands)
        runs: dict[tuple[str, str], Callable[[], object]] = {}
        formats, errors, graphs, makers = {}, {}, {}, {}
        for (scheme, (weight, packed)), architecture in product(zip(schemes, made, strict=True), architectures):
            if packed.format.operand not in architecture.operands:
                continue
            table = problem_table(problems, [packed], workload.experts, n, "cuda")
            name = scheme.name if architecture is architectures[0] else f"{scheme.name} {architecture.name}"
            formats[name], makers[name] = packed.format, architecture
            for phase, run in our_runs(architecture, packed, step, table).items():
                step.out.fill_(math.nan)
                graphs[name, phase] = timer.capture(run)
                errors[name, phase] = error_of(step.out, step.x, weight, step.rows)
                runs[name, phase] = run
        for name, (format_, run) in torch_runs(dense, dense8, dense_scales, step).items() if peers else ():
            formats[name] = format_
            try:
                graphs[name, ""] = timer.capture(run)
                runs[name, ""] = run  # graphs do not keep alive what they read
            except RuntimeError as error:
                print(f"{name} T={count}: {str(error).splitlines()[0]}", flush=True)
        taken = list(timer.rounds(graphs, ROUNDS, REPEATS))
        for name, phase in graphs:
            us = [one[name, phase] for one in taken]
            rows = sum(step.rows)
            maker = makers.get(name, DEFAULT)
            picked = maker.phase_for(rows, workload.experts, 0, n // HALF_ROWS, sms, maker.by_warp((formats[name],)))
            cells.append({
                "workload": workload.name, "gemm": gemm, "run": name, "phase": phase, "picked": phase in ("", picked),
                "T": count, "us": statistics.median(us), "spread": (max(us) - min(us)) / statistics.median(us),
                "floor_us": floor_us([formats[name]], [step.rows], n, k), "error": errors.get((name, phase), 0.0),
            })  # fmt: skip
    return cells


def table_of(cells: list[dict[str, Any]]) -> dict[str, dict[int, tuple[float, float, float]]]:
    """Microseconds, floor and worst error of a layer's two launches, by run and tokens.

    ``NAME PHASE``: both with the kernel of that phase; ``NAME``: each with the kernel that a layer picks.
    """
    found: dict[str, dict[int, list[dict[str, Any]]]] = {}
    for cell in (cell for cell in cells if cell["phase"]):
        found.setdefault(f"{cell['run']} {cell['phase']}", {}).setdefault(cell["T"], []).append(cell)
    for cell in (cell for cell in cells if cell["picked"]):
        found.setdefault(cell["run"], {}).setdefault(cell["T"], []).append(cell)
    return {
        run: {
            count: (sum(c["us"] for c in both), sum(c["floor_us"] for c in both), max(c["error"] for c in both))
            for count, both in mine.items()
            if len(both) == len({cell["gemm"] for cell in cells})
        }
        for run, mine in found.items()
    }


def print_table(name: str, cells: list[dict[str, Any]], tokens: tuple[int, ...]) -> None:
    """One row per run, gate_up + down: microseconds / multiple of the floor, and the worst error."""
    print(f"{name}: us / x floor".ljust(48) + "".join(f"{count:>14}" for count in tokens) + "   worst error")
    for run, mine in table_of(cells).items():
        texts = [
            f"{us:.1f}/{us / floor:.2f}" if us else "-" for us, floor, _ in (mine.get(T, (0, 1, 0)) for T in tokens)
        ]
        worst = max(error for *_, error in mine.values())
        print(f"{run:<48}" + "".join(f"{text:>14}" for text in texts) + f"   {worst:.1e}", flush=True)


def print_means(cells: list[dict[str, Any]], tokens: tuple[int, ...]) -> None:
    """Geometric means over workloads and ranges of tokens of time / floor, with the kernels that a layer picks."""
    names = dict.fromkeys(cell["workload"] for cell in cells)
    tables = [table_of([cell for cell in cells if cell["workload"] == name]) for name in names]
    ranges = [[T for T in tokens if low <= T <= high] for low, high in ((1, 1), (2, 1023), (1024, 1 << 30))]
    heads = "".join(f"{', '.join(map(str, some)) or '-':>20}" for some in ranges)
    print("time / floor, geometric means".ljust(48) + heads)
    for run in dict.fromkeys(cell["run"] for cell in cells):
        texts = []
        for some in ranges:
            pairs = [table[run][count] for table in tables for count in some if count in table[run]]
            mean = f"{statistics.geometric_mean(us / floor for us, floor, _ in pairs):.3f}" if pairs else "-"
            texts.append(f"{mean:>20}")
        print(f"{run:<48}" + "".join(texts), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--build", action="store_true", help="compile the kernels and stop")
    parser.add_argument("--schemes", nargs="*", default=list(SCHEMES))
    parser.add_argument("--architectures", nargs="*", default=[DEFAULT.name], choices=[one.name for one in BUILT])
    parser.add_argument("--workloads", nargs="*", default=[workload.name for workload in WORKLOADS])
    parser.add_argument("--tokens", nargs="*", type=int, default=list(TOKENS))
    parser.add_argument("--no-peers", action="store_true")
    parser.add_argument("--out", type=Path, help="write every cell as JSON")
    arguments = parser.parse_args()
    schemes = [parse_scheme(name) for name in arguments.schemes]
    by_name = {one.name: one for one in BUILT}
    architectures = [by_name[name] for name in arguments.architectures]
    if arguments.build:
        for architecture, scheme in product(architectures, schemes):
            if kernel_format(scheme).operand in architecture.operands:
                for phase in architecture.phases:
                    config = architecture.config((kernel_format(scheme),), phase)
                    print(build(config), architecture.name, scheme, phase, flush=True)
        return
    torch.manual_seed(0)
    timer, tokens = Timer(), tuple(arguments.tokens)
    print(torch.cuda.get_device_name(), "torch", torch.__version__, flush=True)
    everything: list[dict[str, Any]] = []
    for workload in (w for w in WORKLOADS if w.name in arguments.workloads):
        cells: list[dict[str, Any]] = []
        for gemm in workload.gemms:
            cells += measure_gemm(timer, architectures, schemes, workload, gemm, tokens, not arguments.no_peers)
            torch.cuda.empty_cache()
        print_table(workload.name, cells, tokens)
        everything += cells
        if arguments.out:
            arguments.out.write_text(json.dumps(everything, indent=1))
    print_means(everything, tokens)


if __name__ == "__main__":
    main()
