"""The steps around the grouped GEMMs of a layer, on torch tensors: sort, dispatch, SwiGLU or another gating, combine.

Nothing here waits for the GPU, and nothing is checked: `moe_layer.MoeLayer` checks what enters it, and what lies
between its launches is its own. Launches after `dispatch` read what the sort wrote before they wait for the launch
before them, which must not be the sort. A token's choices among the routed experts are its first rows; shared experts
come after them and take every token.
"""

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

from mxmoe_steps.gating import Gating
from mxmoe_steps.kernels.architecture import CLUSTER_SORT, Architecture
from mxmoe_steps.kernels.codes.format import EDGE, OPERAND_BITS
from mxmoe_steps.kernels.launch import Activations, architecture_of, token_kernel
from mxmoe_steps.kernels.limits import OPERAND_MASKS

CLUSTER_ENTRIES = 6144  # more are sorted faster by eight blocks than by one


@dataclass(frozen=True)
class Routed:
    """Tokens sorted by expert.

    ``expert_ids``: int64 [tokens, top_k], the router's choices; ``row``: int32 [tokens, top_k], the row of each.
    ``slices`` experts with the last numbers take every token: token t of the s-th is row ``tokens * (top_k + s) + t``.
    ``offsets``: int32 [experts + slices + 1], first row of each expert. ``rows``: of all experts.
    ``architecture``: whose kernels sorted them, and take all later steps.
    """

    expert_ids: torch.Tensor
    row: torch.Tensor
    offsets: torch.Tensor
    slices: int
    rows: int
    architecture: Architecture


def sort_by_expert(
    expert_ids: torch.Tensor, experts: int, slices: int = 0, architecture: Architecture | None = None
) -> Routed:
    """Sort the router's choices, int64 [tokens, top_k] on the GPU with values below ``experts``.

    ``architecture``: by default that of the GPU.
    """
    architecture = architecture or architecture_of(expert_ids.device)
    tokens, top_k = expert_ids.shape
    row = torch.empty_like(expert_ids, dtype=torch.int32)
    offsets = torch.empty(experts + slices + 1, dtype=torch.int32, device=expert_ids.device)
    by_cluster = tokens * top_k > CLUSTER_ENTRIES and architecture.clusters
    token_kernel(CLUSTER_SORT if by_cluster else "sort_1", architecture)(expert_ids, row, offsets, slices)
    return Routed(expert_ids, row, offsets, slices, tokens * (top_k + slices), architecture)


def dispatch(
    x: torch.Tensor,
    routed: Routed,
    needs: torch.Tensor,
    operands: Collection[str],
    gate: torch.Tensor | None = None,
    rotated: bool = False,
) -> tuple[dict[str, Activations], torch.Tensor | None]:
    """Tokens ``x``, bfloat16 [tokens, K], at the rows of their experts, quantized per token for types of 8 and 4 bits.

    ``needs``: int32 [experts + slices], sums of `OPERAND_MASKS`; rows of an expert are filled in the types that it
    needs and left alone in others. ``operands``: all types that some expert needs. ``gate``: weight of the shared
    experts' gate, bfloat16 [1, K]; then its logits, bfloat16 [tokens], come second. ``rotated``: rows are rotated
    as ``needs`` says, see `rotation`.
    """
    activations, outputs = _outputs(x, routed, operands)
    if gate is None:
        spare = _spare(x.device)["bf16"].values
        _kernel("dispatch", routed, rotated)(
            x, routed.expert_ids, routed.row, needs, outputs, (spare, spare[0]), routed.slices
        )
        return activations, None
    logits = torch.empty(x.shape[0], dtype=torch.bfloat16, device=x.device)
    _kernel("dispatch_gated", routed, rotated)(
        x, routed.expert_ids, routed.row, needs, outputs, (gate, logits), routed.slices
    )
    return activations, logits


