"""Per-row quantization to 8 and 4 bits inside a kernel (CuTe DSL), and a sigmoid: what `tokens`, `activations` and the
epilogue of gate and up share.

The arithmetic is that of `reference.quantize_tokens` on a CPU, bit for bit but for the sign of zeros: one float32
scale per row, correctly rounded division, round to nearest even.
"""

from dataclasses import dataclass
from typing import Any

import cutlass
from cutlass import BFloat16, Float32, Int32, Uint8, const_expr, cute

from mxmoe_steps.kernels.limits import OPERAND_MASKS

VECTOR = 8  # elements a thread moves at once: 16 bytes of bfloat16
BF16, FP8, INT8, INT4 = (OPERAND_MASKS[name] for name in ("bf16", "fp8", "int8", "int4"))
LARGEST = {FP8: 448.0, INT8: 127.0, INT4: 7.0}

_TO_CODES = {
    FP8: "{ .reg .b16 l, h; cvt.rn.satfinite.e4m3x2.f32 l, {$r1}, {$r0}; "
    "cvt.rn.satfinite.e4m3x2.f32 h, {$r3}, {$r2}; mov.b32 {$w0}, {l, h}; }",
    INT8: "{ .reg .b32 a, b, c, d; cvt.rni.s32.f32 a, {$r0}; cvt.rni.s32.f32 b, {$r1}; "
    "cvt.rni.s32.f32 c, {$r2}; cvt.rni.s32.f32 d, {$r3}; cvt.pack.sat.s8.s32.b32 c, d, c, 0; "
    "cvt.pack.sat.s8.s32.b32 {$w0}, b, a, c; }",
    INT4: "{ .reg .b32 a, b, c, d; cvt.rni.s32.f32 a, {$r0}; cvt.rni.s32.f32 b, {$r1}; "
    "cvt.rni.s32.f32 c, {$r2}; cvt.rni.s32.f32 d, {$r3}; cvt.pack.sat.s4.s32.b32 c, d, c, 0; "
    "cvt.pack.sat.s4.s32.b32 {$w0}, b, a, c; }",
}


LOG2_E = 1.4426950408889634


def sigmoid(value: Float32) -> Float32:
    """1 / (1 + exp(-value)) to about 1e-7."""
    return cute.arch.inline_ptx(
        "{ .reg .f32 a; mul.f32 a, {$r0}, {$r1}; ex2.approx.ftz.f32 a, a; add.f32 a, a, 0f3F800000; "
        "rcp.approx.ftz.f32 {$w0}, a; }",
        write_only_types=[Float32],
        read_only_args=[value, Float32(-LOG2_E)],
    )


def swiglu(gate: cute.Tensor, up: cute.Tensor) -> cute.Tensor:
    """silu(gate) * up of bfloat16 in registers, in float32 and rounded once to bfloat16."""
    values = cute.make_rmem_tensor((cute.size(gate),), Float32)
    for e in range(cute.size(gate)):
        value = Float32(gate[e])
        values[e] = value * sigmoid(value) * Float32(up[e])
    products = cute.make_fragment_like(values, BFloat16)
    products.store(values.load().to(BFloat16))
    return products


