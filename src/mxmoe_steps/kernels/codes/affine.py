"""Integer codes of fewer than 8 bits for bfloat16 activations: code * scale - zero * scale, a scale per 128 features.

A code in the low eight bits of a bfloat16 whose other bits are zero is a number of code * 2**-133 * 2**(lowest bit):
subnormal numbers and the first binade of normal ones lie equally far apart. So a mask makes a number of a code, and
one fused multiply-add a weight of the number, rounded once. Weights are 2**-`SHRINK` times as large as they should
be, so that factors are finite; the epilogue makes up for it.
"""

from typing import TYPE_CHECKING, Any, ClassVar

from mxmoe_steps.kernels import ptx
from mxmoe_steps.kernels.codes.format import GROUP, Format
from mxmoe_steps.schemes import Scheme

if TYPE_CHECKING:
    import torch

    from mxmoe_steps.quantizers.grid import QuantizedWeight

SHRINK = 16
# PTX: n = (-0, -0). Products are sums with it: GPUs before Hopper do not multiply bfloat16, but multiply and add.
MINUS_ZERO = ".reg .b32 n; mov.b32 n, 0x80008000;"
ZERO_UNIT = -(2.0**-SHRINK)  # of stored zero points: a power of two, so none is rounded


class AffineFormat(Format):
    """``lowest``: of a code when it is masked, by register.

    Numbers of a row: its scale and, with ``zeros``, its zero point times `ZERO_UNIT`, bfloat16.
    Terms of a row: scale * 2**(133 - `SHRINK` - lowest bit) for its two registers of a block, and
    -zero * scale * 2**-`SHRINK`, as pairs of equal bfloat16.
    """

    group = GROUP
    asymmetric = True
    row_numbers = 1
    term_halves = (0,)
    growth = 2.0**SHRINK
    scale_limit = 2.0**11  # 117 is added to the exponent of a scale
    lowest: ClassVar[tuple[int, ...]]

    def store(self, codes: "torch.Tensor", scheme: Scheme) -> "torch.Tensor":
        """Codes of a narrower symmetric scheme have another middle."""
        return codes + self._off_middle(scheme)

    def restore(self, codes: "torch.Tensor", scheme: Scheme) -> "torch.Tensor":
        """Inverse of `store`."""
        return codes - self._off_middle(scheme)

    def _off_middle(self, scheme: Scheme) -> int:
        return 2 ** (self.bits - 1) - 2 ** (scheme.weight_bits - 1) if scheme.symmetric else 0

    def numbers(self, weight: "QuantizedWeight") -> "torch.Tensor":
        """Scales, then zero points, as the class says."""
        import torch

        rows, features = weight.codes.shape
        both = [weight.scales, *([] if weight.zeros is None else [weight.zeros.bfloat16() * ZERO_UNIT])]
        return torch.stack([each.bfloat16().expand(rows, -(-features // GROUP)) for each in both], -1)

    def scales(self, numbers: "torch.Tensor", scheme: Scheme) -> tuple["torch.Tensor", "torch.Tensor | None"]:
        """Inverse of `numbers`."""
        import torch

        values = numbers.view(torch.bfloat16)
        scales = values[..., 0].contiguous()
        return scales, values[..., 1] / ZERO_UNIT if self.zeros else None

    def operands(self, weight: "QuantizedWeight") -> "torch.Tensor":
        """Rounded once."""
        return weight.dequantize().bfloat16().double() / self.growth

    def terms(self, numbers: list[Any], half: int) -> list[Any]:
        """Powers of two are added to the exponent of the scale; a scale of zero leaves numbers below 2**-120 of codes.
        Without zero points, they are the middle code."""
        return [term for row in range(2) for term in self._terms_of(row, numbers)]

    def _terms_of(self, row: int, numbers: list[Any]) -> list[Any]:
        both = f"prmt.b32 {{$w0}}, {{$r0}}, {{$r0}}, {(0x1010, 0x3232)[row]:#x};"
        pair = ptx.compute(both, numbers[0])
        factors = [pair + (133 - SHRINK - self.lowest[register] << 7) * 0x10001 for register in (row, row + 2)]
        if self.zeros:
            text = f"{MINUS_ZERO} fma.rn.bf16x2 {{$w0}}, {{$r0}}, {{$r1}}, n;"
            offset = ptx.compute(text, pair, ptx.compute(both, numbers[1]))
        else:
            middle = (0x8000 | 127 + self.bits - 1 - SHRINK << 7) * 0x10001  # -(2**(bits - 1)) * 2**-SHRINK
            text = f".reg .b32 m; mov.b32 m, {middle:#x}; {MINUS_ZERO} fma.rn.bf16x2 {{$w0}}, {{$r0}}, m, n;"
            offset = ptx.compute(text, pair)
        return [*factors, offset]

    def weights(self, register: int, terms: Any, *parts: tuple[Any, int]) -> Any:
        """The weights of ``register`` from words that have some bits of its codes where they belong; ``parts``: a word
        and the code's bits that it has, each."""
        row = 3 * (register % 2)
        masked = [(word, (bits << self.lowest[register]) * 0x10001) for word, bits in parts]
        return ptx.either(masked, "fma.rn.bf16x2 {$w0}, t, {$r0}, {$r1};", terms[row + register // 2], terms[row + 2])
