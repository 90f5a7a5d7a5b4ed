"""The packed layout of quantized weights: dense bits along the input features.

Code ``k`` of a row occupies bits ``k*b .. k*b+b-1`` of the row's little-endian bit stream, so 8 codes
fill exactly ``b`` bytes and a row of K codes takes ``ceil(K/8)*b`` bytes::

    b = 3    byte 0           byte 1           byte 2
    bit      76543210         76543210         76543210
    code     22111000         54443332         77766655

8-bit codes and e4m3 weights are plain bytes. This is the layout of checkpoints;
kernels rearrange it at load time.
"""

import torch

from mxmoe_steps.schemes import CODES_PER_UNIT, packed_width


def pack(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Pack unsigned codes, uint8 [..., K] with values below 2**bits, to uint8 [..., ceil(K/8)*bits]."""
    if codes.dtype != torch.uint8:
        raise TypeError(f"codes are {codes.dtype}, expected uint8")
    in_features = codes.shape[-1]
    codes = torch.nn.functional.pad(codes, (0, -in_features % CODES_PER_UNIT))
    if bits == 8:
        return codes.contiguous()
    units = codes.unflatten(-1, (-1, CODES_PER_UNIT)).to(torch.int64)
    words = (units << (bits * torch.arange(CODES_PER_UNIT, device=codes.device))).sum(-1)
    return words.unsqueeze(-1).view(torch.uint8)[..., :bits].flatten(-2).contiguous()


def unpack(packed: torch.Tensor, bits: int, in_features: int) -> torch.Tensor:
    """Inverse of `pack`: uint8 [..., ceil(K/8)*bits] to codes, uint8 [..., in_features]."""
    if packed.shape[-1] != packed_width(in_features, bits):
        raise ValueError(
            f"packed rows of {packed.shape[-1]} bytes do not hold {in_features} codes of {bits} bits"
            f" ({packed_width(in_features, bits)} bytes)"
        )
    if bits == 8:
        return packed[..., :in_features].contiguous()
    units = packed.unflatten(-1, (-1, bits))
    words = torch.nn.functional.pad(units, (0, CODES_PER_UNIT - bits)).contiguous().view(torch.int64)
    codes = (words >> (bits * torch.arange(CODES_PER_UNIT, device=packed.device))) & (2**bits - 1)
    return codes.flatten(-2)[..., :in_features].to(torch.uint8)
