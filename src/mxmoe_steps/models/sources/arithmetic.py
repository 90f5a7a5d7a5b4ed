"""What the parts of source formats mean as numbers, float32."""

import torch

_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # OCP Microscaling Formats 1.0, table 5


def times_scales(values: torch.Tensor, scales: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    """``values`` float32 [N, K], which are overwritten, times the scales [n, k] of blocks of ``rows`` x ``columns``.

    The last blocks of a row or column may be smaller.
    """
    by_row = scales.repeat_interleave(rows, dim=0)[: len(values)]
    whole = values.shape[1] // columns
    values[:, : whole * columns].unflatten(1, (whole, columns)).mul_(by_row[:, :whole, None])
    values[:, whole * columns :].mul_(by_row[:, whole:])
    return values


def of_scales(scales: torch.Tensor) -> torch.Tensor:
    """Scales as float32; bytes are exponents, e8m0."""
    if scales.dtype != torch.uint8:
        return scales.float()
    powers = torch.tensor([2.0 ** (byte - 127) for byte in range(256)])
    return powers[scales.int()]


def of_nibbles(codes: torch.Tensor) -> torch.Tensor:
    """Bytes [..., b] to the two numbers in 0 .. 15 of each, the lower bits first, int32 [..., 2 b]."""
    return torch.stack((codes & 0xF, codes >> 4), dim=-1).flatten(-2).int()


def of_e2m1(codes: torch.Tensor) -> torch.Tensor:
    """Bytes [..., b] of two fp4 codes each, the lower bits first, to their values [..., 2 b]."""
    values = torch.tensor([*_E2M1, *(-value for value in _E2M1)])
    return values[of_nibbles(codes)]
