"""Kernel order of weights: what one thread decodes lies side by side, so that one 16-byte load feeds it.

Formats that the tensor cores read directly (w16a16, w8a8) stay ``[entries, N, K]`` rows. Decoded formats are
cut into chunks of 128 rows x 128 input features, ``[entries, ceil(N/128), ceil(K/128)]`` of them, each

    codes, 16 or 8 bytes x 128 threads at a time | numbers of rows, 16 bits each: [4 warps, 8, number, 2 rows]

for rows 0-63 and then for rows 64-127, with an empty chunk at the end, because the last slot of a row may read past it.
What a format makes of scales and zero points are the numbers of a row; those of the two rows of a thread, 8 apart, are
neighbours. Inside a chunk, thread ``t = 128 g + 32 w + l`` (rows 64 g and on, warp w, lane l) owns 64 codes, the A
fragments of ``wgmma`` and ``mma.sync``. Register ``r`` of k-block ``b`` holds row
``64 g + 16 w + 8 (r % 2) + l / 4`` and

    bf16       k16 blocks b = 0..7, features k = 16 b + 8 (r / 2) + 2 (l % 4) + i,  i = 0, 1
    fp8, int8  k32 blocks b = 0..3, features k = 32 b + 16 (r / 2) + 4 (l % 4) + i, i = 0..3

Where their bits lie in the thread's words every code says for itself, see `codes`.
"""

from dataclasses import dataclass
from functools import cache

import torch

from mxmoe_steps.errors import UserError
from mxmoe_steps.kernels.codes.format import EDGE, GROUP, TILE_ROWS, Field, Format
from mxmoe_steps.kernels.codes.w16a16 import W16A16
from mxmoe_steps.kernels.formats import kernel_format
from mxmoe_steps.kernels.limits import GATE_ROWS
from mxmoe_steps.quantizers.grid import E4M3, QuantizedWeight
from mxmoe_steps.schemes import Scheme

THREADS = 256
CODES = TILE_ROWS * GROUP // THREADS  # codes of one thread in a chunk
CODES_AT_ONCE = 2**25  # that are worth arranging together
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


