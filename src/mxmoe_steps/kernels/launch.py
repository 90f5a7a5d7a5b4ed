"""Load a compiled kernel and run it on torch tensors; everything wrong is refused here, with one clear error."""

import ctypes
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

from mxmoe_steps.errors import UserError
from mxmoe_steps.kernels.architecture import Architecture, Configuration
from mxmoe_steps.kernels.architectures import NAMES, require
from mxmoe_steps.kernels.build import ENTRY, RUNTIME, Kernel, TokenKernel, build, runtime_library
from mxmoe_steps.kernels.codes.format import OPERAND_BITS, TILE_ROWS, Format
from mxmoe_steps.kernels.layouts import KernelWeights
from mxmoe_steps.kernels.limits import MAX_EXPERTS

COLUMN_MULTIPLE = 8  # 16-byte stores
MAX_STREAMS = 64  # that one kernel object can be launched on


@dataclass(frozen=True)
class Activations:
    """Tokens sorted by expert: bfloat16 [rows, K] without scales, or uint8 bits of an 8-bit type [rows, K], or
    of int4 [rows, K / 2], the first one in the low bits, with float32 scales [rows]."""

    values: torch.Tensor
    scales: torch.Tensor | None = None


def problem_table(
    problems: Sequence[tuple[int, int, int, int]],
    weights: Sequence[KernelWeights],
    experts: int,
    columns: int,
    device: torch.device | str,
    gated: bool = False,
) -> torch.Tensor:
    """int32 [P, 4] on ``device`` from (expert, number in ``weights``, entry, output column), checked.

    ``gated``: for kernels that are, whose entries write half as many columns as they have rows.

    Tiles run in the order of the table: alternate formats that are bound by different things.
    """
    for p, (expert, number, entry, column) in enumerate(problems):
        if not 0 <= expert < experts:
            raise UserError(f"problem {p}: expert {expert} of {experts}")
        if not 0 <= number < len(weights):
            raise UserError(f"problem {p}: weight stack {number} of {len(weights)}")
        if not 0 <= entry < weights[number].entries:
            raise UserError(f"problem {p}: entry {entry} of {weights[number].entries} in stack {number}")
        width = weights[number].out_features // (2 if gated else 1)
        if column % COLUMN_MULTIPLE or not 0 <= column <= columns - width:
            raise UserError(
                f"problem {p}: output columns {column}..{column + width} of {columns};"
                f" need a multiple of {COLUMN_MULTIPLE} that fits"
            )
    return torch.tensor(problems, dtype=torch.int32).reshape(-1, 4).to(device)


