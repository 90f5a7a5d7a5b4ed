"""What the parts of source formats mean as numbers, float32."""

import numpy as np
import torch

_BYTES = np.arange(256, dtype=np.uint8)
_PAIRS = np.stack((_BYTES & 0xF, _BYTES >> 4), axis=-1)  # two codes a byte, the lower bits first
_MAGNITUDES = np.array([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0], np.float32)  # OCP Microscaling Formats 1.0, table 5

# The number, or the two of them, that a byte means
E4M3 = torch.from_numpy(_BYTES).view(torch.float8_e4m3fn).float().numpy()
E8M0 = np.append(np.ldexp(np.float32(1), _BYTES[:255].astype(int) - 127), np.float32(np.nan))
INT8 = _BYTES.view(np.int8).astype(np.float32)
OFFSET_INT8 = _BYTES - np.float32(128)
OFFSET_INT4 = _PAIRS - np.float32(8)
E2M1 = np.concatenate((_MAGNITUDES, -_MAGNITUDES))[_PAIRS]


def numbers(codes: torch.Tensor, table: np.ndarray) -> torch.Tensor:
    """What bytes [..., b] mean: [..., b] with a ``table`` [256], [..., 2 b] with one [256, 2].

    numpy takes from a table several times faster than PyTorch does, and than PyTorch converts from types of 8 bits.
    """
    entries = table if table.ndim == 1 else table.view(np.complex64).squeeze(-1)
    taken = np.take(entries, codes.contiguous().view(torch.uint8).numpy())
    return torch.from_numpy(taken.view(np.float32))


def of_scales(scales: torch.Tensor) -> torch.Tensor:
    """Scales as float32; bytes are exponents."""
    return numbers(scales, E8M0) if scales.dtype == torch.uint8 else scales.float()


def times_scales(values: torch.Tensor, scales: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    """``values`` float32 [N, K], which are overwritten, times the scales [n, k] of blocks of ``rows`` x ``columns``.

    The last blocks of a row or column may be smaller.
    """
    by_row = scales.repeat_interleave(rows, dim=0)[: len(values)]
    whole = values.shape[1] // columns
    values[:, : whole * columns].unflatten(1, (whole, columns)).mul_(by_row[:, :whole, None])
    values[:, whole * columns :].mul_(by_row[:, whole:])
    return values
