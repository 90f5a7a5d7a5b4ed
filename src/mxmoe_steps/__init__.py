"""Mixed-precision quantization of Mixture-of-Experts language models, one module per pipeline step."""

__version__ = "0.1.0"