class TileCounters:
    """Tile counters of one kernel on one device: a pair for every stream, whose launches follow one another.

    They are made when a kernel gets its weights: inside a CUDA graph their making would be replayed with it.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = torch.cuda.current_device() if device.index is None else device.index
        self._free = list(torch.zeros(MAX_STREAMS, 2, dtype=torch.int32, device=device).unbind())
        self._of_stream: dict[int, torch.Tensor] = {}
        torch.cuda.synchronize(device)  # once: other streams may launch next

    def of_current_stream(self) -> torch.Tensor:
        """int32 [2]."""
        stream = torch._C._cuda_getCurrentRawStream(self._device)  # a tenth of the time of torch.cuda.current_stream
        counters = self._of_stream.get(stream)
        if counters is None:
            if not self._free:
                raise UserError(f"one kernel was launched on more than {MAX_STREAMS} streams; use fewer")
            counters = self._of_stream[stream] = self._free.pop()
        return counters


class GroupGemmKernel:
    """A compiled grouped GEMM. Launches go to the current stream and never wait for the GPU.

    A launch reads problems, row offsets and weights while the launch before it on the stream ends, and the rest after
    it. So they must be older than that launch: `routing.dispatch`, or a kernel from elsewhere, has to run after what
    writes them.

    CUDA graphs that captured launches of one object on the same stream must not be replayed at the same time.
    """

    def __init__(self, config: Configuration) -> None:
        """Load ``config`` from the kernel cache, or build it there first."""
        self.config = config
        self.function = load_kernel(config)
        self._counters: dict[torch.device, TileCounters] = {}

    def __call__(
        self,
        activations: Mapping[str, Activations],
        weights: Sequence[KernelWeights],
        problems: torch.Tensor,
        offsets: torch.Tensor,
        out: torch.Tensor,
        blocks: int | None = None,
    ) -> torch.Tensor:
        """Write every problem's product into ``out``, bfloat16 [rows, columns], and return it; all is checked.

        ``activations`` by operand type, one for each of ``config.operands``; ``weights`` in the order of
        ``config.formats``; ``problems`` from `problem_table`; ``offsets`` int32 [experts + 1] on the GPU.
        ``blocks``: thread blocks to start, by default as many as run at once. Rows and columns that no problem covers
        are left alone.
        """
        self._check(activations, weights, problems, offsets, out)
        return GroupGemm(self, weights, problems)(activations, offsets, out, blocks)

    def counters(self, device: torch.device) -> TileCounters:
        """The kernel's on ``device``; `UserError` if they would be made inside a CUDA graph."""
        if device not in self._counters:
            if torch.cuda.is_current_stream_capturing():
                raise UserError("launch a kernel once before capturing it in a CUDA graph: it makes its tile counters")
            self._counters[device] = TileCounters(device)
        return self._counters[device]

    def _check(
        self,
        activations: Mapping[str, Activations],
        weights: Sequence[KernelWeights],
        problems: torch.Tensor,
        offsets: torch.Tensor,
        out: torch.Tensor,
    ) -> None:
        config = self.config
        if [weight.format for weight in weights] != list(config.formats):
            names = ", ".join(weight.format.name for weight in weights)
            expected = ", ".join(format_.name for format_ in config.formats)
            raise UserError(f"weights are {names}; this kernel takes {expected}, in that order")
        if len({(weight.out_features, weight.in_features) for weight in weights}) > 1:
            shapes = ", ".join(f"[{weight.out_features}, {weight.in_features}]" for weight in weights)
            raise UserError(f"weights of one launch must have one shape; these have {shapes}")
        if set(activations) != set(config.operands):
            raise UserError(f"activations are {sorted(activations)}; this kernel takes {list(config.operands)}")
        check_device(out, "out")
        check_tensor("out", out, torch.bfloat16, 2, out.device)
        rows, features = out.shape[0], weights[0].in_features
        if out.shape[1] % COLUMN_MULTIPLE:
            raise UserError(f"out has {out.shape[1]} columns; need a multiple of {COLUMN_MULTIPLE}")
        for operand, tokens in activations.items():
            kind = torch.bfloat16 if operand == "bf16" else torch.uint8
            columns = features * OPERAND_BITS[operand] // (8 * kind.itemsize)
            check_tensor(f"{operand} activations", tokens.values, kind, 2, out.device, (rows, columns))
            if operand != "bf16":
                if tokens.scales is None:
                    raise UserError(f"{operand} activations need one scale per row")
                check_tensor(f"scales of {operand} activations", tokens.scales, torch.float32, 1, out.device, (rows,))
        for weight in weights:
            _check_weights(weight, out.device)
        check_tensor("problems", problems, torch.int32, 2, out.device)
        if problems.shape[1] != 4 or problems.shape[0] > config.max_problems:
            raise UserError(
                f"problems have shape {list(problems.shape)}; need [P, 4] with P at most {config.max_problems}"
            )
        check_tensor("offsets", offsets, torch.int32, 1, out.device)
        if not 2 <= offsets.shape[0] <= MAX_EXPERTS + 1:
            raise UserError(
                f"offsets have {offsets.shape[0]} elements; need experts + 1, for 1 to {MAX_EXPERTS} experts"
            )


class GroupGemm:
    """A kernel with its weights and problems: what does not change between launches is arranged once."""

    def __init__(self, kernel: GroupGemmKernel, weights: Sequence[KernelWeights], problems: torch.Tensor) -> None:
        """``weights`` and ``problems`` as for `GroupGemmKernel`, whose checks are not repeated."""
        device = problems.device
        config = kernel.config
        self._function, self._operands = kernel.function, config.operands
        self._counters, self._problems = kernel.counters(device), problems
        self._one_scale, one_by_one = _ones(device)
        scales = [one_by_one if weight.channel_scales is None else weight.channel_scales for weight in weights]
        self._weights = [tensor for pair in zip((w.data for w in weights), scales, strict=True) for tensor in pair]
        self._features = weights[0].out_features
        grid = processors(device) * config.blocks_per_sm
        self._grid, self._cluster = grid - grid % config.cluster, config.cluster

    def __call__(
        self,
        activations: Mapping[str, Activations],
        offsets: torch.Tensor,
        out: torch.Tensor,
        blocks: int | None = None,
    ) -> torch.Tensor:
        """As `GroupGemmKernel`; nothing is checked."""
        if not out.shape[0] or not self._problems.shape[0]:
            return out
        tensors: list[torch.Tensor] = []
        for operand in self._operands:
            tokens = activations[operand]
            tensors += [tokens.values, self._one_scale if tokens.scales is None else tokens.scales]
        grid = self._grid if blocks is None else blocks - blocks % self._cluster
        counters = self._counters.of_current_stream()
        self._function((*tensors, *self._weights), self._problems, offsets, out, counters, self._features, grid)
        return out


