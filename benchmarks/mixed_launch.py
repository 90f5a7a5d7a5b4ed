"""Allocations as the solver makes them: one fused launch beside one launch per scheme and beside uniform precisions.

    python benchmarks/mixed_launch.py --solve           # write mixed_allocations.json; minutes, needs no GPU
    python benchmarks/mixed_launch.py --build           # compile what the measurement loads; needs no GPU
    python benchmarks/mixed_launch.py --out times.json  # measure; needs an H100

One cell is the two grouped GEMMs of a layer, times added; activation quantization, permutation and SwiGLU are not in
it. Workloads and routing as in group_gemm.py; "+shared" has the model's shared expert in the same launches. Allocations
as in mixed_allocations.py: their losses are made up. Every allocation runs

    fused               one launch in the plan's order of problems: the shared expert and every scheme spread out
    heaviest first      the same, problems sorted by their longest tile's predicted time
    apart               one launch per scheme, back to back
    streams             one launch per scheme, each with a full grid, on parallel streams
    streams, SMs split  the same, grids in proportion to predicted work

All variants of a (workload, tokens) are captured in CUDA graphs and then visited in rounds in random order, L2 flushed
before every replay. A time is the median over rounds of gate_up + down, with the faster of the kernels that serve
different numbers of tokens. What the graphs write is checked against float64.
"""

import argparse
import json
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from group_gemm import REPEATS, ROUNDS, Step, kernel_of, random_weights, torch_runs
from mixed_allocations import BUDGETS, CASES, FILE, TOKENS, Allocation, Case, read_allocations, solve

from mxmoe_steps.kernels import reference
from mxmoe_steps.kernels.architecture import Architecture
from mxmoe_steps.kernels.architectures import BUILT, DEFAULT
from mxmoe_steps.kernels.build import build
from mxmoe_steps.kernels.codes.format import TILE_ROWS, Format
from mxmoe_steps.kernels.formats import kernel_format
from mxmoe_steps.kernels.launch import Activations, GroupGemmKernel, problem_table, processors
from mxmoe_steps.kernels.layouts import KernelWeights
from mxmoe_steps.schemes import Scheme, parse_scheme
from mxmoe_steps.timing.model import block_work
from mxmoe_steps.timing.timer import Timer

VARIANTS = ("fused", "heaviest first", "apart", "streams", "streams, SMs split")
CHECKED_ROWS = 300  # of a problem
MOST_ERROR = 5e-3  # docs/measurements/accuracy.md: fp8 sums over K = 14336 are off by 3.6e-3
REFERENCE = ("qwen1.5-moe+shared", "hot", {512: 379, 1024: 453, 8192: 2677})  # us; MxMoE's kernels, rebuilt for H100

Problem = tuple[int, Format, int]  # expert, format, output column


def build_all(architecture: Architecture, allocations: Sequence[Allocation]) -> None:
    """Compile every mixture and each of its formats alone, for every phase."""
    launches = [launch for a in allocations for launch in (a.plan.gate_up, a.plan.down)]
    groups = {launch.formats: None for launch in launches}
    groups |= {(format_,): None for group in groups for format_ in group}
    sizes = []
    for config in (architecture.config(group, phase) for group in groups for phase in architecture.phases):
        library = build(config)
        sizes.append(library.stat().st_size)
        print(f"{library} {sizes[-1] / 2**20:.2f} MiB {config.name}", flush=True)
    print(f"{len(sizes)} kernels, {sum(sizes) / 2**20:.1f} MiB")


@dataclass(frozen=True)
class Call:
    """One launch."""

    kernel: GroupGemmKernel
    given: dict[str, Activations]
    weights: list[KernelWeights]
    table: torch.Tensor
    offsets: torch.Tensor
    out: torch.Tensor

    def __call__(self, blocks: int | None = None) -> None:
        self.kernel(self.given, self.weights, self.table, self.offsets, self.out, blocks)


class Gemm:
    """One of a case's two grouped GEMMs: random weights of every block under every scheme."""

    def __init__(self, case: Case, name: str, schemes: Sequence[Scheme]) -> None:
        self.blocks = 2 if name == "gate_up" else 1  # of an expert; entry ``expert * blocks + block`` of every stack
        columns, self.k = case.workload.gemms[name]
        self.n = columns // self.blocks
        made = {
            kernel_format(s): random_weights(s, case.experts * self.blocks, self.n, self.k) for s in sorted(schemes)
        }
        self.stored = {format_: stored for format_, (stored, _) in made.items()}
        self.packed = {format_: packed for format_, (_, packed) in made.items()}


