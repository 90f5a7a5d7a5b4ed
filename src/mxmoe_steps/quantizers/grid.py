"""The quantization grid: per-group scales and zero points, rounding to it, and back.

A weight is ``code * scale - zero * scale`` with an unsigned integer code, or ``value * scale`` with an e4m3
value or a number of a `MicroscalingFloat`, whose scale is a power of two. Scales and zero points are bfloat16, the 16
bits that the budget counts, and so is their product, as in the kernels; codes are chosen against the rounded numbers,
so 16 bits cost no accuracy. Zero points are real numbers: they cost the same 16 bits as integers and fit skewed groups
better. Symmetric schemes have the fixed zero point 2**(bits-1) and store none.
"""

import math
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch

from mxmoe_steps import packing
from mxmoe_steps.schemes import MicroscalingFloat, Scheme

E4M3 = torch.float8_e4m3fn
E4M3_MAX = 448.0

_SHRINKS = tuple(1.0 - 0.05 * step for step in range(1, 15))  # candidate ranges, fractions of max - min
_E8M0_EXPONENTS = (-126, 127)  # of normal float32
_REFINEMENTS = 4  # alternating least-squares steps after the range search


@dataclass(frozen=True)
class Grid:
    """Scales and zero points, float32 [..., N, G] with bfloat16-representable values."""

    scheme: Scheme
    scales: torch.Tensor
    zeros: torch.Tensor

    @cached_property
    def offsets(self) -> torch.Tensor:
        """Weights of code 0."""
        return _offsets(self.scales, self.zeros)

    @cached_property
    def origins(self) -> torch.Tensor:
        """Codes of weight 0, real numbers: the zero points, but for the rounding of `offsets`."""
        return -(self.offsets / self.scales)

    def columns(self, index: torch.Tensor) -> "Grid":
        """The grid of single input features: ``index`` int64 [B, c] of one batch of rows [B, N, K]."""
        group = torch.zeros_like(index) if self.scheme.group == -1 else index // self.scheme.group
        picked = group.unsqueeze(-2).expand(*self.scales.shape[:-1], -1)
        return replace(self, scales=self.scales.gather(-1, picked), zeros=self.zeros.gather(-1, picked))

    def round(self, values: torch.Tensor, at: Any = ...) -> torch.Tensor:
        """Codes of ``values``, laid out as the scales or as ``scales[at]``: uint8, or e4m3 for fp8 weights."""
        if self.scheme.e4m3_weights:
            return (values / self.scales[at]).clamp(-E4M3_MAX, E4M3_MAX).to(E4M3)
        if self.scheme.floats is not None:
            return float_codes(values / self.scales[at], self.scheme.floats)
        return self.nearest(values, at).to(torch.uint8)

    def nearest(self, values: torch.Tensor, at: Any = ...) -> torch.Tensor:
        """Integer codes of ``values`` as float32."""
        return (values / self.scales[at]).add_(self.origins[at]).round_().clamp_(0, 2**self.scheme.weight_bits - 1)

    def value(self, codes: torch.Tensor, at: Any = ...) -> torch.Tensor:
        """float32 weights of ``codes``."""
        return code_values(codes, self.scheme) * self.scales[at] + self.offsets[at]


@dataclass(frozen=True)
class QuantizedWeight:
    """A stack of linear blocks under one scheme.

    ``codes``: uint8 (or e4m3) [..., N, K]; ``scales`` bfloat16 [..., N, G], or float32 where rows share them;
    ``zeros`` bfloat16 [..., N, G], or None for symmetric schemes.
    """

    scheme: Scheme
    codes: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor | None

    def __getitem__(self, index: int | slice | tuple[slice, ...]) -> "QuantizedWeight":
        """Some of the stack's blocks or rows."""
        zeros = None if self.zeros is None else self.zeros[index]
        return replace(self, codes=self.codes[index], scales=self.scales[index], zeros=zeros)

    def dequantize(self) -> torch.Tensor:
        """float32 [..., N, K], exactly what the packed weights mean."""
        return dequantize(self.scheme, self.codes, self.scales, self.zeros)

    def tensors(self) -> dict[str, torch.Tensor]:
        """What a checkpoint stores: packed ``qweight``, ``scales`` and, if asymmetric, ``zeros``."""
        if self.scheme.e4m3_weights:
            codes = self.codes.view(torch.uint8)  # loaders that cast floating tensors leave bytes alone
        else:
            codes = packing.pack(self.codes, self.scheme.weight_bits)
        scales = self.scales if self.scheme.floats is None else to_e8m0(self.scales)
        if (rows := self.scheme.scale_rows) > 1:
            scales = scales[..., ::rows, :].contiguous().view(torch.uint8)
        stored = {"qweight": codes, "scales": scales}
        return stored if self.zeros is None else stored | {"zeros": self.zeros}


