"""The quantizers that come with the package. What they compute with is imported when they compute."""

from typing import TYPE_CHECKING

from mxmoe_steps.quantizers.quantizer import QUANTIZERS, Quantizer
from mxmoe_steps.schemes import Scheme

if TYPE_CHECKING:
    import torch

    from mxmoe_steps.quantizers.grid import QuantizedWeight
    from mxmoe_steps.quantizers.hessians import Hessians


@QUANTIZERS.register("rtn")
class RoundToNearest(Quantizer):
    """The nearest points of the best grid."""

    def quantize(self, weight: "torch.Tensor", scheme: Scheme, hessians: "Hessians | None") -> "QuantizedWeight":
        """See `Quantizer.quantize`."""
        from mxmoe_steps.quantizers.grid import round_to_nearest

        return round_to_nearest(weight, scheme)


@QUANTIZERS.register("gptq")
class Gptq(Quantizer):
    """Column by column, with error feedback through the inverse Hessian."""

    uses_hessians = True
    modules = ("mxmoe_steps.quantizers.gptq",)

    def quantize(self, weight: "torch.Tensor", scheme: Scheme, hessians: "Hessians | None") -> "QuantizedWeight":
        """See `Quantizer.quantize`."""
        from mxmoe_steps.quantizers.gptq import gptq

        assert hessians is not None
        return gptq(weight, hessians, scheme)
