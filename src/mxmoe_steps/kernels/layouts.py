"""Kernel order of weights: what one thread decodes lies side by side, so that one 16-byte load feeds it.

Formats that the tensor cores read directly (w16a16, w8a8) stay ``[entries, N, K]`` rows. Decoded formats are
cut into chunks of 128 rows x 128 input features, ``[entries, ceil(N/128), ceil(K/128)]`` of them, each

    codes, 16 bytes x 128 threads at a time | scales, zero points: bf16 [4 warps, 8, (scale, zero point), 2 rows]

for rows 0-63 and then for rows 64-127, with the last only where the format has them, and an empty chunk at the
end, because the last slot of a row may read past it. Scales of the two rows of a thread, 8 apart, are neighbours, and
their zero points, times -2**-16 (see `decode`), follow them. Inside a chunk, thread ``t = 128 g + 32 w + l`` (rows
64 g and on, warp w, lane l) owns 64 codes, the A fragments of ``wgmma``. Register ``r`` of k-block ``b`` holds row
``64 g + 16 w + 8 (r % 2) + l / 4`` and

    bf16       k16 blocks b = 0..7, features k = 16 b + 8 (r / 2) + 2 (l % 4) + i,  i = 0, 1
    fp8, int8  k32 blocks b = 0..3, features k = 32 b + 16 (r / 2) + 4 (l % 4) + i, i = 0..3

Bits of one 32-bit word (msb left; ``r.i`` is element i of register r, primes mark the next block):

    4 bit, bf16: 1 word a block     3.1  2.1  1.1  0.1  3.0  2.0  1.0  0.0            4 bits each
    2 bit, bf16: 1 word 2 blocks    3'.1 2'.1 1'.1 0'.1 3.1 2.1 1.1 0.1 | same with .0   2 bits each
    3 bit, bf16: the low two bits as the 2-bit format; the high bits 1 word 4 blocks, bit `_THIRD_BITS` + 16 i
    8 bit, bf16: 1 word 2 registers   1.1  0.1  1.0  0.0   then  3.1  2.1  3.0  2.0      8 bits each
    4 bit, fp8 and int8: 1 word 2 registers   1.3 0.3 1.2 0.2 1.1 0.1 1.0 0.0  then 3.3 2.3 ...   4 bits each

so that a mask, and for some registers a shift, gives its elements in place. 4-bit codes for int8 are stored as two's
complement. The fp8 format stores value v as v for v >= 0 and as 8 + (|v| - 1) below. 4-bit codes for fp8 and int8
have the sign bits of a word four places further left, in a circle: so a sign is in its operand's sign bit, for odd
registers after the word is turned right by four. e4m3 bit patterns 0..8 are linear, so ``magnitude bits + 0x81 * sign``
is the fp8 operand, times 2**-9, which the stored scales make up for; the int8 operand repeats the sign above the three
low bits.
"""

from dataclasses import dataclass

import torch

from mxmoe_steps.errors import UserError
from mxmoe_steps.kernels.formats import EDGE, GATE_ROWS, GROUP, HALF_ROWS, SHRINK, TILE_ROWS, Format, kernel_format
from mxmoe_steps.quantizers.grid import E4M3, QuantizedWeight
from mxmoe_steps.schemes import Scheme

THREADS = 256
CODES = TILE_ROWS * GROUP // THREADS  # codes of one thread in a chunk
_THIRD_BITS = ((2, 4, 6, 8), (3, 5, 7, 9), (10, 12, 14, 0), (11, 13, 15, 1))  # by k-block and register
LARGEST_SCALE = 2.0**11  # and not that itself: `decode` adds 117 to the exponent of a scale
ZERO_UNIT = -(2.0**-SHRINK)  # of stored zero points: a power of two, so none is rounded
FP8_UNIT = 2.0**9  # the same of stored scales, where operands are codes * 2**-9
PAD_CHUNKS = 1  # a slot holds at most 2 chunks


