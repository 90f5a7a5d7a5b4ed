"""A quantizer by its name, with what a job of `calibrate` needs to know of it. No PyTorch."""

from dataclasses import dataclass

from mxmoe_steps.quantizers import builtin
from mxmoe_steps.quantizers.names import DAMPING, ROTATED, is_rotated
from mxmoe_steps.quantizers.quantizer import Quantizer

QUANTIZERS = builtin.QUANTIZERS


def method_names() -> list[str]:
    """Every quantizer that is registered, plain and rotated."""
    return [*QUANTIZERS, *(f"{name}{ROTATED}" for name in QUANTIZERS)]


@dataclass(frozen=True)
class Method:
    """How weights are quantized: by a registered class, after a rotation where the name ends in ``+hadamard``.

    ``damping``: fraction of its mean diagonal that is added to a Hessian. `UserError` for a name that is not
    registered.
    """

    name: str
    damping: float = DAMPING

    def __post_init__(self) -> None:
        QUANTIZERS.of(self._base)

    @property
    def _base(self) -> str:
        return self.name.removesuffix(ROTATED)

    @property
    def kind(self) -> type[Quantizer]:
        """The registered class."""
        return QUANTIZERS[self._base]

    @property
    def uses_hessians(self) -> bool:
        """Whether second moments of the inputs are needed."""
        return self.kind.uses_hessians

    @property
    def rotated(self) -> bool:
        """Whether weights and activations are rotated before they are quantized (`hadamard.rotate`)."""
        return is_rotated(self.name)

    @property
    def unused_modules(self) -> tuple[str, ...]:
        """Modules that `calibrate` imports and this method never runs."""
        others = {module for kind in QUANTIZERS.values() for module in kind.modules} - set(self.kind.modules)
        return (*sorted(others), *(() if self.rotated else ("mxmoe_steps.quantizers.hadamard",)))
