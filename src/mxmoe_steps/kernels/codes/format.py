"""What a weight code has to say about itself. Stdlib only."""

from dataclasses import dataclass
from functools import total_ordering
from typing import Any, ClassVar

from mxmoe_steps.schemes import Scheme

Tensor = Any  # of torch, which is imported where it computes
Quantized = Any  # `quantizers.grid.QuantizedWeight`

TILE_ROWS = 128  # weight rows of a chunk
HALF_ROWS = 64  # of its halves, which lie one after the other
GROUP = 128  # input features of a chunk
EDGE = 64  # output and input features must be multiples of this

OPERAND_BITS = {"bf16": 16, "fp8": 8, "int8": 8, "int4": 4}


@dataclass(frozen=True)
class Load:
    """Neighbouring words of a thread, 4 or 2, that it fetches at once, before it decodes ``half`` of a chunk."""

    words: int
    half: int


@dataclass(frozen=True)
class Field:
    """Bits ``low .. low + width - 1`` of each of a thread's 64 codes: the word that they are in, and their lowest bit
    there, int64 [64] each."""

    low: int
    width: int
    word: Tensor
    shift: Tensor


@total_ordering
@dataclass(frozen=True)
class Format:
    """The weight format of one scheme. Every code is a subclass in a file of its own, which `formats.CODES` registers.

    ``zeros``: a bfloat16 zero point beside every scale.

    ``operand``: what the tensor cores multiply (``bf16``, ``fp8`` e4m3, ``int8``, ``int4``), and activations are.
    ``bits``: stored bits per weight; fewer than the operand's means codes are decoded in registers.
    ``element``: what a code is, as in `Scheme`. ``group``: input features that share a scale; -1: a row, whose float32
    scale is applied at the end. ``asymmetric``: there is a variant with zero points.

    Decoded codes are stored as `layouts` says. ``loads``: how a thread fetches its words of a chunk, in their order.
    ``row_numbers``: 16-bit numbers of a row and chunk, zero points not counted, that `numbers` makes of scales.
    ``term_halves``: halves of a chunk before which `terms` makes registers of these numbers.
    ``growth``: what sums of decoded weights are to be multiplied by. ``scale_limit``: scales must be below.
    """

    zeros: bool = False

    operand: ClassVar[str] = "bf16"
    bits: ClassVar[int]
    element: ClassVar[str] = "int"
    group: ClassVar[int] = -1
    asymmetric: ClassVar[bool] = False
    loads: ClassVar[tuple[Load, ...]] = ()
    row_numbers: ClassVar[int] = 0
    term_halves: ClassVar[tuple[int, ...]] = ()
    growth: ClassVar[float] = 1.0
    scale_limit: ClassVar[float] = float("inf")

    @classmethod
    def variants(cls) -> tuple["Format", ...]:
        """Without and, if there are any, with zero points."""
        return tuple(cls(zeros) for zeros in (False, True)[: 1 + cls.asymmetric])

    def __lt__(self, other: "Format") -> bool:
        """In a kernel's order."""
        return self._key < other._key

    @property
    def _key(self) -> tuple[Any, ...]:
        return self.operand, self.bits, self.grouped, self.zeros, self.element

    @property
    def act_bits(self) -> int:
        """Bits of an activation."""
        return OPERAND_BITS[self.operand]

    @property
    def scheme(self) -> Scheme:
        """The scheme whose format this is."""
        return Scheme(self.bits, self.act_bits, self.group, not self.zeros, self.operand == "fp8", self.element)

    @property
    def name(self) -> str:
        """Canonical name of that scheme, e.g. ``w4a16_g128_asym``."""
        return self.scheme.name

    @property
    def original(self) -> bool:
        """Whether weights are not quantized."""
        return self.scheme.is_original

    @property
    def grouped(self) -> bool:
        """Whether scales belong to groups of input features."""
        return self.group != -1

    @property
    def decoded(self) -> bool:
        """Whether codes become operands in registers."""
        return self.bits < self.act_bits

    @property
    def token_scaled(self) -> bool:
        """Whether activations carry one float32 scale per token."""
        return self.operand != "bf16"

    @property
    def channel_scaled(self) -> bool:
        """Whether the weights carry one float32 scale per row."""
        return not (self.original or self.grouped)

    @property
    def feature_multiple(self) -> int:
        """Input features must be a multiple of this."""
        return max(EDGE, self.group)

    @property
    def all_numbers(self) -> int:
        """16-bit numbers of a row and chunk, zero points included."""
        return self.row_numbers + self.zeros

    @property
    def code_bytes(self) -> int:
        """Bytes of the codes of half a chunk, 64 rows."""
        return HALF_ROWS * GROUP * self.bits // 8

    @property
    def half_bytes(self) -> int:
        """Bytes of half a chunk: codes, then the numbers of its rows."""
        return self.code_bytes + 2 * HALF_ROWS * self.all_numbers

    @property
    def chunk_bytes(self) -> int:
        """Bytes of 128 rows x 128 input features in kernel order."""
        return 2 * self.half_bytes

    @property
    def words(self) -> int:
        """32-bit words of a thread's 64 codes."""
        return sum(load.words for load in self.loads)

    def store(self, codes: Tensor, scheme: Scheme) -> Tensor:
        """Codes of ``scheme``, one of those that the format takes, to those that are stored."""
        return codes

    def restore(self, codes: Tensor, scheme: Scheme) -> Tensor:
        """Inverse of `store`."""
        return codes

    def fields(self, block: Any, register: Any, element: Any) -> list[Field]:
        """Where the bits of a thread's codes are stored; int64 [64] each: the code's block, register and element."""
        raise NotImplementedError

    def numbers(self, weight: Quantized) -> Tensor:
        """16-bit numbers [N, K / 128 rounded up, `all_numbers`] of a block [N, K]."""
        raise NotImplementedError

    def scales(self, numbers: Tensor, scheme: Scheme) -> tuple[Tensor, Tensor | None]:
        """Inverse of `numbers`: scales and zero points of ``scheme``, with as many groups as all chunks have."""
        raise NotImplementedError

    def operands(self, weight: Quantized) -> Tensor:
        """float64 [..., N, K]: what `decode` makes of ``weight``, in torch."""
        raise NotImplementedError

    def terms(self, numbers: list[Any], half: int) -> list[Any]:
        """Registers that `decode` needs for half a chunk, from the numbers of the thread's two rows, a pair a word."""
        raise NotImplementedError

    def decode(self, words: Any, block: int, terms: Any) -> list[Any]:
        """Registers 0..3 of a block of the fragment from the thread's words and terms (CuTe DSL)."""
        raise NotImplementedError
