"""The grammar of quantization schemes and their arithmetic: bits, groups, tensor-core type.

``w{bits}a{bits}[_g{group}][_{sym|asym}][_{fp8|mxfp4}][_published]``, for example ``w4a16``, ``w2a16_g64_sym``,
``w8a8_fp8`` or ``w4a16_mxfp4``. Omitted parts take the defaults of `_defaults`; `Scheme.name` is the canonical form,
used in file names, tables and checkpoints. Stdlib only: the Snakefile imports this module.
"""

import math
import re
from dataclasses import dataclass, replace

from mxmoe_steps.errors import UserError

BLOCKS = ("gate", "up", "down")
SHARED = -1  # the expert number of a layer's shared expert
PUBLISHED = "published"  # in a configuration: the scheme of the model's own codes, see `models.published`

SCALE_BITS = 16  # one bfloat16 scale per group
BLOCK_SCALE_BITS = 32  # one float32 scale per square block
_LARGEST_GROUP = 1 << 16
ZERO_BITS = 16  # one bfloat16 zero point per asymmetric group

CODES_PER_UNIT = 8  # that fill whole bytes, see `mxmoe_steps.packing`


@dataclass(frozen=True)
class MicroscalingFloat:
    """Small floats of a sign and a magnitude, and one e8m0 scale, a power of two, for the features of a group (OCP
    Microscaling Formats v1.0). ``magnitudes``: by the bits of a code below its sign, its highest one."""

    bits: int
    magnitudes: tuple[float, ...]
    group: int = 32
    scale_bits: int = 8


ELEMENTS = {"mxfp4": MicroscalingFloat(4, (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0))}  # e2m1

_PATTERN = re.compile(
    r"w(?P<weight>\d{1,2})a(?P<act>\d{1,2})(?:_g(?P<group>-?\d{1,9}))?(?:_(?P<sym>sym|asym))?"
    rf"(?:_(?P<tail>fp8|{'|'.join(ELEMENTS)}))?(?P<published>_{PUBLISHED})?"
)
_SUPPORTED = {  # (weight bits, activation bits) the quantizers and the reference arithmetic implement
    (16, 16), (8, 16), (6, 16), (4, 16), (3, 16), (2, 16), (1, 16), (8, 8), (4, 8), (4, 4),
}  # fmt: skip
KERNEL_GROUP = 128  # input features that share a scale in kernels of groups
_PUBLISHED_BLOCK = 128  # rows and columns of the blocks that fp8 is published in
_RUNS_AS = {1: 2}  # weight bits without a kernel of their own, and those whose kernel runs them