def concatenate(parts: list[QuantizedWeight]) -> QuantizedWeight:
    """One stack of stacks under one scheme."""
    codes = torch.cat([part.codes.view(torch.uint8) for part in parts]).view(parts[0].codes.dtype)  # no e4m3 cat
    zeros = None if parts[0].zeros is None else torch.cat([part.zeros for part in parts if part.zeros is not None])
    return QuantizedWeight(parts[0].scheme, codes, torch.cat([part.scales for part in parts]), zeros)


def from_tensors(scheme: Scheme, in_features: int, tensors: dict[str, torch.Tensor]) -> QuantizedWeight:
    """Inverse of `QuantizedWeight.tensors`."""
    codes = tensors["qweight"]
    codes = codes.view(E4M3) if scheme.e4m3_weights else packing.unpack(codes, scheme.weight_bits, in_features)
    scales = tensors["scales"] if scheme.floats is None else from_e8m0(tensors["scales"])
    if scheme.scale_rows > 1:
        scales = scales.view(torch.float32).repeat_interleave(scheme.scale_rows, -2)
    return QuantizedWeight(scheme, codes, scales, tensors.get("zeros"))


def to_e8m0(scales: torch.Tensor) -> torch.Tensor:
    """Powers of two, bfloat16 or float32, as their exponents + 127, uint8."""
    return scales.to(torch.float8_e8m0fnu).view(torch.uint8)


def from_e8m0(exponents: torch.Tensor) -> torch.Tensor:
    """Inverse of `to_e8m0`: bfloat16."""
    return exponents.view(torch.float8_e8m0fnu).bfloat16()


def float_codes(values: torch.Tensor, floats: MicroscalingFloat) -> torch.Tensor:
    """Codes, uint8, of the numbers nearest to ``values``; those halfway between two take the even code, as IEEE 754."""
    magnitudes = torch.tensor(floats.magnitudes, device=values.device)
    edges = (magnitudes[1:] + magnitudes[:-1]) / 2
    above_odd = edges[1::2]  # halfway between an odd code and the next one, which takes it
    edges[1::2] = torch.nextafter(above_odd, torch.zeros_like(above_odd))
    codes = torch.bucketize(values.abs(), edges)
    return (codes + (values < 0) * (codes > 0) * len(magnitudes)).to(torch.uint8)


def code_values(codes: torch.Tensor, scheme: Scheme) -> torch.Tensor:
    """What codes are, float32."""
    if scheme.floats is None:
        return codes.float()
    magnitudes = torch.tensor(scheme.floats.magnitudes, device=codes.device)
    return torch.cat([magnitudes, -magnitudes])[codes.int()]


def dequantize(scheme: Scheme, codes: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor | None) -> torch.Tensor:
    """float32 [..., N, K] of codes [..., N, K], scales and zero points [..., N, G]."""
    scales, zeros = scales.float(), fixed_zeros(scheme, scales) if zeros is None else zeros.float()
    offsets = _offsets(scales, zeros)
    values = _grouped(code_values(codes, scheme), scheme) * scales.unsqueeze(-1) + offsets.unsqueeze(-1)
    return values.flatten(-2)[..., : codes.shape[-1]].contiguous()


