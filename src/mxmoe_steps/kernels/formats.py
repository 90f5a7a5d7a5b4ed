"""Every weight format that there are kernels for. Stdlib only.

A new one is a file in `codes` with a subclass of `Format`, and a line in `CODES`: layouts, kernels and tests go through
them.
"""

from mxmoe_steps.errors import UserError
from mxmoe_steps.kernels.codes.format import Format
from mxmoe_steps.kernels.codes.w2a16 import W2A16
from mxmoe_steps.kernels.codes.w3a16 import W3A16
from mxmoe_steps.kernels.codes.w4a4 import W4A4
from mxmoe_steps.kernels.codes.w4a8 import W4A8
from mxmoe_steps.kernels.codes.w4a8_fp8 import W4A8Fp8
from mxmoe_steps.kernels.codes.w4a16 import W4A16
from mxmoe_steps.kernels.codes.w4a16_mxfp4 import W4A16Mxfp4
from mxmoe_steps.kernels.codes.w6a16 import W6A16
from mxmoe_steps.kernels.codes.w8a8 import W8A8
from mxmoe_steps.kernels.codes.w8a8_fp8 import W8A8Fp8
from mxmoe_steps.kernels.codes.w8a16 import W8A16
from mxmoe_steps.kernels.codes.w16a16 import W16A16
from mxmoe_steps.schemes import Scheme

CODES: tuple[type[Format], ...] = (
    W16A16, W8A16, W6A16, W4A16, W4A16Mxfp4, W3A16, W2A16, W8A8Fp8, W4A8Fp8, W8A8, W4A8, W4A4,
)  # fmt: skip
FORMATS = tuple(format_ for code in CODES for format_ in code.variants())


def kernel_format(scheme: Scheme) -> Format:
    """The format that multiplies ``scheme``; `UserError` if no kernel does."""
    by_scheme = {format_.scheme: format_ for format_ in FORMATS}
    for one in scheme.runs_as:
        if one in by_scheme:
            return by_scheme[one]
    names = ", ".join(format_.name for format_ in FORMATS)
    raise UserError(
        f"scheme {scheme.name}: no GPU kernel; there are kernels for {names}, for g-1 in place of g128, and for 1 bit"
        " where there are some for 2"
    )
