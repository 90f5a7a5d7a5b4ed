"""Rotated inputs of blocks, as launches know them; `mxmoe_steps.quantizers.hadamard` says what they are. Stdlib only.

An expert's rows of 8 and 4 bits are all rotated or none. Its bfloat16 rows are either: they lie in one matrix,
whichever they are.
"""

ROTATED_BF16 = 16  # beside `limits.OPERAND_MASKS`: the expert's bfloat16 rows are rotated
CHUNK = 8192  # features that a block of threads rotates at a time: the most that one transform spans


def span(features: int) -> int:
    """Features of one transform: the largest power of two that divides those of a row."""
    return features & -features