def find_grid(weight: torch.Tensor, scheme: Scheme, importance: torch.Tensor | None = None) -> Grid:
    """Grid for ``weight``, float32 [..., N, K], of least weighted squared error among those searched.

    ``importance``: float32 [..., K], non-negative weights of the input features (all ones if None).
    Search: shrunken min-max ranges, then alternating least squares between codes and (scale, zero),
    which for 1 bit is Lloyd's 2-means. A constant group gets a scale that reproduces it.
    """
    values = _grouped(weight, scheme)
    weights = torch.ones_like(weight[..., :1, :]) if importance is None else importance.unsqueeze(-2)
    filling = -weight.shape[-1] % scheme.group_size(weight.shape[-1])
    mass = _grouped(torch.nn.functional.pad(weights, (0, filling)), scheme)  # what fills a ragged group has no weight
    mass = mass / mass.sum(-1, keepdim=True).clamp_min(1e-30) + 1e-6  # no feature is worthless
    if scheme.e4m3_weights:
        scales = values.abs().amax(-1) / E4M3_MAX
        return Grid(scheme, _to_bf16(_nonzero(scales)), torch.zeros_like(scales))
    if scheme.floats is not None:
        return _shared_exponents(scheme, values, mass)
    low, high = values.amin(-1), values.amax(-1)
    if scheme.symmetric:
        high = torch.maximum(high, -low)
        low = -high
    levels = 2**scheme.weight_bits - 1
    best = _make_grid(scheme, low, high, levels)
    best_error = _error(best, values, mass)
    for shrink in _SHRINKS:
        centre, half = (low + high) / 2, (high - low) / 2 * shrink
        shrunk = _make_grid(scheme, centre - half, centre + half, levels)
        best, best_error = _better(best, best_error, shrunk, values, mass)
    for _ in range(_REFINEMENTS):
        best, best_error = _better(best, best_error, _least_squares(best, values, mass), values, mass)
    return best


def _shared_exponents(scheme: Scheme, values: torch.Tensor, mass: torch.Tensor) -> Grid:
    """The powers of two of least error: the specification's, which brings the largest magnitude of a group into the
    binade of the largest number, or one of its neighbours. A group of zeros takes 1."""
    assert scheme.floats is not None
    largest = _nonzero(values.abs().amax(-1))
    zeros = torch.zeros_like(largest)
    exponents = largest.frexp().exponent - math.frexp(scheme.floats.magnitudes[-1])[1]
    first, *others = (
        Grid(scheme, torch.ldexp(torch.ones_like(largest), (exponents + step).clamp(*_E8M0_EXPONENTS)), zeros)
        for step in (0, 1, -1)
    )
    best, best_error = first, _error(first, values, mass)
    for other in others:
        best, best_error = _better(best, best_error, other, values, mass)
    return best


def round_to_nearest(weight: torch.Tensor, scheme: Scheme, importance: torch.Tensor | None = None) -> QuantizedWeight:
    """Quantize ``weight`` [..., N, K] to the nearest points of its grid."""
    grid = find_grid(weight, scheme, importance)
    codes = grid_codes(grid, weight)
    return quantized(grid, codes)


def grid_codes(grid: Grid, weight: torch.Tensor) -> torch.Tensor:
    """Nearest codes, [..., N, K], of ``weight`` [..., N, K]."""
    grouped = _expanded(grid).round(_grouped(weight, grid.scheme))
    return grouped.flatten(-2)[..., : weight.shape[-1]].contiguous()


def quantized(grid: Grid, codes: torch.Tensor) -> QuantizedWeight:
    """Bundle codes with their grid in storage types."""
    zeros = None if grid.scheme.symmetric else grid.zeros.bfloat16()
    return QuantizedWeight(grid.scheme, codes, grid.scales.bfloat16(), zeros)


def quantize_activations(x: torch.Tensor, scheme: Scheme) -> torch.Tensor:
    """Dynamic symmetric per-token quantization of ``x`` [T, K], returned as float32 values.

    The arithmetic of the kernels: one float32 scale per token, max|x| on the largest code; a 16-bit
    scheme returns ``x`` unchanged.
    """
    if scheme.act_bits == 16:
        return x
    top = E4M3_MAX if scheme.fp8 else float(2 ** (scheme.act_bits - 1) - 1)
    largest = x.abs().amax(-1, keepdim=True).float().clamp_min(1e-30)
    scale = largest / largest.new_full((), top)  # a GPU multiplies by the inverse of a number, and ties go elsewhere
    scaled = x.float() / scale
    codes = scaled.clamp_(-top, top).to(E4M3).float() if scheme.fp8 else scaled.round_().clamp_(-top, top)
    return codes.mul_(scale)


