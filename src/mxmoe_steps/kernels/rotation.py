"""Rotated inputs of blocks, as launches know them; `mxmoe_steps.quantizers.hadamard` says what they are. Stdlib only.

What an expert needs is a sum of `limits.OPERAND_MASKS`; in launches that rotate it also says how. Rows of 8 and 4 bits
are all rotated. The expert's bfloat16 rows are either rotated or plain: they lie in one matrix, whichever they are.
"""

ROTATED_BF16 = 16  # in place of bfloat16's mask: these rows are rotated
SPAN = 256  # times the `span` of the expert's rotated rows, of slices that of the row which they are slices of
CHUNK = 8192  # features that a block of threads rotates at a time: the most that one transform spans
LEAST = 8  # that it spans: a thread has so many


def span(features: int) -> int:
    """Features of one transform: the largest power of two that divides those of a row."""
    return features & -features
