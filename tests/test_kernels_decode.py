"""What the kernels' decoders make of stored words: the shipped PTX, interpreted on the CPU."""

import re
from collections.abc import Callable

import pytest
import torch
from kernel_weights import random_weight

from mxmoe_steps.kernels import ptx
from mxmoe_steps.kernels.codes.format import HALF_ROWS, OPERAND_BITS, Format
from mxmoe_steps.kernels.formats import FORMATS
from mxmoe_steps.kernels.layouts import kernel_weights
from mxmoe_steps.quantizers.grid import E4M3, QuantizedWeight

WORD = 0xFFFFFFFF
THREADS = (0, 32 * 2 + 13, 127)


def halves(word: int) -> torch.Tensor:
    """Two bfloat16 bit patterns as float64, the low one first."""
    return torch.tensor([word & 0xFFFF, word >> 16], dtype=torch.int32).short().view(torch.bfloat16).double()


def pair(values: torch.Tensor) -> int:
    """Two numbers rounded to bfloat16 in a word."""
    low, high = (int(bits) & 0xFFFF for bits in values.bfloat16().view(torch.int16))
    return high << 16 | low


def permuted(a: int, b: int, selector: int) -> int:
    """``prmt``: four of eight bytes; a selector's highest bit spreads the byte's sign."""
    data = (b << 32 | a).to_bytes(8, "little")
    picked = []
    for place in range(4):
        nibble = selector >> 4 * place & 15
        byte = data[nibble & 7]
        picked.append((0xFF if byte & 0x80 else 0) if nibble & 8 else byte)
    return int.from_bytes(bytes(picked), "little")


def looked_up(a: int, b: int, c: int, table: int) -> int:
    """``lop3``: a bitwise function of three words by its truth table."""
    word = 0
    for bit in range(32):
        index = (a >> bit & 1) << 2 | (b >> bit & 1) << 1 | (c >> bit & 1)
        word |= (table >> index & 1) << bit
    return word


INSTRUCTIONS: dict[str, Callable[..., int]] = {
    "mov.b32": lambda a: a,
    "and.b32": lambda a, b: a & b,
    "add.u32": lambda a, b: a + b,
    "shr.u32": lambda a, n: a >> n,
    "shl.b32": lambda a, n: a << n,
    "shf.r.wrap.b32": lambda a, b, n: (b << 32 | a) >> (n & 31),
    "prmt.b32": permuted,
    "lop3.b32": looked_up,
    "mul.rn.bf16x2": lambda a, b: pair(halves(a) * halves(b)),
    "fma.rn.bf16x2": lambda a, b, c: pair(halves(a) * halves(b) + halves(c)),
}


def interpret(text: str, *arguments: int) -> int:
    """The result of `ptx.compute`."""
    registers = {f"{{$r{place}}}": argument & WORD for place, argument in enumerate(arguments)}
    for statement in filter(None, map(str.strip, text.split(";"))):
        if statement.startswith(".reg"):
            continue
        name, operands = statement.split(None, 1)
        target, *sources = re.split(r",\s*", operands)
        values = [registers[source] if source in registers else int(source, 0) for source in sources]
        registers[target] = INSTRUCTIONS[name](*values) & WORD
    return registers["{$w0}"]


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ptx, "compute", interpret)


DECODED = [format_ for format_ in FORMATS if format_.decoded]
BORROWERS = ["w1a16", "w1a16_g128_sym", "w4a16_g-1_asym", "w4a8_g-1_sym", "w4a8_g-1_sym_fp8", "w4a4_g-1_sym"]
NAMES = [*(format_.name for format_ in DECODED), *BORROWERS]
SCALES = {"near 1": (-1.0, 1.0), "2**-60 to 2**10.99": (-60.0, 10.99)}


