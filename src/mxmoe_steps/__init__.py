"""Mixed-precision quantization of Mixture-of-Experts language models, one module per pipeline step.

Importing it lets transformers' ``from_pretrained`` read the checkpoints that ``quantize`` writes.
"""

from typing import Any

from mxmoe_steps.inference.on_import import register_with_transformers

__version__ = "0.1.0"

register_with_transformers()


def load_quantized(
    path: str, device: str = "cpu", dtype: Any = "auto", device_map: Any = None, trust_remote_code: bool = False
) -> Any:
    """A transformers causal LM from a folder that ``quantize`` wrote; see `mxmoe_steps.inference.plugin`."""
    from mxmoe_steps.inference import plugin

    return plugin.load_quantized(path, device, dtype, device_map, trust_remote_code)