def entries_at_once(rows: int, features: int) -> int:
    """How many blocks of that size to arrange together: few launches, and memory for some 700 MB."""
    return max(1, CODES_AT_ONCE // (rows * features))


def original_weights(weight: torch.Tensor) -> KernelWeights:
    """Kernel order of unquantized weights, bfloat16 [entries, N, K]."""
    if weight.dtype != torch.bfloat16 or weight.ndim != 3:
        raise UserError(f"weights are {weight.dtype} {list(weight.shape)}; expected bfloat16 [entries, N, K]")
    entries, rows, features = weight.shape
    _check_edges(rows, features)
    return KernelWeights(W16A16(), entries, rows, features, weight.contiguous(), None)


def kernel_weights(weight: QuantizedWeight) -> KernelWeights:
    """Kernel order of quantized ``weight``, codes [entries, N, K]; inverse: `quantized_weight`.

    What is made on the way takes some 20 bytes a code, see `entries_at_once`. `UserError` for schemes without a kernel,
    sizes that are no multiple of 64, scales or zero points that are not finite, and scales that are too large to decode
    with.
    """
    format_ = kernel_format(weight.scheme)
    if weight.codes.ndim != 3:
        raise UserError(f"codes have shape {list(weight.codes.shape)}; expected [entries, N, K]")
    entries, rows, features = weight.codes.shape
    _check_edges(rows, features)
    _check_scales(weight, format_)
    channel_scales = None
    if format_.channel_scaled:
        channel_scales = torch.nn.functional.pad(weight.scales[..., 0].float(), (0, -rows % TILE_ROWS)).contiguous()
    if not format_.decoded:
        data = format_.store(weight.codes.contiguous(), weight.scheme)
        return KernelWeights(format_, entries, rows, features, data, channel_scales)
    chunks = _chunks_of(weight, format_)
    data = torch.cat([chunks, chunks.new_zeros(PAD_CHUNKS * format_.chunk_bytes)])
    return KernelWeights(format_, entries, rows, features, data, channel_scales)


def gate_and_up(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """Rows of gate and up [entries, N, X] in the order of gated kernels, [entries, 2 N, X]."""
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
        return QuantizedWeight(scheme, format_.restore(weights.data, scheme), scales, None)
    row_tiles, chunks = -(-rows // TILE_ROWS), -(-features // GROUP)
    halves = weights.data[: -PAD_CHUNKS * format_.chunk_bytes].view(
        weights.entries, row_tiles, chunks, 2, format_.half_bytes
    )
    codes = _from_fragments(_join_words(halves[..., : format_.code_bytes], format_), format_)
    codes = format_.restore(codes, scheme)[:, :rows, :features].contiguous()
    if format_.grouped:
        numbers = halves[..., format_.code_bytes :].contiguous().view(torch.int16)
        numbers = numbers.view(weights.entries, row_tiles, chunks, 2, 4, 8, format_.all_numbers, 2)
        #                                                       half warp row of 8             r%2
        per_row = numbers.permute(0, 1, 3, 4, 7, 5, 2, 6).flatten(1, 5)[:, :rows]
        groups = -(-features // scheme.group_size(features))
        scales, zeros = (
            None if each is None else each[..., :groups].contiguous()
            for each in format_.scales(per_row.contiguous(), scheme)
        )
    assert scales is not None
    return QuantizedWeight(scheme, codes, scales, zeros)


def _check_edges(rows: int, features: int) -> None:
    if rows % EDGE or features % EDGE or not rows or not features:
        raise UserError(f"weights are [{rows}, {features}]; the kernels need multiples of {EDGE}")


def _check_scales(weight: QuantizedWeight, format_: Format) -> None:
    """The device is waited for once."""
    zeros = weight.scales if weight.zeros is None else weight.zeros
    small = weight.scales.abs().amax() < format_.scale_limit
    finite, finite_zeros, all_small = torch.stack(
        [weight.scales.isfinite().all(), zeros.isfinite().all(), small]
    ).tolist()
    for name, right in (("scales", finite), ("zero points", finite_zeros)):
        if not right:
            raise UserError(f"{weight.scheme.name}: some {name} are not finite")
    if not all_small:
        raise UserError(
            f"{weight.scheme.name}: some scales are {format_.scale_limit:.0f} or more, too large for the kernels"
        )


def _chunks_of(weight: QuantizedWeight, format_: Format) -> torch.Tensor:
    """The chunks of linear blocks [entries, N, K], uint8, one-dimensional."""
    entries, rows, features = weight.codes.shape
    codes = format_.store(weight.codes, weight.scheme)
    codes = torch.nn.functional.pad(codes, (0, -features % GROUP, 0, -rows % TILE_ROWS)).flatten(0, 1)
    parts = [_split_words(_to_fragments(codes, format_), format_)]
    if format_.grouped:
        numbers = format_.numbers(_rows_of(weight)).view(torch.int16).unflatten(0, (entries, rows))
        numbers = torch.nn.functional.pad(numbers, (0, 0, 0, 0, 0, -rows % TILE_ROWS)).flatten(0, 1)
        split = numbers.view(-1, 2, 4, 2, 8, *numbers.shape[1:])  # tile, half, warp, r%2, row of 8, chunk, number
        parts.append(split.permute(0, 5, 1, 2, 4, 6, 3).contiguous().view(torch.uint8).flatten(3))
    return torch.cat(parts, -1).flatten()


def _rows_of(weight: QuantizedWeight) -> QuantizedWeight:
    """Blocks [entries, N, K] as one of [entries * N, K]."""
    zeros = None if weight.zeros is None else weight.zeros.flatten(0, 1)
    return QuantizedWeight(weight.scheme, weight.codes.flatten(0, 1), weight.scales.flatten(0, 1), zeros)


def _fragment_shape(format_: Format) -> tuple[int, int, int]:
    """Blocks, registers and elements of a register that hold a thread's 64 codes."""
    elements = 32 // format_.act_bits
    return (CODES // (4 * elements), 4, elements)


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


def _fields(format_: Format, device: torch.device) -> list[Field]:
    """Where the bits of a thread's 64 codes go."""
    axes = (torch.arange(size, device=device) for size in _fragment_shape(format_))
    return format_.fields(*(axis.flatten() for axis in torch.meshgrid(*axes, indexing="ij")))


@cache
def _packing(format_: Format, device: torch.device) -> list[tuple[Field, list[tuple[torch.Tensor, torch.Tensor]]]]:
    """Fields with the words that have equally many of their codes: words [W] and those codes [W, n], for every n.

    Codes of a word are summed side by side: adding them up by their words would take atomics on a GPU.
    """
    found = []
    for field, there in zip(_fields(format_, torch.device("cpu")), _fields(format_, device), strict=True):
        codes_of: dict[int, list[int]] = {}
        for code, word in enumerate(field.word.tolist()):
            codes_of.setdefault(word, []).append(code)
        alike: dict[int, list[int]] = {}
        for word, codes in codes_of.items():
            alike.setdefault(len(codes), []).append(word)
        groups = [
            (torch.tensor(words, device=device), torch.tensor([codes_of[word] for word in words], device=device))
            for words in alike.values()
        ]
        found.append((there, groups))
    return found


def _split_words(codes: torch.Tensor, format_: Format) -> torch.Tensor:
    """Codes [N/128, K/128, 256, 64] to the code bytes of each half chunk, uint8 [N/128, K/128, 2, bytes]."""
    codes = codes.int()
    words = codes.new_zeros(*codes.shape[:-1], format_.words)
    for field, words_of in _packing(format_, codes.device):
        bits = (codes >> field.low & 2**field.width - 1) << field.shift.int()
        for word, code in words_of:
            words[..., word] += bits[..., code].sum(-1, dtype=torch.int32)
    data = words.view(torch.uint8).view(*words.shape, 4)  # little-endian
    loads = data.split([load.words for load in format_.loads], -2)
    return torch.cat([load.flatten(-2).unflatten(-2, (2, -1)).flatten(-2) for load in loads], -1)


def _join_words(data: torch.Tensor, format_: Format) -> torch.Tensor:
    """Inverse of `_split_words` with a leading entries axis: uint8 [..., 2, bytes] to codes [..., 256, 64]."""
    loads = data.split([THREADS // 2 * 4 * load.words for load in format_.loads], -1)
    parts = [load.unflatten(-1, (THREADS // 2, -1)).flatten(-3, -2) for load in loads]
    words = torch.cat(parts, -1).view(torch.int32).long()
    codes = words.new_zeros(*words.shape[:-1], CODES)
    for field in _fields(format_, words.device):
        codes |= (words[..., field.word] >> field.shift & 2**field.width - 1) << field.low
    return codes.to(torch.uint8)
