"""The grouped GEMM in torch: what runs without a kernel, and what the kernels are compared with."""

from collections.abc import Callable, Sequence

import torch

from mxmoe_steps import packing
from mxmoe_steps.gating import CLAMPED, SWIGLU, Gating
from mxmoe_steps.quantizers.grid import E4M3, E4M3_MAX, QuantizedWeight, quantize_activations
from mxmoe_steps.quantizers.hadamard import rotate
from mxmoe_steps.schemes import ORIGINAL, SHARED

Problem = tuple[int, int, int, int]  # expert, number of the weight stack, entry in it, output column


def group_gemm(
    x: torch.Tensor,
    offsets: Sequence[int],
    problems: Sequence[Problem],
    weights: Sequence[QuantizedWeight | torch.Tensor],
    columns: int,
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """Rows of each expert times its weights, under each weight's own scheme.

    ``x``: [rows, K], sorted by expert, rows ``offsets[e] .. offsets[e + 1] - 1`` of expert e. ``weights``: stacks
    [entries, N, K], quantized or plain. Computes in ``dtype``; returns bfloat16 [rows, columns] (``dtype`` itself
    if that is float64), zero where no problem writes.
    """
    out = torch.zeros(x.shape[0], columns, dtype=dtype, device=x.device)
    for expert, number, entry, column in problems:
        rows = slice(offsets[expert], offsets[expert + 1])
        stack = weights[number]
        if isinstance(stack, torch.Tensor):
            scheme, weight = ORIGINAL, stack[entry]
        else:
            scheme, weight = stack.scheme, stack[entry].dequantize()
        activations = quantize_activations(x[rows], scheme).to(dtype)
        out[rows, column : column + weight.shape[0]] = activations @ weight.to(dtype).T
    return out if dtype == torch.float64 else out.bfloat16()


def quantize_tokens(x: torch.Tensor, operand: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Per-token symmetric quantization of ``x`` [rows, K] to ``fp8``, ``int8`` or ``int4``: (uint8 bits [rows, K], of
    int4 [rows, K / 2] with the first one in the low bits, float32 scales [rows]). The same arithmetic as
    `quantize_activations`; a row of zeros gets a tiny scale."""
    top = {"fp8": E4M3_MAX, "int8": 127.0, "int4": 7.0}[operand]
    largest = x.abs().amax(-1).float().clamp_min(1e-30)
    scales = largest / largest.new_full((), top)
    scaled = (x.float() / scales[:, None]).clamp(-top, top)
    codes = scaled.to(E4M3) if operand == "fp8" else scaled.round().to(torch.int8)
    codes = codes.view(torch.uint8)
    return (packing.pack(codes & 15, 4) if operand == "int4" else codes), scales


def product(gating: Gating, gate: torch.Tensor | None, up: torch.Tensor) -> torch.Tensor:
    """What experts make of the sums of gate (None if they have none) and up, biases added, in their precision."""
    functional = torch.nn.functional
    if gating.function == CLAMPED:
        assert gate is not None
        gate, up = gate.clamp(max=gating.limit), up.clamp(-gating.limit, gating.limit)
        return gate * (gating.alpha * gate).sigmoid() * (up + 1)
    functions: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
        "silu": functional.silu,
        "gelu": functional.gelu,
        "gelu_pytorch_tanh": lambda x: functional.gelu(x, approximate="tanh"),
        "relu": functional.relu,
        "relu2": lambda x: functional.relu(x).square(),
    }
    function = functions[gating.function]
    return function(up) if gate is None else function(gate) * up


def moe_layer(
    x: torch.Tensor,
    expert_ids: torch.Tensor,
    weights: torch.Tensor,
    read: Callable[[int, str], QuantizedWeight | torch.Tensor],
    gate: torch.Tensor | None = None,
    shared: bool = False,
    rotated: bool = False,
    gating: Gating = SWIGLU,
    biases: Callable[[int, str], torch.Tensor] | None = None,
) -> torch.Tensor:
    """float64 [tokens, H]: the layer that `mxmoe_steps.kernels.moe_layer.MoeLayer` computes, exact but for its bfloat16
    intermediates. ``read(expert, block)``: the weights of gate, up or down; ``gate``: the shared expert's gate logits.
    ``rotated``: the inputs of packed blocks are. ``biases(expert, block)``: of a biased ``gating``.
    """

    def linear(block: QuantizedWeight | torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        if isinstance(block, torch.Tensor):
            return (rows.double() @ block.double().T).bfloat16()
        if rotated:
            turned = rotate(rows.float())
            rows = turned.bfloat16() if block.scheme.act_bits == 16 else turned
        seen = quantize_activations(rows, block.scheme).double()
        return (seen @ block.dequantize().double().T).bfloat16()

    def sums(expert: int, block: str, rows: torch.Tensor) -> torch.Tensor:
        found = linear(read(expert, block), rows).double()
        return found if biases is None else found + biases(expert, block).double()

    def run(expert: int, rows: torch.Tensor) -> torch.Tensor:
        inner = sums(expert, "gate", rows) if gating.gated else None
        return sums(expert, "down", product(gating, inner, sums(expert, "up", rows)).bfloat16())

    result = torch.zeros(x.shape, dtype=torch.float64, device=x.device)
    for expert in expert_ids.unique().tolist():
        token, slot = (expert_ids == expert).nonzero(as_tuple=True)
        result.index_add_(0, token, run(expert, x[token]) * weights[token, slot, None].double())
    if shared:
        result += run(SHARED, x) * (1.0 if gate is None else gate.double().sigmoid()[:, None])
    return result
