"""Weights that their publisher quantized, dequantized one tensor at a time as they are read.

`format` says what a source format is, `formats` which there are and which a checkpoint has; every other module is one
of them. `tensor` makes of their stored parts what everything else takes for a tensor of a file in 16 bits.
"""