class GemmStep(Step):
    """What one forward step gives to a `Gemm`, and where it writes."""

    def __init__(self, architecture: Architecture, gemm: Gemm, rows: list[int]) -> None:
        super().__init__(rows, gemm.n * gemm.blocks, gemm.k, {format_.operand for format_ in gemm.packed})
        self.architecture, self.gemm = architecture, gemm

    def entry(self, problem: Problem) -> int:
        """Place in a stack."""
        expert, _, column = problem
        return expert * self.gemm.blocks + column // self.gemm.n

    def call(self, problems: Sequence[Problem], phase: str) -> Call:
        """The launch of ``problems``, in this order, by the kernel of their formats."""
        formats = tuple(sorted({format_ for _, format_, _ in problems}))
        kernel = kernel_of(formats, phase, self.architecture)
        weights = [self.gemm.packed[format_] for format_ in formats]
        placed = [(p[0], formats.index(p[1]), self.entry(p), p[2]) for p in problems]
        table = problem_table(placed, weights, len(self.rows), self.out.shape[1], "cuda")
        given = {operand: self.given[operand] for operand in kernel.config.operands}
        return Call(kernel, given, weights, table, self.offsets, self.out)

    def samples(self, problems: Sequence[Problem]) -> list[tuple[slice, slice, torch.Tensor]]:
        """Rows, columns and float64 products of each format's busiest and least busy problem."""
        starts, found = np.cumsum([0, *self.rows]).tolist(), []
        for format_ in sorted({format_ for _, format_, _ in problems}):
            active = sorted((p for p in problems if p[1] == format_ and self.rows[p[0]]), key=lambda p: self.rows[p[0]])
            for problem in {active[0], active[-1]} if active else ():
                expert, _, column = problem
                count = min(self.rows[expert], CHECKED_ROWS)
                rows = slice(starts[expert + 1] - count, starts[expert + 1])
                weight = self.gemm.stored[format_][self.entry(problem)][None]
                exact = reference.group_gemm(
                    self.x[rows], [0, count], [(0, 0, 0, 0)], [weight], self.gemm.n, torch.float64
                )
                found.append((rows, slice(column, column + self.gemm.n), exact))
        return found

    def error(self, samples: Sequence[tuple[slice, slice, torch.Tensor]]) -> float:
        """Worst relative error of the samples in ``out``; infinite if something was not written."""
        if self.out.isnan().any():
            return math.inf
        errors = [(self.out[rows, columns].double() - exact).norm() / exact.norm() for rows, columns, exact in samples]
        return torch.stack(errors).max().item()


def variants(
    step: GemmStep,
    problems: Sequence[Problem],
    tiles: dict[str, np.ndarray],
    phase: str,
    streams: list[torch.cuda.Stream],
) -> dict[str, Callable[[], object]]:
    """The ways to run ``problems``, given in the plan's order; with one scheme there is only one."""
    formats = sorted({format_ for _, format_, _ in problems})
    if len(formats) == 1:
        return {"fused": step.call(problems, phase)}
    parts = [[p for p in problems if p[1] == format_] for format_ in formats]
    calls = [step.call(part, phase) for part in parts]
    n, k = np.array([step.gemm.n]), np.array([step.gemm.k])
    predicted = {p: block_work(np.array([[step.rows[p[0]]]]), n, k, tiles[p[1].name], 0.0, TILE_ROWS) for p in problems}
    work = np.array([sum(predicted[p][0].item() for p in part) for part in parts])
    sms = processors(torch.device("cuda"))
    split = [  # as if an SM took two blocks of one kernel first; where it spreads them, others wait
        max(1, round(float(sms * share))) * call.kernel.config.blocks_per_sm
        for share, call in zip(work / work.sum(), calls, strict=True)
    ]
    heaviest = sorted(problems, key=lambda p: (-predicted[p][1].item(), p[0], p[2]))

    def apart() -> None:
        for call in calls:
            call()

    def side_by_side(blocks: Sequence[int | None]) -> None:
        current, mine = torch.cuda.current_stream(), streams[: len(calls)]
        for call, stream, count in zip(calls, mine, blocks, strict=True):
            stream.wait_stream(current)
            with torch.cuda.stream(stream):
                call(count)
        for stream in mine:
            current.wait_stream(stream)

    return {
        "fused": step.call(problems, phase),
        "heaviest first": step.call(heaviest, phase),
        "apart": apart,
        "streams": lambda: side_by_side([None] * len(calls)),
        "streams, SMs split": lambda: side_by_side(split),
    }


