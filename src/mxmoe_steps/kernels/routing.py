"""The steps around the grouped GEMMs of a layer, on torch tensors: sort, dispatch, SwiGLU, combine.

Nothing here waits for the GPU. A token's choices among the routed experts are its first rows; shared experts come
after them and take every token.
"""

from collections.abc import Collection
from dataclasses import dataclass
from functools import cache

import torch

from mxmoe_steps.errors import UserError
from mxmoe_steps.kernels.formats import EDGE, MAX_ENTRIES, MAX_EXPERTS, OPERAND_MASKS
from mxmoe_steps.kernels.launch import Activations, check_device, check_tensor, load_kernel

CLUSTER_ENTRIES = 6144  # more are sorted faster by eight blocks than by one


@dataclass(frozen=True)
class Routed:
    """Tokens sorted by expert.

    ``chosen``: int64 [tokens, top_k], the router's choices; ``row``: int32 [tokens, top_k], the row of each.
    ``shared`` experts with the last numbers take every token: token t of the s-th is row ``tokens * (top_k + s) + t``.
    ``offsets``: int32 [experts + shared + 1], first row of each expert.
    """

    chosen: torch.Tensor
    row: torch.Tensor
    offsets: torch.Tensor
    shared: int

    @property
    def rows(self) -> int:
        """Rows of all experts."""
        tokens, top_k = self.chosen.shape
        return tokens * (top_k + self.shared)


def sort_by_expert(chosen: torch.Tensor, experts: int, shared: int = 0) -> Routed:
    """Sort the router's choices, int64 [tokens, top_k] on the GPU with values below ``experts``."""
    check_device(chosen, "chosen experts")
    check_tensor("chosen experts", chosen, torch.int64, 2, chosen.device)
    if not 0 < experts <= MAX_EXPERTS - shared:
        raise UserError(f"{experts} experts and {shared} shared; the sort kernel takes 1 to {MAX_EXPERTS} together")
    if chosen.shape[1] + shared > MAX_ENTRIES:
        raise UserError(f"{chosen.shape[1]} choices and {shared} shared experts of a token; at most {MAX_ENTRIES}")
    row = torch.empty(chosen.shape, dtype=torch.int32, device=chosen.device)
    offsets = torch.empty(experts + shared + 1, dtype=torch.int32, device=chosen.device)
    load_kernel("sort_8" if chosen.numel() > CLUSTER_ENTRIES else "sort_1")(chosen, row, offsets, shared)
    return Routed(chosen, row, offsets, shared)


def dispatch(x: torch.Tensor, routed: Routed, needs: torch.Tensor, operands: Collection[str]) -> dict[str, Activations]:
    """Tokens ``x``, bfloat16 [tokens, K], at the rows of their experts, quantized per token for 8-bit types.

    ``needs``: int32 [experts + shared], sums of `OPERAND_MASKS`; rows of an expert are filled in the types that it
    needs and left alone in others. ``operands``: all types that some expert needs.
    """
    check_device(x, "x")
    check_tensor("x", x, torch.bfloat16, 2, x.device, (routed.chosen.shape[0], x.shape[1]))
    return _fill("dispatch", x, x.shape[1], routed, needs, operands)


def swiglu(
    gate_up: torch.Tensor, routed: Routed, needs: torch.Tensor, operands: Collection[str]
) -> dict[str, Activations]:
    """``silu(gate) * up`` of gate_up, bfloat16 [rows, 2 K], rounded to bfloat16, as the operands of the down blocks.

    ``needs`` and ``operands`` as for `dispatch`. The ``shared`` rows of a token are slices of one row: they get one
    scale, and the last expert's needs.
    """
    check_device(gate_up, "gate_up")
    check_tensor("gate_up", gate_up, torch.bfloat16, 2, gate_up.device, (routed.rows, gate_up.shape[1]))
    return _fill("swiglu", gate_up, gate_up.shape[1] // 2, routed, needs, operands)


def quantize(
    products: torch.Tensor, routed: Routed, needs: torch.Tensor, operands: Collection[str]
) -> dict[str, Activations]:
    """``silu(gate) * up``, bfloat16 [rows, K], as the operands of the down blocks; otherwise as `swiglu`."""
    check_device(products, "products")
    check_tensor("products", products, torch.bfloat16, 2, products.device, (routed.rows, products.shape[1]))
    made = {"bf16": Activations(products)} if "bf16" in operands else {}
    eight_bits = [operand for operand in operands if operand != "bf16"]
    return made | _fill("quantize", products, products.shape[1], routed, needs, eight_bits) if eight_bits else made


def combine(
    given: torch.Tensor, routed: Routed, weights: torch.Tensor, gate: torch.Tensor | None = None
) -> torch.Tensor:
    """Weighted sum of each token's rows of ``given``, bfloat16 [rows, N], in float32; bfloat16 [tokens, N].

    ``weights``: bfloat16 or float32 [tokens, top_k]. Shared rows count once, times the sigmoid of ``gate``, bfloat16
    [tokens], if there is one.
    """
    tokens, device = routed.chosen.shape[0], given.device
    check_device(given, "given")
    check_tensor("given", given, torch.bfloat16, 2, device, (routed.rows, given.shape[1]))
    kind = torch.bfloat16 if weights.dtype == torch.bfloat16 else torch.float32
    check_tensor("weights", weights, kind, 2, device, tuple(routed.chosen.shape))
    if gate is not None:
        check_tensor("gate", gate, torch.bfloat16, 1, device, (tokens,))
    out = torch.empty(tokens, given.shape[1], dtype=torch.bfloat16, device=device)
    logits = _nothing(device)["bf16"].values[0] if gate is None else gate
    function = load_kernel("combine_bf16" if kind == torch.bfloat16 else "combine_float32")
    function(given, routed.row, weights, logits, out, routed.shared, int(gate is not None))
    return out


def _fill(
    kernel: str, given: torch.Tensor, features: int, routed: Routed, needs: torch.Tensor, operands: Collection[str]
) -> dict[str, Activations]:
    """Run ``kernel`` into new [rows, features] operands."""
    device = given.device
    experts = routed.offsets.shape[0] - 1
    check_tensor("needs", needs, torch.int32, 1, device, (experts,))
    if features % EDGE:
        raise UserError(f"{kernel}: rows have {features} features; need a multiple of {EDGE}")
    made = {operand: _empty(operand, routed.rows, features, device) for operand in operands}
    full = _nothing(device) | made
    bf16, fp8, int8 = (full[operand] for operand in ("bf16", "fp8", "int8"))
    outputs = (bf16.values, fp8.values, fp8.scales, int8.values, int8.scales)
    load_kernel(kernel)(given, routed.chosen, routed.row, needs, outputs, routed.shared)
    return made


def _empty(operand: str, rows: int, features: int, device: torch.device) -> Activations:
    if operand == "bf16":
        return Activations(torch.empty(rows, features, dtype=torch.bfloat16, device=device))
    values = torch.empty(rows, features, dtype=torch.uint8, device=device)
    return Activations(values, torch.empty(rows, dtype=torch.float32, device=device))


@cache
def _nothing(device: torch.device) -> dict[str, Activations]:
    """Stand-ins for the operands that nobody needs."""
    return {operand: _empty(operand, 1, EDGE, device) for operand in OPERAND_MASKS}
