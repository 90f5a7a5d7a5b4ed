"""GPTQ (Frantar et al., 2023) for all experts of a layer at once.

Experts share their shapes, so their Hessians and weights are stacked and every step of the column
loop serves all of them. Act-order and static groups: columns are visited by falling Hessian
diagonal while the grid is fixed beforehand for consecutive columns, so the stored layout is the
plain one.
"""

import torch

from mxmoe_steps.quantizers.grid import QuantizedWeight, find_grid, quantized
from mxmoe_steps.quantizers.hessians import Hessians
from mxmoe_steps.schemes import Scheme

_BLOCK = 128  # columns whose updates are applied lazily in one matrix product


def gptq(weight: torch.Tensor, hessians: Hessians, scheme: Scheme) -> QuantizedWeight:
    """Quantize ``weight``, float32 [E, N, K], under ``scheme`` with error feedback.

    Raises ValueError when a damped Hessian is still not positive definite (name of the cause: NaN or
    infinite activations).
    """
    experts, _, in_features = weight.shape
    hessian = hessians.shrunk()
    diagonal = hessian.diagonal(dim1=-2, dim2=-1)
    order = diagonal.argsort(dim=-1, descending=True, stable=True)
    grid = find_grid(weight, scheme, importance=diagonal.float())
    by_column = grid.columns(order)  # scales [E, N, K] in visiting order

    rows = order.unsqueeze(-1).expand(-1, -1, in_features)
    cols = order.unsqueeze(-2).expand(-1, in_features, -1)
    factor = _inverse_factor(hessian.gather(1, rows).gather(2, cols))
    picked = order.unsqueeze(1).expand(-1, weight.shape[1], -1)
    work = weight.gather(2, picked)
    codes = []
    for start in range(0, in_features, _BLOCK):
        stop = min(start + _BLOCK, in_features)
        block = work[:, :, start:stop].clone()
        errors = torch.zeros_like(block)
        for column in range(stop - start):
            at = start + column
            code = by_column.round(block[:, :, column], (..., at))
            error = (block[:, :, column] - by_column.value(code, (..., at))) / factor[:, at, at, None]
            block[:, :, column:].addcmul_(error.unsqueeze(-1), factor[:, at, at:stop].unsqueeze(1), value=-1)
            errors[:, :, column] = error
            codes.append(code)
        work[:, :, stop:] -= errors @ factor[:, start:stop, stop:]
    inverse = order.argsort(dim=-1).unsqueeze(1).expand(experts, weight.shape[1], -1)
    stacked = torch.stack(codes, dim=-1)
    if stacked.dtype == torch.uint8:
        return quantized(grid, stacked.gather(2, inverse))
    return quantized(grid, stacked.view(torch.uint8).gather(2, inverse).view(stacked.dtype))  # no e4m3 gather


def _inverse_factor(hessian: torch.Tensor) -> torch.Tensor:
    """Upper Cholesky factor R of the inverse, float32 [E, K, K]: row k feeds column k's error to later columns.

    H = U U^T with U upper triangular, from the Cholesky factor of H in reversed order, gives R = U^-1 without an
    inverse of H. One expert at a time: GPU libraries factor large matrices faster alone than in a batch.
    """
    factors = torch.empty_like(hessian, dtype=torch.float32)
    identity = torch.eye(hessian.shape[-1], dtype=hessian.dtype, device=hessian.device)
    failed = []
    for one, factor in zip(hessian, factors, strict=True):
        lower, info = torch.linalg.cholesky_ex(one.flip(0, 1))
        failed.append(info)
        factor.copy_(torch.linalg.solve_triangular(lower, identity, upper=False).flip(0, 1))
    bad = torch.stack(failed).nonzero().flatten().tolist()
    if bad:
        raise ValueError(f"Hessians of stacked experts {bad} are not positive definite; are activations finite?")
    return factors
