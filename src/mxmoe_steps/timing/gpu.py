"""Launches on a GPU: random weights and activations, captured in CUDA graphs, timed in rounds."""

import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch

from mxmoe_steps.kernels import reference
from mxmoe_steps.kernels.architecture import Architecture, Configuration
from mxmoe_steps.kernels.codes.format import GROUP, HALF_ROWS, TILE_ROWS, Format
from mxmoe_steps.kernels.formats import kernel_format
from mxmoe_steps.kernels.launch import Activations, GroupGemmKernel, problem_table
from mxmoe_steps.kernels.layouts import PAD_CHUNKS, KernelWeights, original_weights
from mxmoe_steps.quantizers.grid import E4M3, QuantizedWeight
from mxmoe_steps.schemes import parse_scheme
from mxmoe_steps.timing.launches import Launch
from mxmoe_steps.timing.timer import Timer

_CLOCKS = "clocks.sm,clocks.mem,power.draw,temperature.gpu"


def random_stack(format_: Format, entries: int, n: int, k: int, device: str) -> KernelWeights:
    """Random codes in kernel order with plausible scales, [entries, n, k]."""
    if format_.original:
        return original_weights(torch.empty(entries, n, k, dtype=torch.bfloat16, device=device).normal_(std=0.02))
    channel_scales = None
    if format_.channel_scaled:
        channel_scales = torch.rand(entries, -(-n // TILE_ROWS) * TILE_ROWS, device=device) * 0.01 + 0.005
    if not format_.decoded:
        if format_.operand == "fp8":
            data = torch.randn(entries, n, k, dtype=torch.float16, device=device).to(E4M3).view(torch.uint8)
        else:
            data = torch.randint(0, 256, (entries, n, k), dtype=torch.uint8, device=device)
        return KernelWeights(format_, entries, n, k, data, channel_scales)
    chunks = entries * -(-n // TILE_ROWS) * -(-k // GROUP) + PAD_CHUNKS
    data = torch.randint(0, 256, (2 * chunks, format_.half_bytes), dtype=torch.uint8, device=device)
    if format_.grouped:
        data[:, format_.code_bytes :] = _random_numbers(format_, 2 * chunks, device)
    return KernelWeights(format_, entries, n, k, data.view(-1), channel_scales)


def _random_numbers(format_: Format, halves: int, device: str) -> torch.Tensor:
    """The numbers of the rows of half chunks from plausible scales and zero points, uint8 [halves, bytes]."""
    rows = halves * HALF_ROWS
    codes = torch.empty((), dtype=torch.uint8, device=device).expand(rows, GROUP)
    scales = torch.empty(rows, GROUP // format_.group, device=device).uniform_(0.005, 0.015)
    middle = 2 ** (format_.bits - 1)
    zeros = torch.empty_like(scales).uniform_(middle - 1, middle + 1) if format_.zeros else None
    numbers = format_.numbers(QuantizedWeight(format_.scheme, codes, scales, zeros)).view(torch.int16)
    pairs = numbers.view(halves, HALF_ROWS // 2, 2, -1).transpose(-1, -2)  # of two rows
    return pairs.contiguous().view(torch.uint8).flatten(1)


@dataclass(frozen=True)
class Job:
    """One thing to time: a launch under the kernel of a phase, fused or one launch per format."""

    launch: Launch
    phase: str
    apart: bool = False


class Bench:
    """Buffers and kernels that jobs share."""

    def __init__(self, jobs: list[Job], architecture: Architecture, device: str = "cuda") -> None:
        self.jobs, self.architecture = jobs, architecture
        self.device = device
        self._kernels: dict[Configuration, GroupGemmKernel] = {}
        self._stacks: dict[tuple[Format, int, int], KernelWeights] = {}
        self._activations: dict[tuple[str, int], Activations] = {}

    @cached_property
    def _out(self) -> torch.Tensor:
        elements = max(sum(job.launch.expert_rows) * job.launch.n * job.launch.blocks for job in self.jobs)
        return torch.empty(elements, dtype=torch.bfloat16, device=self.device)

    def _kernel(self, config: Configuration) -> GroupGemmKernel:
        if config not in self._kernels:
            self._kernels[config] = GroupGemmKernel(config)
        return self._kernels[config]

    def _stack(self, format_: Format, n: int, k: int) -> KernelWeights:
        """As many entries as any job of this shape has problems; one if they share it."""
        if (format_, n, k) not in self._stacks:
            alike = [job.launch for job in self.jobs if (job.launch.n, job.launch.k) == (n, k)]
            entries = max(1 if launch.kind == "tile" else len(launch.rows) for launch in alike)
            self._stacks[format_, n, k] = random_stack(format_, entries, n, k, self.device)
        return self._stacks[format_, n, k]

    def _tokens(self, operand: str, rows: int, k: int) -> Activations:
        """``rows`` rows of a buffer that serves all jobs of this operand and K."""
        if (operand, k) not in self._activations:
            most = max(sum(job.launch.expert_rows) for job in self.jobs if job.launch.k == k)
            x = torch.randn(most, k, device=self.device, dtype=torch.bfloat16) * 0.5
            plain = operand == "bf16"
            self._activations[operand, k] = (
                Activations(x) if plain else Activations(*reference.quantize_tokens(x, operand))
            )
        whole = self._activations[operand, k]
        return Activations(whole.values[:rows], None if whole.scales is None else whole.scales[:rows])

    def prepare(self, job: Job) -> Callable[[], None]:
        """A function that launches the job; it allocates nothing."""
        launch = job.launch
        rows = sum(launch.expert_rows)
        out = self._out[: rows * launch.n * launch.blocks].view(rows, -1)
        offsets = torch.tensor([0, *launch.expert_rows], device=self.device).cumsum(0).int()
        formats = [kernel_format(parse_scheme(name)) for name in launch.schemes]
        configs = (
            launch.configs_apart(self.architecture, job.phase)
            if job.apart
            else [launch.config(self.architecture, job.phase)]
        )
        calls = []
        for config in configs:
            stacks = [self._stack(format_, launch.n, launch.k) for format_ in config.formats]
            problems = [
                (0, 0, 0, 0)
                if launch.kind == "tile"
                else (p // launch.blocks, config.formats.index(formats[p]), p, p % launch.blocks * launch.n)
                for p in launch.order
                if formats[p] in config.formats
            ]
            if problems:
                table = problem_table(problems, stacks, len(launch.expert_rows), out.shape[1], self.device)
                activations = {operand: self._tokens(operand, rows, launch.k) for operand in config.operands}
                calls.append((self._kernel(config), activations, stacks, table))

        def run() -> None:
            for kernel, activations, stacks, table in calls:
                kernel(activations, stacks, table, offsets, out)

        return run

    def measure(self, rounds: int, repeats: int, seed: int = 0) -> tuple[list[list[float]], list[list[float]]]:
        """Microseconds of every job in every round, the median of ``repeats``, and the GPU's clocks in each round.

        Clocks: SM MHz, memory MHz, watts, degrees Celsius, while the GPU is busy; empty without nvidia-smi.
        """
        timer = Timer()
        runs = [self.prepare(job) for job in self.jobs]  # graphs do not keep alive what they read
        taken = timer.rounds({i: timer.capture(run) for i, run in enumerate(runs)}, rounds, repeats, seed)
        times: list[list[float]] = [[] for _ in runs]
        clocks = []
        for _ in range(rounds):
            asked = _ask_clocks()
            for index, us in next(taken).items():
                times[index].append(us)
            clocks.append(_answer(asked))
        return times, clocks


def _ask_clocks() -> "subprocess.Popen[str] | None":
    command = ["nvidia-smi", f"--query-gpu={_CLOCKS}", "--format=csv,noheader,nounits", "--id=0"]
    try:
        return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    except OSError:
        return None


def _answer(asked: "subprocess.Popen[str] | None") -> list[float]:
    if asked is None:
        return []
    try:
        return [float(value) for value in asked.communicate()[0].split(",")]
    except ValueError:  # [N/A] on some GPUs
        return []