def torch_calls(step: GemmStep) -> dict[str, Callable[[], object]]:
    """torch's grouped GEMMs, gate and up as one matrix."""
    gemm, experts = step.gemm, len(step.rows)
    if "fp8" not in step.given:
        return {}
    dense, fp8 = (gemm.stored[kernel_format(parse_scheme(name))] for name in ("w16a16", "w8a8_fp8"))
    weight, weight8 = (each.view(experts, -1, gemm.k) for each in (dense, fp8.codes))
    runs = torch_runs(weight, weight8, fp8.scales.float().view(experts, -1), step)
    return {name: run for name, (_, run) in runs.items() if name.startswith("torch")}


def measure(
    timer: Timer,
    architecture: Architecture,
    gemms: dict[str, Gemm],
    allocations: Sequence[Allocation],
    streams: list[torch.cuda.Stream],
) -> list[dict[str, Any]]:
    """All variants of the allocations of one case and number of tokens."""
    case, tokens = allocations[0].case, allocations[0].tokens
    graphs: dict[tuple[str, ...], torch.cuda.CUDAGraph] = {}
    errors: dict[tuple[str, ...], float] = {}
    kept: list[Callable[[], object]] = []  # graphs do not keep alive what they read
    for gemm_name, gemm in gemms.items():
        step = GemmStep(architecture, gemm, case.rows(tokens))
        for allocation in allocations:
            launch = getattr(allocation.plan, gemm_name)
            halves = (0, gemm.n) if launch.gated else (0,)  # gate and up apart: SwiGLU is not in it
            problems = [
                (expert, launch.formats[number], column + half)
                for expert, number, _, column in launch.problems
                for half in halves
            ]
            samples = step.samples(problems)
            for phase in architecture.phases:
                for variant, run in variants(step, problems, allocation.tiles, phase, streams).items():
                    key = (allocation.name, variant, phase, gemm_name)
                    graphs[key] = timer.capture(run)
                    step.out.fill_(math.nan)
                    graphs[key].replay()
                    errors[key] = step.error(samples)
                    kept.append(run)
        for name, run in torch_calls(step).items():
            try:
                graphs[name, "fused", "", gemm_name] = timer.capture(run)
                kept.append(run)
            except RuntimeError as error:
                print(f"{name} T={tokens}: {str(error).splitlines()[0]}", flush=True)
    for key, error in errors.items():
        if not error < MOST_ERROR:  # NaN too
            print(f"WRONG RESULT: {case.name} T={tokens} {key}: error {error:.1e}", flush=True)
    taken = list(timer.rounds(graphs, ROUNDS, REPEATS))
    times = {key: [one[key] for one in taken] for key in graphs}
    cells = []
    for name, variant, phase in dict.fromkeys(key[:3] for key in times):
        both = [  # a launch of one scheme has no variants
            key if key in times else (name, "fused", phase, key[3])
            for key in ((name, variant, phase, gemm) for gemm in gemms)
        ]
        if not all(key in times for key in both):
            continue
        us = [sum(pair) for pair in zip(*(times[key] for key in both), strict=True)]
        cells.append({
            "case": case.name, "T": tokens, "allocation": name, "variant": variant, "phase": phase,
            "us": statistics.median(us), "spread": (max(us) - min(us)) / statistics.median(us),
            "gemms_us": [statistics.median(times[key]) for key in both],
            "error": max(errors.get(key, 0.0) for key in both),
        })  # fmt: skip
    return cells


