"""What a quantizer is. A user's module imports this and registers a class of its own (docs/extending.md)."""

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, ClassVar

from mxmoe_steps.registry import Registry
from mxmoe_steps.schemes import Scheme

if TYPE_CHECKING:
    import torch

    from mxmoe_steps.quantizers.grid import QuantizedWeight
    from mxmoe_steps.quantizers.hessians import Hessians


class Quantizer(ABC):
    """From weights to codes, scales and zero points.

    ``uses_hessians``: `quantize` needs the second moments of the inputs. ``modules``: those that no other quantizer
    runs; a change of theirs calibrates no other one again.
    """

    uses_hessians: ClassVar[bool] = False
    modules: ClassVar[tuple[str, ...]] = ()

    @abstractmethod
    def quantize(self, weight: "torch.Tensor", scheme: Scheme, hessians: "Hessians | None") -> "QuantizedWeight":
        """Quantize ``weight``, float32 [E, N, K]: one linear block of a stack of experts.

        ``hessians``: of the same experts, where the quantizer uses them. Rotated methods give rotated weights and
        Hessians; a quantizer need not know.
        """


QUANTIZERS: Registry[Quantizer] = Registry("quantizer")
