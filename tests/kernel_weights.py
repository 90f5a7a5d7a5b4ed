"""Random quantized weights, as the kernels' layouts take them."""

import torch

from mxmoe_steps.quantizers.grid import E4M3, QuantizedWeight
from mxmoe_steps.schemes import parse_scheme


def random_weight(name: str, entries: int, rows: int, features: int, seed: int = 0) -> QuantizedWeight:
    """Codes over their whole range with random scales and zero points."""
    scheme = parse_scheme(name)
    generator = torch.Generator().manual_seed(seed)
    groups = -(-features // scheme.group_size(features))
    codes = torch.randint(0, 2**scheme.weight_bits, (entries, rows, features), generator=generator, dtype=torch.uint8)
    if scheme.fp8 and scheme.weight_bits == 8:
        codes = torch.randn(entries, rows, features, generator=generator).mul(30).to(E4M3)
    scales = torch.rand(entries, rows, groups, generator=generator).add(0.5).bfloat16()
    if scheme.floats is not None:
        scales = 2.0 ** torch.randint(-3, 3, scales.shape, generator=generator)
        return QuantizedWeight(scheme, codes, scales.bfloat16(), None)
    zeros = None
    if not scheme.symmetric:
        zeros = torch.rand(entries, rows, groups, generator=generator).mul(2**scheme.weight_bits).bfloat16()
    return QuantizedWeight(scheme, codes, scales, zeros)