def print_tables(case: Case, allocations: Sequence[Allocation], cells: Sequence[dict[str, Any]]) -> None:
    """Uniform precisions and torch, then every mixed allocation beside them."""
    tokens = sorted({cell["T"] for cell in cells})
    best: dict[tuple[str, str, int], dict[str, Any]] = {}
    for cell in sorted(cells, key=lambda cell: -cell["us"]):
        best[cell["allocation"], cell["variant"], cell["T"]] = cell  # the fastest kernel comes last
    by_name = {(a.name, a.tokens): a for a in allocations}
    uniforms = list(dict.fromkeys(a.name for a in allocations if len(set(a.schemes)) == 1))

    def line(label: str, texts: Sequence[str]) -> None:
        print(f"{label:<32}" + "".join(f"{text:>20}" for text in texts), flush=True)

    line(f"\n{case.name}: us (predicted)", [str(count) for count in tokens])
    for name in dict.fromkeys(a.name for a in allocations):
        mine = [by_name[name, count] for count in tokens]
        us = [best[name, "fused", count]["us"] for count in tokens]
        label = f"{name}, {mine[0].bits:.3f} bits" if name in uniforms else f"{name} fused"
        line(label, [f"{value:.1f} ({a.predicted_us:.1f})" for value, a in zip(us, mine, strict=True)])
    for name in dict.fromkeys(cell["allocation"] for cell in cells if cell["allocation"].startswith("torch")):
        found = [best.get((name, "fused", count)) for count in tokens]
        line(name, [f"{cell['us']:.1f}" if cell else "-" for cell in found])
    for name in dict.fromkeys(a.name for a in allocations if a.name not in uniforms):
        mine = [by_name[name, count] for count in tokens]
        fused = [best[name, "fused", count]["us"] for count in tokens]
        line(f"\n{case.name}, {name}: us / fused", [str(count) for count in tokens])
        for variant in VARIANTS:
            us = [best[name, variant, count]["us"] for count in tokens]
            line(variant, [f"{value:.1f}/{value / one:.2f}" for value, one in zip(us, fused, strict=True)])
        texts, losses = [], []
        for a, one in zip(mine, fused, strict=True):
            peers = [by_name[uniform, a.tokens] for uniform in uniforms if by_name[uniform, a.tokens].bits >= a.bits]
            peer = min(peers, key=lambda peer: best[peer.name, "fused", a.tokens]["us"])
            us = best[peer.name, "fused", a.tokens]["us"]
            texts.append(f"{peer.name} {us:.1f}/{us / one:.2f}")
            losses.append(f"{a.loss:.3f}, {peer.loss:.3f}")
        line("best uniform of as many bits", texts)
        line("made-up loss, that uniform's", losses)
        if (case.name, name) == REFERENCE[:2]:
            known = [REFERENCE[2].get(count) for count in tokens]
            texts = [f"{us}/{us / one:.2f}" if us else "-" for us, one in zip(known, fused, strict=True)]
            line("paper's kernels", texts)
        line("spread of fused", [f"{best[name, 'fused', count]['spread']:.1%}" for count in tokens])
        for a in mine:
            print(f"  {a.tokens} tokens, {a.bits:.3f} bits: {a.shares}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--solve", action="store_true", help="write --allocations and stop")
    parser.add_argument("--build", action="store_true", help="compile the kernels and stop")
    parser.add_argument("--allocations", type=Path, default=FILE, metavar="JSON")
    parser.add_argument("--workloads", nargs="*", default=[case.name for case in CASES])
    parser.add_argument("--tokens", nargs="*", type=int, default=list(TOKENS))
    parser.add_argument("--budgets", nargs="*", default=[*BUDGETS, "hot"], help="of mixed allocations; or hot")
    parser.add_argument("--out", type=Path, help="write every cell as JSON")
    parser.add_argument("--int8", action="store_true", help="int8 activations in place of fp8")
    parser.add_argument("--architecture", default=DEFAULT.name, choices=[one.name for one in BUILT])
    arguments = parser.parse_args()
    architecture = next(one for one in BUILT if one.name == arguments.architecture)
    if arguments.solve:
        solve(arguments.allocations)
        return
    allocations = [
        a
        for a in read_allocations(arguments.allocations, arguments.budgets)
        if a.case.name in arguments.workloads and a.tokens in arguments.tokens
    ]
    if arguments.int8:
        allocations = [a.in_int8() for a in allocations]
    if arguments.build:
        build_all(architecture, allocations)
        return
    torch.manual_seed(0)
    timer, streams = Timer(), [torch.cuda.Stream() for _ in range(len({s for a in allocations for s in a.schemes}))]
    print(torch.cuda.get_device_name(), "torch", torch.__version__, flush=True)
    everything: list[dict[str, Any]] = []
    for case in dict.fromkeys(a.case for a in allocations):
        mine = [a for a in allocations if a.case == case]
        schemes = {scheme for a in mine for scheme in a.schemes}
        gemms = {name: Gemm(case, name, schemes) for name in case.workload.gemms}
        cells = []
        for tokens in dict.fromkeys(a.tokens for a in mine):
            started = time.perf_counter()
            cells += measure(timer, architecture, gemms, [a for a in mine if a.tokens == tokens], streams)
            torch.cuda.empty_cache()
            print(f"{case.name} {tokens} tokens: {time.perf_counter() - started:.1f} s", flush=True)
        print_tables(case, mine, cells)
        everything += cells
        if arguments.out:
            arguments.out.write_text(json.dumps(everything, indent=1))
        del gemms
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
