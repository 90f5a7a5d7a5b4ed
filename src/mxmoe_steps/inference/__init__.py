"""Running a quantized checkpoint: packed modules and their registration with transformers."""