def _check_weights(weight: KernelWeights, device: torch.device) -> None:
    kind = torch.bfloat16 if weight.format.original else torch.uint8
    check_tensor(f"{weight.format.name} weights", weight.data, kind, 1 if weight.format.decoded else 3, device)
    if weight.channel_scales is not None:
        shape = (weight.entries, -(-weight.out_features // TILE_ROWS) * TILE_ROWS)
        check_tensor(f"channel scales of {weight.format.name}", weight.channel_scales, torch.float32, 2, device, shape)


def check_tensor(
    name: str,
    tensor: torch.Tensor,
    kind: torch.dtype,
    dimensions: int,
    device: torch.device,
    shape: tuple[int, ...] | None = None,
) -> None:
    """`UserError` unless ``tensor`` is a contiguous ``kind`` on ``device``, of ``shape`` if one is given."""
    if tensor.dtype != kind or tensor.ndim != dimensions or (shape is not None and tuple(tensor.shape) != shape):
        expected = f"{dimensions}-dimensional" if shape is None else str(list(shape))
        raise UserError(f"{name}: {tensor.dtype} {list(tensor.shape)}; expected {kind} {expected}")
    if tensor.device != device:
        raise UserError(f"{name} are on {tensor.device}, out is on {device}")
    if not tensor.is_contiguous():
        raise UserError(f"{name}: strides {tensor.stride()}; expected a contiguous tensor")
    if tensor.data_ptr() % 16 and kind != torch.float32 and dimensions > 1:
        raise UserError(f"{name}: starts at an address that is not a multiple of 16 bytes")


@cache
def _ones(device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """What stands in for the scales that a format does not have: of tokens [1], of weights [1, 1]."""
    one = torch.ones(1, dtype=torch.float32, device=device)  # engines change the default type while they load
    return one, one.view(1, 1)


@cache
def architecture_of(device: torch.device) -> Architecture:
    """That of a GPU; `UserError` if there are no kernels for it."""
    return require(torch.cuda.get_device_capability(device), torch.cuda.get_device_name(device))


@cache
def processors(device: torch.device) -> int:
    """Multiprocessors of a GPU."""
    return torch.cuda.get_device_properties(device).multi_processor_count


def check_device(tensor: torch.Tensor, name: str) -> None:
    """`UserError` unless ``tensor`` is on a GPU that there are kernels for."""
    if tensor.device.type != "cuda":
        raise UserError(
            f"{name}: on {tensor.device}; the kernels run on a {NAMES} GPU, kernels.reference runs anywhere"
        )
    architecture_of(tensor.device)


@cache
def token_kernel(name: str, architecture: Architecture) -> Any:
    """The function of one of `Architecture.token_kernels`."""
    return load_kernel(TokenKernel(name, architecture))


@cache
def load_kernel(kernel: Kernel) -> Any:
    """The function of a compiled kernel, built first unless it is in the kernel cache.

    The compiler's run-time library is taken from beside it, or from the compiler.
    """
    try:
        import tvm_ffi
    except ModuleNotFoundError:
        raise UserError("GPU kernels need the extra [cuda]: pip install 'mxmoe-steps[cuda]'") from None
    library = build(kernel)
    beside = library.parent / RUNTIME
    ctypes.CDLL(str(beside if beside.is_file() else runtime_library()), mode=ctypes.RTLD_GLOBAL)
    return tvm_ffi.load_module(str(library))[ENTRY]


def formats_of(weights: Sequence[KernelWeights]) -> tuple[Format, ...]:
    """Formats of ``weights`` in the order a kernel takes them."""
    return tuple(sorted({weight.format for weight in weights}))
