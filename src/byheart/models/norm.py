"""RMSNorm on the residual stream."""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from byheart.ops.norms import EPSILON


class RMSNorm(nn.Module):
    """Divide by the root mean square, times a learned scale; computed in float32."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Float[Tensor, "*shape dim"]) -> Float[Tensor, "*shape dim"]:
        """Normalise the last axis.

        Returns:
            The normalised input, in its dtype.
        """
        normed = nn.functional.rms_norm(
            x.float(), self.weight.shape, self.weight.float(), eps=EPSILON
        )
        return normed.to(x.dtype)
