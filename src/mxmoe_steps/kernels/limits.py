"""What every launch of a layer keeps to. Stdlib only."""

OPERAND_MASKS = {"bf16": 1, "fp8": 2, "int8": 4, "int4": 8}  # what an expert reads, one bit per type
MAX_EXPERTS = 1024  # of a layer, slices of the shared expert included
MAX_ENTRIES = 64  # rows of one token
GATE_ROWS = 8  # of gate, then of up, where they are one block: a thread has the sums of row r and r + 8