@dataclass(frozen=True, order=True)
class Scheme:
    """How one linear block is stored and multiplied.

    ``group`` is the number of consecutive input features that share a scale, -1 for the whole row.
    ``fp8``: 8-bit activations (and 8-bit weights) are e4m3 rather than integers.
    ``element``: what weight codes are: ``int``, or one of `ELEMENTS`; not looked at where they are e4m3.
    ``published``: codes and scales are those of the model's publisher, and stay so.
    """

    weight_bits: int
    act_bits: int
    group: int = -1
    symmetric: bool = True
    fp8: bool = False
    element: str = "int"
    published: bool = False

    @property
    def name(self) -> str:
        """Canonical text, e.g. ``w4a16_g128_asym``."""
        if self.is_original:
            return "w16a16"
        sym = "sym" if self.symmetric else "asym"
        tail = "_fp8" if self.fp8 else "" if self.floats is None else f"_{self.element}"
        published = f"_{PUBLISHED}" if self.published else ""
        return f"w{self.weight_bits}a{self.act_bits}_g{self.group}_{sym}{tail}{published}"

    def __str__(self) -> str:
        return self.name

    @property
    def is_original(self) -> bool:
        """Whether the block keeps its 16-bit weights."""
        return self.weight_bits == 16

    @property
    def e4m3_weights(self) -> bool:
        """Whether weights are e4m3 values rather than integer codes."""
        return self.fp8 and self.weight_bits == 8

    @property
    def floats(self) -> MicroscalingFloat | None:
        """What weight codes are, unless they are integers or e4m3."""
        return ELEMENTS.get(self.element)

    @property
    def scale_rows(self) -> int:
        """Rows that share scales: those of a square block in fp8 as published, else one."""
        return self.group if self.published and self.e4m3_weights else 1

    @property
    def scale_bits(self) -> int:
        """Stored bits of a group's scale: bfloat16, e8m0, or float32 of square blocks."""
        if self.scale_rows > 1:
            return BLOCK_SCALE_BITS
        return SCALE_BITS if self.floats is None else self.floats.scale_bits

    def group_size(self, in_features: int) -> int:
        """Input features per scale for a row of ``in_features`` weights."""
        return in_features if self.group == -1 else min(self.group, in_features)

    def parts(self, out_features: int, in_features: int) -> dict[str, tuple[str, tuple[int, int]]]:
        """Part -> type, as safetensors names it, and shape of the stored block [out_features, in_features]."""
        groups = math.ceil(in_features / self.group_size(in_features))
        scales = "BF16" if self.floats is None else "U8", (out_features, groups)
        if self.scale_rows > 1:  # loaders that cast floating tensors leave bytes alone
            scales = "U8", (out_features // self.scale_rows, groups * BLOCK_SCALE_BITS // 8)
        stored = {"qweight": ("U8", (out_features, packed_width(in_features, self.weight_bits))), "scales": scales}
        return stored if self.symmetric else stored | {"zeros": ("BF16", (out_features, groups))}

    def bits(self, in_features: int) -> float:
        """True average bits per weight: codes, scales and zero points."""
        if self.is_original:
            return 16.0
        groups = math.ceil(in_features / self.group_size(in_features))
        overhead = self.scale_bits + (0 if self.symmetric else ZERO_BITS)
        return self.weight_bits + groups * overhead / (in_features * self.scale_rows)

    @property
    def compute_type(self) -> str:
        """Tensor-core operand type on Hopper: ``bf16``, ``fp8`` or ``int8``.

        Hopper has no 4-bit tensor cores: a4 schemes run on int8 there.
        """
        if self.act_bits == 16:
            return "bf16"
        return "fp8" if self.fp8 else "int8"

    @property
    def runs_as(self) -> tuple["Scheme", ...]:
        """Schemes whose kernel runs this one, the first that there is: its own, that of wider codes, that of groups
        with repeated scales."""
        wider = self.kernel_scheme
        return self, wider, replace(wider, group=KERNEL_GROUP) if self.group == -1 else wider

    @property
    def kernel_scheme(self) -> "Scheme":
        """The scheme whose kernel runs this one; 1-bit weights run as 2-bit weights, published codes like others."""
        own = self.published and self.scale_rows > 1
        return replace(self, weight_bits=_RUNS_AS.get(self.weight_bits, self.weight_bits), published=own)


ORIGINAL = Scheme(16, 16)


def packed_width(in_features: int, bits: int) -> int:
    """Bytes of one packed row of ``in_features`` codes."""
    return -(-in_features // CODES_PER_UNIT) * bits


def _defaults(weight_bits: int, act_bits: int) -> tuple[int, bool]:
    """Group size and symmetry of a scheme that does not name them."""
    if act_bits == 16 and weight_bits < 8:
        return 128, False
    if act_bits == 8 and weight_bits == 4:
        return 128, True
    return -1, True


def parse_scheme(text: str) -> Scheme:
    """Parse ``text`` to its canonical scheme; `UserError` says what is wrong and what is known."""
    if text == PUBLISHED:
        raise UserError(
            "scheme 'published' is another one for every model: name it in calibrate.schemes of a configuration, or"
            " write it out, e.g. w4a16_mxfp4_published"
        )
    match = _PATTERN.fullmatch(text)
    if match is None:
        raise UserError(
            f"scheme {text!r} is not of the form w<bits>a<bits>[_g<group>][_sym|_asym][_fp8|_mxfp4][_published], e.g."
            " w4a16 or w8a8_fp8"
        )
    weight_bits, act_bits = int(match["weight"]), int(match["act"])
    if (weight_bits, act_bits) not in _SUPPORTED:
        known = ", ".join(f"w{w}a{a}" for w, a in sorted(_SUPPORTED, reverse=True))
        raise UserError(f"scheme {text!r}: no such pair of widths; known are {known}")
    if weight_bits == 16:
        if text != "w16a16":
            raise UserError(f"scheme {text!r}: 16-bit weights take no group, symmetry or fp8; write w16a16")
        return ORIGINAL
    group, symmetric = _defaults(weight_bits, act_bits)
    element = match["tail"] if match["tail"] in ELEMENTS else "int"
    if element != "int":
        group, symmetric = ELEMENTS[element].group, True
    if match["group"] is not None:
        group = int(match["group"])
        if group != -1 and (group < 32 or group % 32 or group > _LARGEST_GROUP):
            raise UserError(
                f"scheme {text!r}: group must be -1 (per channel) or a multiple of 32 up to {_LARGEST_GROUP}"
            )
    fp8, published = match["tail"] == "fp8", match["published"] is not None
    if published:
        symmetric = True
        group = _PUBLISHED_BLOCK if fp8 and match["group"] is None else group
    if match["sym"] is not None:
        symmetric = match["sym"] == "sym"
    if published and (act_bits != 16 or not symmetric or (fp8 and (weight_bits != 8 or group == -1))):
        raise UserError(
            f"scheme {text!r}: published weights are symmetric, with 16-bit activations, and w8a16 of square blocks if"
            " they are fp8"
        )
    if fp8 and act_bits != 8 and not published:
        raise UserError(f"scheme {text!r}: fp8 is an 8-bit activation format; use it with a8")
    if act_bits < 16 and not symmetric:
        raise UserError(f"scheme {text!r}: schemes with quantized activations are symmetric; drop _asym")
    floats = ELEMENTS.get(element)
    if floats is not None and (weight_bits, act_bits, group, symmetric) != (floats.bits, 16, floats.group, True):
        raise UserError(f"scheme {text!r}: the only one with {element} is w{floats.bits}a16_{element}")
    return Scheme(weight_bits, act_bits, group, symmetric, fp8, element, published)


def is_canonical(text: str | None) -> bool:
    """Whether ``text`` is the canonical name of a scheme."""
    try:
        return text is not None and parse_scheme(text).name == text
    except (UserError, ValueError):
        return False
