"""Launches of the grouped GEMM kernels: which ones to measure, measuring them, fitting the time model to them."""
