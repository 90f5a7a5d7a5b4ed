"""What experts that are not plain SwiGLU make of gate and up, as the operands of the down blocks (CuTe DSL).

`Activate` is `SwiGlu` with another function, with the biases of the row's expert, or without gate: see `gating.Gating`.
All of it is float32, rounded once to bfloat16; sums of the launch before were rounded to bfloat16.
"""

from collections.abc import Callable

import cutlass
from cutlass import BFloat16, Float32, Int32, const_expr, cute

from mxmoe_steps.gating import CLAMPED, Gating
from mxmoe_steps.kernels import rounding
from mxmoe_steps.kernels.activations import SwiGlu
from mxmoe_steps.kernels.architecture import Architecture
from mxmoe_steps.kernels.rounding import VECTOR

_TANH_FACTOR, _TANH_CUBIC = 1.5957691216057308, 0.044715  # 2 sqrt(2 / pi); of Hendrycks and Gimpel (2016)
_SQRT_HALF = 0.7071067811865476


def smaller(value: Float32, other: Float32) -> Float32:
    """The smaller one; NaN wins."""
    return cute.arch.inline_ptx(
        "min.NaN.f32 {$w0}, {$r0}, {$r1};", write_only_types=[Float32], read_only_args=[value, other]
    )


def larger(value: Float32, other: Float32) -> Float32:
    """The larger one; NaN wins."""
    return cute.arch.inline_ptx(
        "max.NaN.f32 {$w0}, {$r0}, {$r1};", write_only_types=[Float32], read_only_args=[value, other]
    )


def silu(x: Float32) -> Float32:
    return x * rounding.sigmoid(x)


def gelu(x: Float32) -> Float32:
    return Float32(0.5) * x * (Float32(1.0) + cute.math.erf(x * Float32(_SQRT_HALF)))


def gelu_tanh(x: Float32) -> Float32:
    """``1 + tanh(y)`` is twice the sigmoid of ``2 y``."""
    return x * rounding.sigmoid(Float32(_TANH_FACTOR) * (x + Float32(_TANH_CUBIC) * x * x * x))


def relu(x: Float32) -> Float32:
    return larger(x, Float32(0.0))


def relu2(x: Float32) -> Float32:
    positive = relu(x)
    return positive * positive


_FUNCTIONS: dict[str, Callable[[Float32], Float32]] = {  # those of `gating.FUNCTIONS`
    "silu": silu,
    "gelu": gelu,
    "gelu_pytorch_tanh": gelu_tanh,
    "relu": relu,
    "relu2": relu2,
}


class Activate(SwiGlu):
    """As `SwiGlu`, for any ``gating``.

    ``inputs``: sums of the launch before, bfloat16 [rows, 2 K], gate first, or [rows, K] without gate; biases, bfloat16
    [experts, as many columns], read where there are any; alpha; limit.
    """

    def __init__(self, architecture: Architecture, gating: Gating) -> None:
        super().__init__(architecture)
        self.gating = gating

    def source(self, inputs: tuple, expert: Int32) -> tuple:
        """All ``inputs`` and the row's expert."""
        return *inputs, expert

    def steps(self, inputs: tuple) -> Int32:
        """Vectors of a product."""
        return inputs[0].shape[1] // (self.gating.columns * VECTOR)

    @cute.jit
    def product(self, inputs: tuple, row: Int32, at: Int32, steps: Int32, eight: cute.Tensor) -> None:
        """Vector ``at`` of a row's product into ``eight``; ``inputs``: see `source`."""
        gating, alpha, limit = self.gating, inputs[2], inputs[3]
        values = cute.make_rmem_tensor((VECTOR,), Float32)
        if const_expr(gating.gated):
            up = self.sums(inputs, row, at + steps)
            gate = self.sums(inputs, row, at)
            for e in cutlass.range_constexpr(VECTOR):
                if const_expr(gating.function == CLAMPED):
                    clamped = smaller(gate[e], limit)
                    linear = larger(smaller(up[e], limit), -limit) + Float32(1.0)
                    values[e] = clamped * rounding.sigmoid(alpha * clamped) * linear
                else:
                    values[e] = _FUNCTIONS[gating.function](gate[e]) * up[e]
        else:
            up = self.sums(inputs, row, at)
            for e in cutlass.range_constexpr(VECTOR):
                values[e] = _FUNCTIONS[gating.function](up[e])
        eight.store(values.load().to(BFloat16))

    def sums(self, inputs: tuple, row: Int32, at: Int32) -> list[Float32]:
        """Vector ``at`` of a row, with biases."""
        vector = cute.make_rmem_tensor((VECTOR,), BFloat16)
        cute.autovec_copy(rounding.vectors(inputs[0], row)[None, at], vector)
        values = [Float32(vector[e]) for e in range(VECTOR)]
        if not self.gating.biased:
            return values
        biases = cute.make_rmem_tensor((VECTOR,), BFloat16)
        cute.autovec_copy(rounding.vectors(inputs[1], inputs[4])[None, at], biases)
        return [value + Float32(biases[e]) for e, value in enumerate(values)]
