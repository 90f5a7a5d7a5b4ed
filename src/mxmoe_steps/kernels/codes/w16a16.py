"""The original bfloat16 weights: rows, which the tensor cores read from shared memory."""

from mxmoe_steps.kernels.codes.format import Format


class W16A16(Format):
    """[entries, N, K] as they are."""

    bits = 16
