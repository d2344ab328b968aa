"""Normalisations: RMSNorm on the residual stream, length 1 for queries and keys."""

import torch
from jaxtyping import Float
from torch import Tensor, nn

EPSILON = 1e-6
"""Added under the root, as in the authors' code."""


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


def unit_length(x: Float[Tensor, "*shape head_dim"]) -> Float[Tensor, "*shape head_dim"]:
    """Scale vectors to length 1 (slightly below, for very short ones).

    Keys of different training steps then differ in direction only, which keeps old entries of a
    memory comparable with new ones.

    Returns:
        The scaled vectors, in the dtype of `x`.

    Source:
        Wu et al. 2022, Memorizing Transformers, "Distributional shift" (arXiv:2203.08913).
    """
    wide = x.float()
    return (wide * torch.rsqrt(wide.square().sum(-1, keepdim=True) + EPSILON)).to(x.dtype)