def stored(weight: QuantizedWeight, thread: int) -> tuple[Format, list[int], list[int]]:
    """Of a chunk of rows 64-127: a thread's words, in the order in which it loads them, and its rows' numbers."""
    packed = kernel_weights(weight)
    format_ = packed.format
    half = packed.data[: packed.format.chunk_bytes].view(2, -1)[1]
    words, at = [], 0
    for load in format_.loads:
        size = 128 * 4 * load.words
        words += half[at : at + size].view(torch.int32).view(128, load.words)[thread].tolist()
        at += size
    numbers = half[at:].view(torch.int32).view(HALF_ROWS // 2, -1)[thread // 4].tolist()
    return format_, [word & WORD for word in words], [word & WORD for word in numbers]


def elements(word: int, operand: str) -> torch.Tensor:
    """What a register holds, float64, the lowest first."""
    if operand == "bf16":
        return halves(word)
    if operand == "int4":
        return torch.tensor([((word >> shift & 15) ^ 8) - 8 for shift in range(0, 32, 4)]).double()
    data = torch.tensor(list(word.to_bytes(4, "little")), dtype=torch.uint8)
    return data.view(E4M3 if operand == "fp8" else torch.int8).double()


@pytest.mark.parametrize("spread", SCALES.values(), ids=SCALES)
@pytest.mark.parametrize("name", NAMES)
def test_words_become_operands(name: str, spread: tuple[float, float]) -> None:
    """Registers of every block as `Format.operands` says in torch, bit for bit."""
    weight = random_weight(name, 1, 128, 128)
    exponents = torch.linspace(*spread, weight.scales.numel()).view_as(weight.scales)
    scales = 2.0 ** (exponents.round() if weight.scheme.floats else exponents)
    weight = QuantizedWeight(weight.scheme, weight.codes, scales.bfloat16(), weight.zeros)
    for thread in THREADS:
        warp, lane = divmod(thread, 32)
        format_, words, numbers = stored(weight, thread)
        exact = format_.operands(weight)[0]
        in_register = 32 // OPERAND_BITS[format_.operand]
        blocks = 128 // (8 * in_register)
        terms: list[int] = []
        for block in range(blocks):
            if 2 * block % blocks == 0 and 2 * block // blocks in format_.term_halves:
                terms = format_.terms(numbers, 2 * block // blocks)
            for register, word in enumerate(format_.decode(words, block, terms)):
                row = 64 + 16 * warp + 8 * (register % 2) + lane // 4
                column = in_register * (8 * block + 4 * (register // 2) + lane % 4)
                expected = exact[row, column : column + in_register]
                assert torch.equal(elements(word, format_.operand), expected), (thread, block, register)


@pytest.mark.parametrize("format_", DECODED, ids=lambda format_: format_.name)
def test_operands_are_the_weights_but_for_what_the_epilogue_and_the_loops_multiply_by(format_: Format) -> None:
    weight = random_weight(format_.name, 2, 64, 128)
    whole = format_.operands(weight) * format_.growth
    if format_.channel_scaled:
        whole *= weight.scales.double()
    elif format_.operand != "bf16":
        per_row = format_.numbers(weight[0]).double()[..., 0]  # of one group
        whole = whole[0] * per_row
        weight = weight[0]
    exact = weight.dequantize().double()
    assert ((whole - exact).abs() <= exact.abs() * 2**-8).all()  # rounded to bfloat16 once


@pytest.mark.parametrize("format_", DECODED, ids=lambda format_: format_.name)
def test_what_a_thread_holds_suffices(format_: Format) -> None:
    """Half a chunk is decoded from words that are loaded for it or the half before."""
    weight = random_weight(format_.name, 1, 128, 128)
    _, words, numbers = stored(weight, 0)
    first, late = 0, []
    for load in format_.loads:
        late += [load.half == 1] * load.words
        first += load.words
    assert first == format_.words == 2 * format_.bits
    spoilt = [word ^ WORD if unseen else word for word, unseen in zip(words, late, strict=True)]
    blocks = 4 * OPERAND_BITS[format_.operand] // 16
    terms = format_.terms(numbers, 0) if format_.term_halves else []
    for block in range(blocks):
        assert format_.decode(words, block, terms) == format_.decode(spoilt, block, terms)
