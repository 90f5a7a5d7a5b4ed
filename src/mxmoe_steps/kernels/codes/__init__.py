"""The weight codes that kernels multiply, a file each; `kernels.formats` registers them."""
