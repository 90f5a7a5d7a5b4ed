"""The quantizers by name. Stdlib only: `config` and `quantize` read it without PyTorch."""

from dataclasses import dataclass
from typing import Literal, get_args

QuantizerName = Literal["rtn", "gptq", "rtn+hadamard", "gptq+hadamard"]
QUANTIZERS: tuple[str, ...] = get_args(QuantizerName)


@dataclass(frozen=True)
class Method:
    """How weights are quantized: ``rtn`` or ``gptq``, after a rotation where the name ends in ``+hadamard``.

    ``damping``: fraction of its mean diagonal that GPTQ adds to a Hessian.
    """

    name: str
    damping: float = 0.01

    @property
    def gptq(self) -> bool:
        """Whether errors are fed back, which needs Hessians."""
        return self.name.startswith("gptq")

    @property
    def unused_modules(self) -> tuple[str, ...]:
        """Modules that `calibrate` imports and this method never runs."""
        unused = {"gptq": not self.gptq, "hadamard": not self.rotated}
        return tuple(f"{__package__}.{module}" for module, is_unused in unused.items() if is_unused)

    @property
    def rotated(self) -> bool:
        """Whether weights and activations are rotated before they are quantized (`hadamard.rotate`)."""
        return self.name.endswith("+hadamard")
