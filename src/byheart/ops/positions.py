"""Positions: T5 relative buckets for local attention, rotary positions for models that use them."""

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor


def t5_buckets(
    distances: Int[Tensor, "*shape"], num_buckets: int = 32, max_distance: int = 128
) -> Int[Tensor, "*shape"]:
    """Number the buckets of T5's one-directional relative positions.

    The first half of the buckets holds one distance each; the rest grow logarithmically up to
    `max_distance`, and everything farther away shares the last one.

    Args:
        distances: Tokens back from the query, 0 or more.
        num_buckets: Buckets in all.
        max_distance: Distance from which on the last bucket is used.

    Returns:
        Bucket of each distance.

    Source:
        Raffel et al. 2020 (T5); the rounding follows the authors' code of Memorizing Transformers.
    """
    num_exact = num_buckets // 2
    epsilon = torch.finfo(torch.float32).eps
    ratio = torch.log(distances.float() / num_exact + epsilon) / math.log(max_distance / num_exact)
    logarithmic = num_exact + (ratio * (num_buckets - num_exact)).to(distances.dtype)
    logarithmic = logarithmic.clamp(max=num_buckets - 1)
    return torch.where(distances < num_exact, distances, logarithmic)


def rope_angles(
    positions: Int[Tensor, "*shape"], head_dim: int, theta: float = 10_000.0
) -> tuple[Float[Tensor, "*shape head_dim"], Float[Tensor, "*shape head_dim"]]:
    """Compute cosine and sine of the rotary angles.

    Args:
        positions: Token positions; may be negative.
        head_dim: Width of one head, even.
        theta: Base of the wavelengths.

    Returns:
        Cosine and sine, float32, both halves of the head alike.

    Raises:
        ValueError: If `head_dim` is odd.

    Source:
        Su et al. 2021, RoFormer; the half-split layout of Llama.
    """
    if head_dim % 2:
        msg = (
            f"head_dim must be even for rotary positions, got {head_dim}. Choose an even head_dim."
        )
        raise ValueError(msg)
    steps = torch.arange(0, head_dim, 2, device=positions.device, dtype=torch.float32) / head_dim
    angles = positions[..., None].float() * theta**-steps
    angles = torch.cat([angles, angles], dim=-1)
    return angles.cos(), angles.sin()


def apply_rope(
    x: Float[Tensor, "*shape head_dim"],
    cos: Float[Tensor, "*#shape head_dim"],
    sin: Float[Tensor, "*#shape head_dim"],
) -> Float[Tensor, "*shape head_dim"]:
    """Rotate queries or keys to their positions.

    Returns:
        The rotated vectors, in the dtype of `x`.
    """
    first, second = x.float().chunk(2, dim=-1)
    turned = torch.cat([-second, first], dim=-1)
    return (x.float() * cos + turned * sin).to(x.dtype)


def undo_rope(
    x: Float[Tensor, "*shape head_dim"],
    cos: Float[Tensor, "*#shape head_dim"],
    sin: Float[Tensor, "*#shape head_dim"],
) -> Float[Tensor, "*shape head_dim"]:
    """Rotate queries or keys back: the inverse of `apply_rope` with the same angles.

    Angles that carry a length (YaRN scales `cos` and `sin`) are divided by their squared length.

    Returns:
        The vectors before rotation, in the dtype of `x`.
    """
    squared_length = cos.square() + sin.square()
    return apply_rope(x, cos / squared_length, -sin / squared_length)