def swiglu(
    gate_up: torch.Tensor, routed: Routed, needs: torch.Tensor, operands: Collection[str], rotated: bool = False
) -> dict[str, Activations]:
    """``silu(gate) * up`` of gate_up, bfloat16 [rows, 2 K], rounded to bfloat16, as the operands of the down blocks.

    ``needs``, ``operands`` and ``rotated`` as for `dispatch`. The ``slices`` rows of a token are slices of one row:
    they get one scale and one rotation, and the last expert's needs.
    """
    activations, outputs = _outputs(gate_up, routed, operands, gate_up.shape[1] // 2)
    function = _kernel("swiglu", routed, rotated)
    function(gate_up, routed.expert_ids, routed.row, needs, outputs, routed.slices)
    return activations


def activate(
    gate_up: torch.Tensor,
    routed: Routed,
    needs: torch.Tensor,
    operands: Collection[str],
    gating: Gating,
    biases: torch.Tensor | None,
    rotated: bool = False,
) -> dict[str, Activations]:
    """As `swiglu`, for any ``gating``: ``gate_up`` is bfloat16 [rows, K] of experts without gate. ``biases``: bfloat16
    [experts + slices, columns of ``gate_up``] if there are any."""
    activations, outputs = _outputs(gate_up, routed, operands, gate_up.shape[1] // gating.columns)
    added = _spare(gate_up.device)["bf16"].values if biases is None else biases
    inputs = (gate_up, added, gating.alpha, gating.limit)
    function = _kernel(f"activate_{gating.variant}", routed, rotated)
    function(inputs, routed.expert_ids, routed.row, needs, outputs, routed.slices)
    return activations


def quantize(
    products: torch.Tensor, routed: Routed, needs: torch.Tensor, operands: Collection[str], rotated: bool = False
) -> dict[str, Activations]:
    """``silu(gate) * up``, bfloat16 [rows, K], as the operands of the down blocks; otherwise as `swiglu`."""
    as_it_is = not rotated and "bf16" in operands
    unrounded = {"bf16": Activations(products)} if as_it_is else {}
    made = [operand for operand in operands if not (as_it_is and operand == "bf16")]
    if not made:
        return unrounded
    activations, outputs = _outputs(products, routed, made)
    function = _kernel("quantize", routed, rotated)
    function(products, routed.expert_ids, routed.row, needs, outputs, routed.slices)
    return unrounded | activations


def combine(
    rows: torch.Tensor,
    routed: Routed,
    weights: torch.Tensor,
    logits: torch.Tensor | None = None,
    biases: torch.Tensor | None = None,
) -> torch.Tensor:
    """Weighted sum of each token's ``rows``, bfloat16 [rows, N], in float32; bfloat16 [tokens, N].

    ``weights``: bfloat16 or float32 [tokens, top_k]. Shared rows count once, times the sigmoid of ``logits``, bfloat16
    [tokens], if there are any. ``biases``: bfloat16 [experts, N], added to the rows of each expert first; not with
    shared rows.
    """
    out = torch.empty(routed.expert_ids.shape[0], rows.shape[1], dtype=torch.bfloat16, device=rows.device)
    gates = _spare(rows.device)["bf16"].values[0] if logits is None else logits
    name = "combine_bf16" if weights.dtype == torch.bfloat16 else "combine_float32"
    function = token_kernel(name if biases is None else f"{name}_biased", routed.architecture)
    choices = (routed.row,) if biases is None else (routed.row, routed.expert_ids, biases)
    function(rows, choices, weights, gates, out, routed.slices, int(logits is not None))
    return out


def _kernel(name: str, routed: Routed, rotated: bool) -> Any:
    return token_kernel(f"{name}_rotated" if rotated else name, routed.architecture)


Outputs = tuple[torch.Tensor, ...]  # bfloat16, then values and scales of `Architecture.scaled_outputs`


def _outputs(
    like: torch.Tensor, routed: Routed, operands: Collection[str], features: int | None = None
) -> tuple[dict[str, Activations], Outputs]:
    """New operands of [rows, features], and the arguments of a kernel that fills them."""
    activations = {
        operand: _empty(operand, routed.rows, features or like.shape[1], like.device) for operand in operands
    }
    full = _spare(like.device) | activations
    scaled = [full[operand] for operand in routed.architecture.scaled_outputs]
    pairs = [tensor for one in scaled for tensor in (one.values, one.scales) if tensor is not None]
    return activations, (full["bf16"].values, *pairs)


def _empty(operand: str, rows: int, features: int, device: torch.device) -> Activations:
    if operand == "bf16":
        return Activations(torch.empty(rows, features, dtype=torch.bfloat16, device=device))
    values = torch.empty(rows, features * OPERAND_BITS[operand] // 8, dtype=torch.uint8, device=device)
    return Activations(values, torch.empty(rows, dtype=torch.float32, device=device))


@cache
def _spare(device: torch.device) -> dict[str, Activations]:
    """Stand-ins for the operands that nobody needs."""
    return {operand: _empty(operand, 1, EDGE, device) for operand in OPERAND_MASKS}


def prepare(device: torch.device, names: Iterable[str], architecture: Architecture) -> None:
    """Load the kernels ``names`` and make what all calls on a device share."""
    for name in names:
        token_kernel(name, architecture)
    _spare(device)
