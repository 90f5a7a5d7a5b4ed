"""Weight and activation quantization: the grid of a scheme, round-to-nearest and batched GPTQ."""
