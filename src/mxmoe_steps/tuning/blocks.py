"""Blocks of a packed layer as numbers that gradients can move: codes, scales and zero points.

A block multiplies with what its packed weights mean, rounded as they are stored, and gradients pass through the
rounding as if it were not there (straight-through, Bengio et al., 2013). A code becomes a real number that rounds to
it. It begins where the original weight lies between the codes: a weight near the middle of two may change sides after a
few steps, one that lies on its code stays.
"""

from dataclasses import replace

import torch

from mxmoe_steps.quantizers.grid import QuantizedWeight, code_values, fixed_zeros, float_codes
from mxmoe_steps.quantizers.hadamard import rotate
from mxmoe_steps.schemes import Scheme

_INSIDE = 0.49  # of a step between codes, from a code to where the next one begins
_MOST_BITS = 4  # of codes that are tuned
_CODES, _SCALES, _ZEROS = 2.0, 1.0, 1.0  # their learning rates over that of the descent
_BETAS = (0.9, 0.95)
_LEAST = 1e-30  # gradient that still moves a number: Adam's steps do not depend on the loss's unit


def is_tuned(scheme: Scheme) -> bool:
    """Whether blocks under ``scheme`` have codes that are worth moving: those of 8 bits are as good as the weights, and
    published ones are to stay."""
    return scheme.weight_bits <= _MOST_BITS and not scheme.published


class TunedBlocks:
    """One block (gate, up or down) of some experts that have one scheme, on the device of ``packed``.

    ``originals``: the weights that were quantized, [E, N, K]. ``rotated``: the packed ones multiply rotated inputs.
    """

    def __init__(self, packed: QuantizedWeight, originals: torch.Tensor, rotated: bool) -> None:
        self._packed, self._rotated = packed, rotated
        self._scheme, self._features = packed.scheme, packed.codes.shape[-1]
        self._size = self._scheme.group_size(self._features)
        floats = self._scheme.floats
        self._first_scales = packed.scales.float()
        self._first_zeros = fixed_zeros(packed.scheme, packed.scales) if packed.zeros is None else packed.zeros.float()
        codes = code_values(packed.codes, self._scheme)
        if floats is None:
            exact = self._codes_of(rotate(originals.float()) if rotated else originals.float())
            self._codes = exact.clamp_(codes - _INSIDE, codes + _INSIDE)
            self._range = (-_INSIDE, 2**self._scheme.weight_bits - 1 + _INSIDE)
        else:
            self._codes = codes.clone()
            self._range = (-floats.magnitudes[-1], floats.magnitudes[-1])
        self._scales = torch.zeros_like(self._first_scales)  # logarithms of factors of the first ones
        self._zeros = torch.zeros_like(self._first_scales)  # differences from the first ones
        moving = [(self._codes, _CODES)]
        if floats is None:  # a power of two has no neighbour that is near enough
            moving.append((self._scales, _SCALES))
        if packed.zeros is not None:
            moving.append((self._zeros, _ZEROS))
        groups = [{"params": [tensor], "factor": factor} for tensor, factor in moving]
        self._adam = torch.optim.Adam(groups, betas=_BETAS, eps=_LEAST, fused=True)

    def quantized(self) -> QuantizedWeight:
        """As they would be stored now."""
        floats = self._scheme.floats
        codes = self._rounded().to(torch.uint8) if floats is None else float_codes(self._codes, floats)
        zeros = None if self._packed.zeros is None else self._stored_zeros()
        return replace(self._packed, codes=codes, scales=self._stored_scales(), zeros=zeros)

    def weights(self) -> torch.Tensor:
        """float32 [E, N, K]: what multiplies plain inputs now."""
        values = self._values()
        return rotate(values) if self._rotated else values

    def descend(self, gradient: torch.Tensor, rate: float) -> None:
        """One step of Adam down the ``gradient`` [E, N, K] of a loss with respect to `weights`."""
        gradient = gradient.to(torch.float32, memory_format=torch.contiguous_format)
        if self._rotated:
            gradient = rotate(gradient)
        self._codes.grad = gradient  # times the scale, which Adam divides out
        if self._scheme.floats is None:
            self._scales.grad = self._grouped(gradient * self._values()).sum(-1)  # of their logarithms
        if self._packed.zeros is not None:
            self._zeros.grad = -self._grouped(gradient).sum(-1)
        for group in self._adam.param_groups:
            group["lr"] = rate * group["factor"]
        self._adam.step()
        self._adam.zero_grad()
        self._codes.clamp_(*self._range)

    def _stored_scales(self) -> torch.Tensor:
        return (self._first_scales * self._scales.exp()).bfloat16()

    def _stored_zeros(self) -> torch.Tensor:
        return (self._first_zeros + self._zeros).bfloat16()

    def _rounded(self) -> torch.Tensor:
        return self._codes.round().clamp_(0, 2**self._scheme.weight_bits - 1)

    def _values(self) -> torch.Tensor:
        """float32 [E, N, K]: what the packed weights mean."""
        scales, offsets = self._affine()
        floats = self._scheme.floats
        codes = self._rounded() if floats is None else code_values(float_codes(self._codes, floats), self._scheme)
        values = torch.addcmul(offsets, self._grouped(codes), scales)
        return values.flatten(-2)[..., : self._features]

    def _affine(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Scales, and weights of code 0 rounded as the kernels do, [E, N, G, 1]."""
        scales, zeros = self._stored_scales().float(), self._stored_zeros().float()
        return scales.unsqueeze(-1), (-zeros * scales).bfloat16().float().unsqueeze(-1)

    def _codes_of(self, values: torch.Tensor) -> torch.Tensor:
        """Real numbers whose weights are ``values``."""
        scales, offsets = self._first_scales.unsqueeze(-1), -self._first_zeros * self._first_scales
        codes = (self._grouped(values) - offsets.unsqueeze(-1)) / scales
        return codes.flatten(-2)[..., : self._features].contiguous()

    def _grouped(self, values: torch.Tensor) -> torch.Tensor:
        """[E, N, K] to [E, N, G, g]; zeros fill a last ragged group."""
        if missing := -self._features % self._size:
            values = torch.nn.functional.pad(values, (0, missing))
        return values.unflatten(-1, (-1, self._size))
