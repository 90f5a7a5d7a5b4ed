"""Packed checkpoints in vLLM: its processes call `register`, the entry point of the group ``vllm.general_plugins``.

    blocks    a rank's share of packed blocks: named, cut, collected, complete; knows no engine
    stream    how their tensors leave vLLM's stream of weights
    layer     the experts of one layer on one rank, and what computes them
    routed    what vLLM calls for routed experts
    shared    what vLLM calls for the linear layers of a shared expert
    config    the quantization method ``mxmoe``: which of these a layer of vLLM's model gets

vLLM itself is not a dependency: its builds for CUDA, ROCm and CPUs are different packages, and the user has one.
"""


def register() -> None:
    """Make vLLM know the quantization method of our checkpoints; it may be called again."""
    from vllm.model_executor.layers.quantization import register_quantization_config

    from mxmoe_steps.inference.vllm.config import METHOD, PackedConfig

    register_quantization_config(METHOD)(PackedConfig)