@dataclass(frozen=True)
class KernelWeights:
    """Weights of one format in kernel order: a stack of ``entries`` linear blocks [N, K].

    ``data``: bfloat16 or uint8 [entries, N, K], or uint8 chunks, one-dimensional, for decoded formats.
    ``channel_scales``: float32 [entries, N rounded up to 128], or None for formats without.
    """

    format: Format
    entries: int
    out_features: int
    in_features: int
    data: torch.Tensor
    channel_scales: torch.Tensor | None

    def to(self, device: torch.device | str) -> "KernelWeights":
        """The same weights on ``device``."""
        scales = None if self.channel_scales is None else self.channel_scales.to(device)
        return KernelWeights(
            self.format, self.entries, self.out_features, self.in_features, self.data.to(device), scales
        )


@dataclass(frozen=True)
class _Plane:
    """Bits ``low .. low + width - 1`` of the 64 codes of a thread: the word and the shift of each."""

    low: int
    width: int
    word: torch.Tensor
    shift: torch.Tensor

    @property
    def words(self) -> int:
        return CODES * self.width // 32


def original_weights(weight: torch.Tensor) -> KernelWeights:
    """Kernel order of unquantized weights, bfloat16 [entries, N, K]."""
    if weight.dtype != torch.bfloat16 or weight.ndim != 3:
        raise UserError(f"weights are {weight.dtype} {list(weight.shape)}; expected bfloat16 [entries, N, K]")
    entries, rows, features = weight.shape
    _check_edges(rows, features, EDGE)
    return KernelWeights(Format("bf16", 16), entries, rows, features, weight.contiguous(), None)


def kernel_weights(weight: QuantizedWeight) -> KernelWeights:
    """Kernel order of quantized ``weight``, codes [entries, N, K]; inverse: `quantized_weight`.

    `UserError` for schemes without a kernel, sizes that are no multiple of 64 (K: of 128 with groups), scales or
    zero points that are not finite, and scales that are too large to decode with.
    """
    format_ = kernel_format(weight.scheme)
    if weight.codes.ndim != 3:
        raise UserError(f"codes have shape {list(weight.codes.shape)}; expected [entries, N, K]")
    entries, rows, features = weight.codes.shape
    _check_edges(rows, features, GROUP if format_.grouped else EDGE)
    for name, values in (("scales", weight.scales), ("zero points", weight.zeros)):
        if values is not None and not bool(values.isfinite().all()):
            raise UserError(f"{weight.scheme.name}: some {name} are not finite")
    if format_.grown and format_.grouped and float(weight.scales.abs().max()) >= LARGEST_SCALE:
        raise UserError(f"{weight.scheme.name}: some scales are {LARGEST_SCALE:.0f} or more, too large for the kernels")
    channel_scales = None
    if format_.channel_scaled:
        channel_scales = torch.nn.functional.pad(weight.scales[..., 0].float(), (0, -rows % TILE_ROWS)).contiguous()
    if not format_.decoded:
        codes = weight.codes.contiguous()
        data = codes.view(torch.uint8) if format_.operand == "fp8" else codes ^ 0x80
        return KernelWeights(format_, entries, rows, features, data, channel_scales)
    chunks = [_entry_chunks(weight[entry], format_) for entry in range(entries)]
    chunks.append(chunks[0].new_zeros(PAD_CHUNKS * format_.chunk_bytes))
    return KernelWeights(format_, entries, rows, features, torch.cat(chunks), channel_scales)


