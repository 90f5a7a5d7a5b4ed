"""Second moments of what enters a linear block, expert by expert, as quantizers use them."""

from dataclasses import dataclass, replace

import torch

from mxmoe_steps.quantizers.hadamard import rotate


@dataclass(frozen=True)
class Hessians:
    """Input second moments of a stack of experts.

    ``sums``: float64 [E, K, K], sum over the expert's tokens of w^2 x x^T with w the router weight,
    so that the quadratic form is the squared error of the layer output.
    ``tokens``: int64 [E]. An expert's Hessian is shrunk toward ``layer``, the mean over all tokens
    (float64 [K, K]): with n tokens of K features it keeps n / (n + K) of its own, because the rest
    of its K directions is noise. An expert that saw no token uses the layer's alone.
    ``damping``: fraction of its mean diagonal that is added to a Hessian.
    """

    sums: torch.Tensor
    tokens: torch.Tensor
    layer: torch.Tensor
    damping: float

    def rotated(self) -> "Hessians":
        """The second moments of inputs that `rotate` has rotated."""
        return replace(self, sums=rotate(rotate(self.sums).mT), layer=rotate(rotate(self.layer).mT))

    def shrunk(self) -> torch.Tensor:
        """float64 [E, K, K], positive definite: shrunk and damped."""
        in_features = self.sums.shape[-1]
        tokens = self.tokens.to(self.sums.dtype).view(-1, 1, 1)
        mixed = self.sums / tokens.clamp_min(1)
        scale = _mean_diagonal(mixed) / _mean_diagonal(self.layer.unsqueeze(0)).clamp_min(1e-30)
        scale = torch.where(tokens > 0, scale, torch.ones_like(scale))
        kept = tokens / (tokens + in_features)
        mixed.mul_(kept).addcmul_((1 - kept) * scale, self.layer)
        damp = self.damping * _mean_diagonal(mixed).clamp_min(1e-30)
        mixed.diagonal(dim1=-2, dim2=-1).add_(damp.squeeze(-1))
        return mixed


def _mean_diagonal(matrix: torch.Tensor) -> torch.Tensor:
    """[E, K, K] to [E, 1, 1]."""
    return matrix.diagonal(dim1=-2, dim2=-1).mean(-1).view(-1, 1, 1)