def vectors(tensor: cute.Tensor, row: Int32, size: int = VECTOR) -> cute.Tensor:
    """Row ``row`` of ``tensor`` [rows, columns] as (size, columns / size)."""
    layout = cute.make_layout((size, tensor.shape[1] // size), stride=(1, size))
    return cute.make_tensor(tensor[row, None].iterator, layout)


def larger(pair: Int32, other: Int32) -> Int32:
    """Larger magnitudes of two bfloat16 pairs; NaN wins."""
    return cute.arch.inline_ptx(
        "{ .reg .b32 t, u; mov.b32 u, {$r0}; abs.bf16x2 t, {$r1}; max.NaN.bf16x2 {$w0}, u, t; }",
        write_only_types=[Int32],
        read_only_args=[pair, other],
    )


def magnitude(pair: Int32) -> Float32:
    """The larger half of a pair of magnitudes as float32, at least 1e-30."""
    return cute.arch.inline_ptx(
        "{ .reg .b32 l, h; .reg .f32 a, b; shl.b32 l, {$r0}, 16; and.b32 h, {$r0}, 0xFFFF0000; mov.b32 a, l; "
        "mov.b32 b, h; max.NaN.f32 a, a, b; mov.b32 b, 0x0DA24260; max.NaN.f32 {$w0}, a, b; }",
        write_only_types=[Float32],
        read_only_args=[pair],
    )


def largest_of_warp(largest: Int32) -> Int32:
    """A pair of the largest magnitudes of the warp's pairs, in every lane."""
    for step in (16, 8, 4, 2, 1):
        largest = larger(largest, cute.arch.shuffle_sync_bfly(largest, step))
    return largest


@cute.jit
def largest_of_block(largest: Int32, shared: cute.Tensor) -> Float32:
    """The largest magnitude of the block's pairs, in every thread; ``shared``: int32, one per warp."""
    largest = largest_of_warp(largest)
    warp = cute.arch.warp_idx()  # a warp-wide exchange: not inside a branch
    if cute.arch.lane_idx() == 0:
        shared[warp] = largest
    cute.arch.sync_threads()
    for warp in cutlass.range_constexpr(cute.size(shared)):
        largest = larger(largest, shared[warp])
    return magnitude(largest)


def divide(value: Float32, by: Float32) -> Float32:
    """IEEE division."""
    return cute.arch.inline_ptx(
        "div.rn.f32 {$w0}, {$r0}, {$r1};", write_only_types=[Float32], read_only_args=[value, by]
    )


def quotient(value: Float32, by: Float32, inverse: Float32) -> Float32:
    """``value / by``, correctly rounded: one Newton step from the product with the rounded inverse."""
    return cute.arch.inline_ptx(
        "{ .reg .f32 q, e; mul.rn.f32 q, {$r0}, {$r2}; neg.f32 e, q; fma.rn.f32 e, e, {$r1}, {$r0}; "
        "fma.rn.f32 {$w0}, e, {$r2}, q; }",
        write_only_types=[Float32],
        read_only_args=[value, by, inverse],
    )


@dataclass(frozen=True)
class Outputs:
    """A row-major [rows, K] matrix in every operand type: bfloat16, or uint8 bits with float32 scales [rows].

    ``int4``: [rows, K / 2], two a byte, the first one in its low bits; None where no GPU of the class reads it.
    """

    bf16: Any
    fp8: Any
    fp8_scales: Any
    int8: Any
    int8_scales: Any
    int4: Any = None
    int4_scales: Any = None


@dataclass(frozen=True)
class Scales:
    """A row's scale and its inverse for both 8-bit types and, if there is an output of it, int4."""

    fp8: Float32
    fp8_inverse: Float32
    int8: Float32
    int8_inverse: Float32
    int4: Any = None
    int4_inverse: Any = None

    @staticmethod
    def of(largest: Float32, outputs: Outputs) -> "Scales":
        """From the largest magnitude of the row."""
        fp8, int8 = (divide(largest, Float32(LARGEST[kind])) for kind in (FP8, INT8))
        scales = fp8, divide(Float32(1.0), fp8), int8, divide(Float32(1.0), int8)
        if outputs.int4 is None:
            return Scales(*scales)
        int4 = divide(largest, Float32(LARGEST[INT4]))
        return Scales(*scales, int4, divide(Float32(1.0), int4))


@dataclass(frozen=True)
class Vector:
    """Registers of eight neighbouring elements of a row: bfloat16, and the codes of the other types."""

    bf16: Any
    fp8: Any
    int8: Any
    int4: Any

    @staticmethod
    def make() -> "Vector":
        codes = [cute.make_rmem_tensor((size,), Uint8) for size in (VECTOR, VECTOR, VECTOR // 2)]
        return Vector(cute.make_rmem_tensor((VECTOR,), BFloat16), *codes)


def _words(registers: cute.Tensor) -> cute.Tensor:
    """The same registers as 32-bit words."""
    words = cute.size(registers) * registers.element_type.width // 32
    return cute.make_tensor(cute.recast_ptr(registers.iterator, dtype=Int32), cute.make_layout(words))


@cute.jit
def larger_of(largest: Int32, eight: cute.Tensor) -> Int32:
    """``largest``, a pair of magnitudes, and those of eight bfloat16."""
    pairs = _words(eight)
    for j in cutlass.range_constexpr(VECTOR // 2):
        largest = larger(largest, pairs[j])
    return largest


@cute.jit
def encode(vector: Vector, mask: Int32, scales: Scales) -> None:
    """Fill the codes of the types in ``mask`` from the bfloat16 values."""
    if (mask & FP8) != 0:
        _round_to(FP8, vector.bf16, scales.fp8, scales.fp8_inverse, vector.fp8)
    if (mask & INT8) != 0:
        _round_to(INT8, vector.bf16, scales.int8, scales.int8_inverse, vector.int8)
    if const_expr(scales.int4 is not None):  # noqa: SIM102  (the other condition is the GPU's)
        if (mask & INT4) != 0:
            _round_to(INT4, vector.bf16, scales.int4, scales.int4_inverse, vector.int4)


def _round_to(kind: int, eight: cute.Tensor, scale: Float32, inverse: Float32, codes: cute.Tensor) -> None:
    words = _words(codes)
    scaled = [quotient(Float32(eight[j]), scale, inverse) for j in range(VECTOR)]
    halves = [
        cute.arch.inline_ptx(_TO_CODES[kind], write_only_types=[Int32], read_only_args=scaled[4 * i : 4 * i + 4])
        for i in range(2)
    ]
    if kind == INT4:
        words[0] = halves[0] & 0xFFFF | halves[1] << 16
    else:
        for i in range(2):
            words[i] = halves[i]


@cute.jit
def store(vector: Vector, mask: Int32, outputs: Outputs, row: Int32, at: Int32) -> None:
    """Vector ``at`` of row ``row``, in every type of ``mask``."""
    if (mask & BF16) != 0:
        cute.autovec_copy(vector.bf16, vectors(outputs.bf16, row)[None, at])
    if (mask & FP8) != 0:
        cute.autovec_copy(vector.fp8, vectors(outputs.fp8, row)[None, at])
    if (mask & INT8) != 0:
        cute.autovec_copy(vector.int8, vectors(outputs.int8, row)[None, at])
    if const_expr(outputs.int4 is not None):  # noqa: SIM102  (the other condition is the GPU's)
        if (mask & INT4) != 0:
            cute.autovec_copy(vector.int4, vectors(outputs.int4, row, VECTOR // 2)[None, at])


@cute.jit
def store_scales(scales: Scales, mask: Int32, outputs: Outputs, row: Int32) -> None:
    """The scales of row ``row``; one thread's work."""
    if (mask & FP8) != 0:
        outputs.fp8_scales[row] = scales.fp8
    if (mask & INT8) != 0:
        outputs.int8_scales[row] = scales.int8
    if const_expr(outputs.int4 is not None):  # noqa: SIM102  (the other condition is the GPU's)
        if (mask & INT4) != 0:
            outputs.int4_scales[row] = scales.int4