def gate_and_up(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """Rows of gate and up [entries, N, X] in the order of `KernelConfig.gated`, [entries, 2 N, X]."""
    both = [each.contiguous().view(torch.uint8) if each.dtype == E4M3 else each for each in (gate, up)]
    rows = torch.stack([each.unflatten(1, (-1, GATE_ROWS)) for each in both], 2).flatten(1, 3)
    return rows.view(E4M3) if gate.dtype == E4M3 else rows


def quantized_weight(weights: KernelWeights, scheme: Scheme) -> QuantizedWeight:
    """Exact inverse of `kernel_weights`: the codes, scales and zero points of ``scheme``."""
    format_, rows, features = weights.format, weights.out_features, weights.in_features
    scales = zeros = None
    if weights.channel_scales is not None:
        scales = weights.channel_scales[:, :rows, None].bfloat16()
    if not format_.decoded:
        assert scales is not None
        codes = weights.data.view(E4M3) if format_.operand == "fp8" else weights.data ^ 0x80
        return QuantizedWeight(scheme, codes, scales, None)
    row_tiles, groups = -(-rows // TILE_ROWS), -(-features // GROUP)
    shape = (weights.entries, row_tiles, groups, 2, format_.half_bytes)
    chunks = weights.data[: -PAD_CHUNKS * format_.chunk_bytes].view(shape)
    code_bytes = HALF_ROWS * GROUP * format_.bits // 8
    codes = _from_fragments(_join_words(chunks[..., :code_bytes], format_), format_)
    codes = _stored_codes(codes, format_, scheme, inverse=True)[:, :rows, :features].contiguous()
    if format_.grouped:
        pairs = chunks[..., code_bytes:].contiguous().view(torch.bfloat16)
        pairs = pairs.view(weights.entries, row_tiles, groups, 2, 4, 8, -1, 2)  # halves, warps, rows of one, value, r%2
        per_row = pairs.permute(6, 0, 1, 3, 4, 7, 5, 2).flatten(2, 6)[:, :, :rows]
        if scheme.group == -1:
            per_row = per_row[..., :1]
        scales = per_row[0] / FP8_UNIT if format_.operand == "fp8" else per_row[0].contiguous()
        zeros = per_row[1] / ZERO_UNIT if format_.zeros else None
    assert scales is not None
    return QuantizedWeight(scheme, codes, scales, zeros)


def _check_edges(rows: int, features: int, feature_multiple: int) -> None:
    if rows % EDGE or features % feature_multiple or not rows or not features:
        raise UserError(
            f"weights are [{rows}, {features}]; the kernels need output features in multiples of {EDGE}"
            f" and input features in multiples of {feature_multiple}"
        )


def _entry_chunks(weight: QuantizedWeight, format_: Format) -> torch.Tensor:
    """The chunks of one linear block [N, K], uint8, one-dimensional."""
    rows, features = weight.codes.shape
    codes = _stored_codes(weight.codes, format_, weight.scheme)
    codes = torch.nn.functional.pad(codes, (0, -features % GROUP, 0, -rows % TILE_ROWS))
    parts = [_split_words(_to_fragments(codes, format_), format_)]
    if format_.grouped:
        groups = codes.shape[1] // GROUP
        both = [weight.scales * FP8_UNIT if format_.operand == "fp8" else weight.scales]
        if weight.zeros is not None:
            both.append(weight.zeros.bfloat16() * ZERO_UNIT)
        values = torch.stack([each.bfloat16().expand(rows, groups) for each in both], -1)
        values = torch.nn.functional.pad(values, (0, 0, 0, 0, 0, -rows % TILE_ROWS))
        split = values.view(-1, 2, 4, 2, 8, groups, len(both))  # tile, half, warp, r%2, row of a warp, group, value
        pairs = split.permute(0, 5, 1, 2, 4, 6, 3).contiguous()
        parts.append(pairs.view(torch.uint8).flatten(3))
    return torch.cat(parts, -1).flatten()


def _stored_codes(codes: torch.Tensor, format_: Format, scheme: Scheme, inverse: bool = False) -> torch.Tensor:
    """Unsigned codes of the scheme to the codes the kernel decodes, or back; see the module's docstring."""
    if format_.operand == "fp8":
        return torch.where((codes >= 8) != inverse, codes ^ 8, codes ^ 15)
    if format_.operand == "int8":
        return codes ^ 8
    if scheme.symmetric and scheme.weight_bits == 1:  # zero point 1 of 1 bit, 2 of 2 bits
        return codes - 1 if inverse else codes + 1
    return codes


def _fragment_shape(format_: Format) -> tuple[int, int, int]:
    """Blocks, registers and elements of a register that hold a thread's 64 codes."""
    return (8, 4, 2) if format_.operand == "bf16" else (4, 4, 4)


def _to_fragments(codes: torch.Tensor, format_: Format) -> torch.Tensor:
    """[N, K] to [N/128, K/128, 256 threads, 64 codes]."""
    blocks, _, elements = _fragment_shape(format_)
    split = codes.view(-1, 2, 4, 2, 8, codes.shape[1] // GROUP, blocks, 2, 4, elements)
    #                  tile g  w  r%2 l/4                      b      r/2 l%4 i
    return split.permute(0, 5, 1, 2, 4, 8, 6, 7, 3, 9).reshape(split.shape[0], split.shape[5], THREADS, CODES)


def _from_fragments(codes: torch.Tensor, format_: Format) -> torch.Tensor:
    """[entries, N/128, K/128, 256, 64] to [entries, N, K]."""
    blocks, _, elements = _fragment_shape(format_)
    entries, row_tiles, groups = codes.shape[:3]
    split = codes.view(entries, row_tiles, groups, 2, 4, 8, 4, blocks, 2, 2, elements)
    #                                               g  w l/4 l%4  b   r/2 r%2  i
    rows = split.permute(0, 1, 3, 4, 9, 5, 2, 7, 8, 6, 10)
    return rows.reshape(entries, row_tiles * TILE_ROWS, groups * GROUP)


def _planes(format_: Format) -> list[_Plane]:
    """Where the bits of a thread's 64 codes go."""
    blocks, registers, elements = _fragment_shape(format_)
    b, r, i = (
        axis.flatten() for axis in torch.meshgrid(*map(torch.arange, (blocks, registers, elements)), indexing="ij")
    )
    if format_.operand != "bf16":
        return [_Plane(0, 4, 2 * b + r // 2, 8 * i + 4 * (r % 2))]
    if format_.bits == 8:
        return [_Plane(0, 8, 2 * b + r // 2, 16 * i + 8 * (r % 2))]
    if format_.bits == 4:
        return [_Plane(0, 4, b, 16 * i + 4 * r)]
    low = _Plane(0, 2, b // 2, 16 * i + 8 * (b % 2) + 2 * r)
    if format_.bits == 2:
        return [low]
    third = torch.tensor(_THIRD_BITS)[b % 4, r]
    return [low, _Plane(2, 1, b // 4, 16 * i + third)]


def _split_words(codes: torch.Tensor, format_: Format) -> torch.Tensor:
    """Codes [N/128, K/128, 256, 64] to the code bytes of each half chunk, uint8 [N/128, K/128, 2, bytes]."""
    parts = []
    for plane in _planes(format_):
        bits = (codes.long() >> plane.low) & (2**plane.width - 1)
        words = bits.new_zeros(*codes.shape[:-1], plane.words)
        words.index_add_(-1, plane.word.to(codes.device), bits << plane.shift.to(codes.device))
        if format_.operand != "bf16":
            words = _turn_signs(words, 4)
        pieces = words.view(torch.uint8).view(*words.shape, 8)[..., :4].flatten(-2)  # little-endian low halves
        width = min(16, 4 * plane.words)
        pieces = pieces.unflatten(-1, (-1, width)).unflatten(-3, (2, -1)).transpose(-2, -3)
        parts.append(pieces.flatten(-3))
    return torch.cat(parts, -1)


def _turn_signs(words: torch.Tensor, places: int) -> torch.Tensor:
    """32-bit words, in int64, with the highest bit of every code ``places`` further left, in a circle."""
    mask = 0x88888888
    signs = words & mask
    return words & 0x77777777 | (signs << places | signs >> (32 - places)) & mask


def _join_words(data: torch.Tensor, format_: Format) -> torch.Tensor:
    """Inverse of `_split_words` with a leading entries axis: uint8 [..., 2, bytes] to codes [..., 256, 64]."""
    codes = torch.zeros(*data.shape[:-2], THREADS, CODES, dtype=torch.int64, device=data.device)
    start = 0
    for plane in _planes(format_):
        size = THREADS // 2 * 4 * plane.words
        width = min(16, 4 * plane.words)
        pieces = data[..., start : start + size].unflatten(-1, (-1, THREADS // 2, width)).transpose(-2, -3)
        pieces = pieces.flatten(-2).flatten(-3, -2)
        words = pieces.unflatten(-1, (-1, 4)).contiguous().view(torch.int32).flatten(-2).long()
        if format_.operand != "bf16":
            words = _turn_signs(words, 28)
        bits = (words[..., plane.word.to(data.device)] >> plane.shift.to(data.device)) & (2**plane.width - 1)
        codes |= bits << plane.low
        start += size
    return codes.to(torch.uint8)
