"""Normalisation without parameters: length 1 for queries and keys."""

import torch
from jaxtyping import Float
from torch import Tensor

EPSILON = 1e-6
"""Added under the root, as in the authors' code."""


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
