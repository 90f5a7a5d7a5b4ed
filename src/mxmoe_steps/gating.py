"""What an expert makes of gate and up, as data for kernels and times; `models.gating` computes it. Stdlib only."""

import math
from dataclasses import dataclass

FUNCTIONS = ("silu", "gelu", "gelu_pytorch_tanh", "relu", "relu2")
CLAMPED = "clamped"  # gpt_oss's


@dataclass(frozen=True)
class Gating:
    """``function(gate) * up``, or ``function(up)`` of experts that are not ``gated``; ``function``: of `FUNCTIONS`.

    `CLAMPED` is ``x * sigmoid(alpha x) * (clamp(up, -limit, limit) + 1)`` with ``x = min(gate, limit)``. ``biased``:
    blocks have biases; those of gate and up are added first.
    """

    function: str = "silu"
    gated: bool = True
    biased: bool = False
    alpha: float = 1.0
    limit: float = math.inf

    @property
    def plain(self) -> bool:
        """Whether it is SwiGLU, which the grouped GEMM of gate and up can compute as well."""
        return self == SWIGLU

    @property
    def columns(self) -> int:
        """Rows of weights that a feature has: gate's and up's, or up's."""
        return 1 + self.gated

    @property
    def variant(self) -> str:
        """What of it kernels are compiled for."""
        return "-".join((self.function, *(["ungated"] if not self.gated else []), *(["biased"] if self.biased else [])))

    @property
    def token_kernels(self) -> tuple[str, ...]:
        """Kernels that only layers of this gating run."""
        own = () if self.plain else (f"activate_{self.variant}",)
        return (*own, "combine_bf16_biased", "combine_float32_biased") if self.biased else own


SWIGLU = Gating()


def of_variant(variant: str) -> Gating:
    """Inverse of `Gating.variant`, but for what is known when a kernel runs."""
    function, *said = variant.split("-")
    return Gating(function, "ungated" not in said, "biased" in said)
