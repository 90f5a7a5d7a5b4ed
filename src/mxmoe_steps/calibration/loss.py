"""What a loss is, and those that come with the package. A user's module registers more (docs/extending.md)."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

from mxmoe_steps.registry import Registry

if TYPE_CHECKING:
    import torch

    from mxmoe_steps.calibration.inputs import Batch


class Loss(ABC):
    """What a change of the MoE layer's output costs, summed over tokens.

    ``needs_gradient``: of the model's loss with respect to that output. ``per_token``: the sum is divided by the number
    of calibration tokens.
    """

    needs_gradient: ClassVar[bool] = False
    per_token: ClassVar[bool] = False

    @abstractmethod
    def of(self, change: "torch.Tensor", batch: "Batch") -> "torch.Tensor":
        """Sum over the batch's tokens, a float64 scalar that is not negative.

        ``change``: float32 [n, H], of the expert's output; the layer's changes by ``batch.scale`` [n] times it.
        """


LOSSES: Registry[Loss] = Registry("loss")


@LOSSES.register("out_sq")
class SquaredChange(Loss):
    """||dy||^2, dy the change of the layer's output."""

    def of(self, change: "torch.Tensor", batch: "Batch") -> "torch.Tensor":
        """See `Loss.of`."""
        import torch

        return (torch.linalg.vector_norm(change, dim=-1) * batch.scale).double().square().sum()


@LOSSES.register("fisher")
class Fisher(Loss):
    """1/2 (g . dy)^2, g the gradient: the KL divergence in nats per token; 0 where no gradient was captured."""

    needs_gradient = True
    per_token = True

    def of(self, change: "torch.Tensor", batch: "Batch") -> "torch.Tensor":
        """See `Loss.of`."""
        import torch

        if batch.gradient is None:
            return torch.zeros((), dtype=torch.float64, device=change.device)
        along = torch.linalg.vecdot(change, batch.gradient) * batch.scale
        return 0.5 * along.double().square().sum()


BUILTIN = tuple(LOSSES)  # in every table; others where they are asked for


def losses_of(names: Sequence[str]) -> list[Loss]:
    """The built-in losses and those of ``names``; `UserError` for one that is not registered."""
    return [LOSSES.of(name)() for name in (*BUILTIN, *names)]
