"""What the kernels' decoders make of stored words: the shipped PTX, interpreted on the CPU."""

import re
from collections.abc import Callable

import pytest
import torch
from kernel_weights import random_weight

pytest.importorskip("cutlass")

from mxmoe_steps.kernels import decode
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
    """The result of `decode._ptx`."""
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
    monkeypatch.setattr(decode, "_ptx", interpret)


def words_of(weight: QuantizedWeight, thread: int) -> list[int]:
    """A thread's words of rows 64-127 and 128 features, in the order in which it loads them."""
    packed = kernel_weights(weight)
    bits = packed.format.bits
    rows_64 = packed.data[: packed.format.chunk_bytes].view(2, -1)[1]
    loads = [rows_64[: 128 * 16 * max(1, bits // 2)].view(torch.int32).view(-1, 128, 4)]
    if bits == 3:
        loads.append(rows_64[128 * 16 : 128 * 24].view(torch.int32).view(1, 128, 2))
    return [int(word) & WORD for load in loads for part in load for word in part[thread]]


def registers_of(bits: int, words: list[int], block: int, rows: list[decode.Affine]) -> list[int]:
    """The decoder's registers for a k16 block."""
    if bits == 4:
        return decode.bf16_from_4bit(words[block], rows)
    if bits == 2:
        return decode.bf16_from_2bit(words[block // 2], block, rows)
    return decode.bf16_from_3bit(words[block // 2], words[4 + block // 4], block, rows)


@pytest.mark.parametrize("spread", [1.0, 60.0], ids=["near 1", "2**-60 to 2**11"])
@pytest.mark.parametrize("name", ["w4a16", "w4a16_g128_sym", "w3a16", "w3a16_g128_sym", "w2a16", "w1a16"])
def test_words_become_bfloat16_weights(name: str, spread: float) -> None:
    """Rounded once, and 2**-16 as large, as the epilogue expects."""
    weight = random_weight(name, 1, 128, 128)
    scales = 2.0 ** torch.linspace(-spread, 10.99 if spread > 1 else 1.0, 128)
    weight = QuantizedWeight(weight.scheme, weight.codes, scales.bfloat16().view(1, 128, 1), weight.zeros)
    bits = kernel_weights(weight).format.bits
    exact = weight.dequantize()[0].bfloat16().double()
    for thread in THREADS:
        warp, lane = divmod(thread, 32)
        words = words_of(weight, thread)
        both = 64 + 16 * warp + lane // 4 + torch.tensor([0, 8])  # the thread's two rows
        zeros = None if weight.zeros is None else pair(weight.zeros[0, both, 0].float() * -(2.0**-decode.SHRINK))
        rows = [decode.affine(bits, row, pair(weight.scales[0, both, 0]), zeros) for row in (0, 1)]
        for block in range(8):
            for register, word in enumerate(registers_of(bits, words, block, rows)):
                column = 16 * block + 8 * (register // 2) + 2 * (lane % 4)
                expected = exact[both[register % 2], column : column + 2]
                assert torch.equal(halves(word) * 2.0**decode.SHRINK, expected), (thread, block, register)


def test_bytes_become_numbers_around_128() -> None:
    weight = random_weight("w8a16", 1, 128, 128)
    for thread in THREADS:
        warp, lane = divmod(thread, 32)
        words = words_of(weight, thread)
        for block in range(8):
            for register, word in enumerate(decode.bf16_from_8bit((words[2 * block], words[2 * block + 1]))):
                row = 64 + 16 * warp + 8 * (register % 2) + lane // 4
                column = 16 * block + 8 * (register // 2) + 2 * (lane % 4)
                codes = weight.codes[0, row, column : column + 2].double()
                assert torch.equal(halves(word), (codes - 128) / 64)


@pytest.mark.parametrize(
    ("name", "decoder", "kind", "unit"),
    [("w4a8_fp8", decode.fp8_from_4bit, E4M3, 2.0**-9), ("w4a8", decode.int8_from_4bit, torch.int8, 1.0)],
)
def test_words_become_8_bit_operands(name: str, decoder: Callable, kind: torch.dtype, unit: float) -> None:
    weight = random_weight(name, 1, 128, 128)
    for thread in THREADS:
        warp, lane = divmod(thread, 32)
        words = words_of(weight, thread)
        for block in range(4):
            for register in range(4):
                word = decoder(words[2 * block + register // 2], register)
                made = torch.tensor(list(word.to_bytes(4, "little")), dtype=torch.uint8).view(kind).float()
                row = 64 + 16 * warp + 8 * (register % 2) + lane // 4
                column = 32 * block + 16 * (register // 2) + 4 * (lane % 4)
                assert torch.equal(made / unit, weight.codes[0, row, column : column + 4].float() - 8)