def fixed_zeros(scheme: Scheme, scales: torch.Tensor) -> torch.Tensor:
    value = 0.0 if scheme.e4m3_weights or scheme.floats is not None else float(2 ** (scheme.weight_bits - 1))
    return torch.full_like(scales, value, dtype=torch.float32)


def _grouped(x: torch.Tensor, scheme: Scheme) -> torch.Tensor:
    """[..., K] to [..., G, g]; a last ragged group repeats its final value, which moves no range."""
    size = scheme.group_size(x.shape[-1])
    missing = -x.shape[-1] % size
    if missing:
        x = torch.cat([x, x[..., -1:].expand(*x.shape[:-1], missing)], -1)
    return x.unflatten(-1, (-1, size))


def _expanded(grid: Grid) -> Grid:
    return replace(grid, scales=grid.scales.unsqueeze(-1), zeros=grid.zeros.unsqueeze(-1))


def _offsets(scales: torch.Tensor, zeros: torch.Tensor) -> torch.Tensor:
    """Weights of code 0, rounded as the kernels do."""
    return _to_bf16(-zeros * scales)


def _to_bf16(x: torch.Tensor) -> torch.Tensor:
    return x.bfloat16().float()


def _nonzero(scales: torch.Tensor) -> torch.Tensor:
    return torch.where(scales.abs() < 1e-20, torch.ones_like(scales), scales)


def _make_grid(scheme: Scheme, low: torch.Tensor, high: torch.Tensor, levels: int) -> Grid:
    if scheme.symmetric:
        scales = _to_bf16(_nonzero(high / (2 ** (scheme.weight_bits - 1) - 0.5)))
        return Grid(scheme, scales, fixed_zeros(scheme, high))
    scales = _to_bf16(_nonzero(torch.where(high > low, (high - low) / levels, low.abs())))
    return Grid(scheme, scales, _to_bf16(-low / scales))


def _error(grid: Grid, values: torch.Tensor, mass: torch.Tensor) -> torch.Tensor:
    wide = _expanded(grid)
    if grid.scheme.floats is None:
        restored = wide.nearest(values).mul_(wide.scales).add_(wide.offsets)
    else:
        restored = wide.value(wide.round(values))
    return restored.sub_(values).square_().mul_(mass).sum(-1)


def _better(
    best: Grid, best_error: torch.Tensor, candidate: Grid, values: torch.Tensor, mass: torch.Tensor
) -> tuple[Grid, torch.Tensor]:
    error = _error(candidate, values, mass)
    wins = error < best_error
    merged = Grid(
        best.scheme,
        torch.where(wins, candidate.scales, best.scales),
        torch.where(wins, candidate.zeros, best.zeros),
    )
    return merged, torch.minimum(error, best_error)


def _least_squares(grid: Grid, values: torch.Tensor, mass: torch.Tensor) -> Grid:
    """Best (scale, zero) for the codes that ``grid`` gives: weighted regression of values on codes."""
    codes = _expanded(grid).nearest(values)
    if grid.scheme.symmetric:
        centred = codes - grid.zeros.unsqueeze(-1)
        scale = (mass * centred * values).sum(-1) / (mass * centred.square()).sum(-1).clamp_min(1e-30)
        return Grid(grid.scheme, _to_bf16(torch.where(scale > 1e-20, scale, grid.scales)), grid.zeros)
    total = mass.sum(-1)
    code_mean, value_mean = (mass * codes).sum(-1) / total, (mass * values).sum(-1) / total
    code_dev, value_dev = codes - code_mean.unsqueeze(-1), values - value_mean.unsqueeze(-1)
    scale = (mass * code_dev * value_dev).sum(-1) / (mass * code_dev.square()).sum(-1).clamp_min(1e-30)
    scale = _to_bf16(torch.where(scale > 1e-20, scale, grid.scales))
    return Grid(grid.scheme, scale, _to_bf16(code_mean - value_mean / scale))
