"""Combine attention over the local context with attention over a memory."""

import torch
from jaxtyping import Float
from torch import Tensor

from byheart.ops.attention import wide_dtype


def merge_by_gate(
    local: Float[Tensor, "batch heads query head_dim"],
    memory: Float[Tensor, "batch heads query head_dim"],
    gate: Float[Tensor, "#batch heads #query"],
) -> Float[Tensor, "batch heads query head_dim"]:
    """Mix two attention outputs with a gate between 0 and 1.

    Args:
        local: Attention over the local context.
        memory: Attention over the memory; must be finite also where the gate is 0.
        gate: Share of the memory, per head (the paper) or per head and token.

    Returns:
        `gate * memory + (1 - gate) * local`, exactly `local` where the gate is 0.

    Source:
        Wu et al. 2022, Memorizing Transformers, "kNN-augmented attention layer" (arXiv:2203.08913).
    """
    return torch.lerp(local, memory.to(local.dtype), gate[..., None].to(local.dtype))


def merge_by_softmax(
    outputs: list[Float[Tensor, "batch heads query head_dim"]],
    logsumexps: list[Float[Tensor, "batch heads query"]],
) -> Float[Tensor, "batch heads query head_dim"]:
    """Mix attention outputs as if one softmax had run over all their keys.

    Args:
        outputs: Attention outputs over disjoint sets of keys.
        logsumexps: Log of each softmax denominator (natural log), in the same order.

    Returns:
        The output of a single softmax over the union of the keys, in the dtype of the first
        output. Where all sets are empty the (zero) outputs are averaged.
    """
    weights_JBHQ = torch.softmax(torch.stack(logsumexps), dim=0)
    merged = sum(
        weights_JBHQ[index, ..., None] * output.to(wide_dtype(output))
        for index, output in enumerate(outputs)
    )
    assert isinstance(merged, Tensor)
    return merged.to(outputs[0].dtype)
