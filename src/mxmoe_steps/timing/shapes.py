"""Sizes of MoE layers and of their launches, and the phase of the kernel that runs a launch. No numpy.

What the kernels do is theirs to say (`kernels.shared`): slices of a shared expert, strips and phase are asked for here.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from mxmoe_steps.errors import UserError
from mxmoe_steps.kernels.architecture import Architecture
from mxmoe_steps.kernels.shared import strips
from mxmoe_steps.schemes import Scheme


@dataclass(frozen=True)
class LaunchShape:
    """One grouped GEMM: routed experts, slices of a shared one, output features of an expert's blocks."""

    experts: int
    slices: int
    out_features: tuple[int, ...]

    def phase(self, rows: int, sms: int, carried: Iterable[Scheme], architecture: Architecture) -> str:
        """Phase of the kernel for ``rows`` routed rows on ``sms`` multiprocessors that carries these schemes."""
        in_strips = strips(self.out_features)
        return architecture.phase_for(rows, self.experts, self.slices, in_strips, sms, by_warp(carried))


@dataclass(frozen=True)
class LayerShape:
    """What a model's MoE layer multiplies; the shared expert is cut into ``slices`` of the routed experts' width."""

    model: str
    experts: int
    top_k: int
    hidden: int
    intermediate: int
    slices: int = 0

    def size(self, block: str) -> tuple[int, int]:
        """(N, K) of a ``gate_up`` or ``down`` launch; gate and up are problems of their own."""
        return (self.intermediate, self.hidden) if block == "gate_up" else (self.hidden, self.intermediate)

    def launch(self, block: str) -> LaunchShape:
        """The ``gate_up`` or ``down`` launch."""
        return LaunchShape(self.experts, self.slices, self.size(block)[:1] * (2 if block == "gate_up" else 1))


MODELS = (
    LayerShape("qwen1.5-moe", 60, 4, 2048, 1408, 4),
    LayerShape("deepseek-v2-lite", 64, 6, 2048, 1408, 2),
    LayerShape("mixtral-8x7b", 8, 2, 4096, 14336),
    LayerShape("qwen3-30b-a3b", 128, 8, 2048, 768),
    LayerShape("olmoe-1b-7b", 64, 8, 2048, 1024),
    LayerShape("phi-3.5-moe", 16, 2, 4096, 6400),
    LayerShape("demo-moe", 16, 4, 256, 128, 2),
)


def shape_like(name: str, shared: bool) -> LayerShape:
    """The layers of the model ``name``; `UserError` where it has a shared expert and ``shared`` is false, or the
    reverse."""
    shape = next(one for one in MODELS if one.model == name)
    if bool(shape.slices) != shared:
        others = ", ".join(one.model for one in MODELS if bool(one.slices) == shared)
        raise UserError(
            f"{name} has {'a' if shape.slices else 'no'} shared expert, the model to quantize has"
            f" {'one' if shared else 'none'}; choose one of {others}"
        )
    return shape


def by_warp(schemes: Iterable[Scheme]) -> bool:
    """What `Architecture.by_warp` says of the kernel that carries ``schemes``."""
    return all(scheme.weight_bits < scheme.act_bits and scheme.compute_type != "fp8" for scheme in schemes)
