"""Attention over a whole memory, without a gradient into it and without a search."""

from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from byheart.ops.attention import EXCLUDED, Attended, wide_dtype

# Scores held at a time. On a CPU they should stay in the cache; on a GPU larger pieces mean fewer
# launches.
_CHUNK_BYTES = {"cpu": 8 << 20, "cuda": 512 << 20}


def attend_to_all(
    queries: Float[Tensor, "batch heads query head_dim"],
    scale: Float[Tensor, " heads"],
    keys: Float[Tensor, "batch kv_heads entry head_dim"],
    values: Float[Tensor, "batch kv_heads entry head_dim"],
    valid: Bool[Tensor, "batch entry"],
    *,
    bias: Float[Tensor, "batch entry"] | None = None,
) -> Attended:
    """Attend to every entry, as `gather_attend` does to those that a search has found.

    The gradient reaches `queries` and `scale`, never `keys` and `values`. Backward computes the
    scores again, so that all of them are never held; if the memory was written in between,
    autograd refuses (commit after backward).

    Args:
        queries: Queries before the scale.
        scale: Factor of the scores, per head.
        keys: All slots of the memory.
        values: All slots of the memory.
        valid: Which slots hold an entry.
        bias: Added to the scores, after the scale; gets no gradient.

    Returns:
        Output (in the dtype of the queries) and log of the softmax denominator (in `wide_dtype`). A
        query without any entry gets zeros and `EXCLUDED`.

    Source:
        Dao et al. 2022, FlashAttention (arXiv:2205.14135), for the backward pass in pieces.
    """
    wide = wide_dtype(queries)
    mask = torch.where(valid, 0.0 if bias is None else bias.to(wide), EXCLUDED)
    scaled = queries.to(wide) * scale.to(wide)[:, None, None]
    # heads that share a key-value head are more queries of it
    batch, kv_heads = keys.shape[:2]
    grouped = scaled.reshape(batch, kv_heads, -1, queries.shape[3])
    # weights are computed in float32, and backward, which knows no autocast, computes them again
    with torch.autocast(queries.device.type, enabled=False):
        output, logsumexp = _AttendToAll.apply(  # type: ignore[no-untyped-call]
            grouped, keys, values, mask, valid.any(dim=1)
        )
    return Attended(
        output.reshape(queries.shape).to(queries.dtype), logsumexp.reshape(queries.shape[:3])
    )


class _AttendToAll(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor, has_entries: Tensor
    ) -> tuple[Tensor, Tensor]:
        output = torch.empty_like(queries)
        logsumexp = queries.new_empty(queries.shape[:3])
        for part in _parts(queries, keys):
            logits = _logits(part, queries, keys, mask)
            logsumexp[part] = torch.logsumexp(logits, dim=-1)
            weights = logits.softmax(dim=-1)
            output[part] = weights @ values[part[:2]].to(weights.dtype)
        # a query without any entry would average the stale content of empty slots
        output *= has_entries[:, None, None, None]
        logsumexp = torch.where(has_entries[:, None, None], logsumexp, EXCLUDED)
        ctx.save_for_backward(queries, keys, values, mask, has_entries, output, logsumexp)
        return output, logsumexp

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad_output: Tensor, grad_logsumexp: Tensor
    ) -> tuple[Tensor | None, ...]:
        queries, keys, values, mask, has_entries, output, logsumexp = ctx.saved_tensors
        inner = (grad_output * output).sum(dim=-1) - grad_logsumexp
        grad_queries = torch.empty_like(queries)
        for part in _parts(queries, keys):
            # a row without entries has no denominator
            logits = _logits(part, queries, keys, mask) - logsumexp[part][..., None]
            weights = logits.clamp(max=0).exp()
            grad_weights = grad_output[part] @ values[part[:2]].to(weights.dtype).mT
            grad_logits = weights * (grad_weights - inner[part][..., None])
            grad_queries[part] = grad_logits @ keys[part[:2]].to(weights.dtype)
        grad_queries *= has_entries[:, None, None, None]
        return grad_queries, None, None, None, None


def _logits(
    part: tuple[slice, slice, slice], queries: Tensor, keys: Tensor, mask: Tensor
) -> Tensor:
    return queries[part] @ keys[part[:2]].to(queries.dtype).mT + mask[part[0], None, None]


def _parts(queries: Tensor, keys: Tensor) -> list[tuple[slice, slice, slice]]:
    """Cut rows, key-value heads and queries into pieces whose scores fit the byte budget.

    Returns:
        Slices of the three axes: whole rows if they fit, or whole heads, or queries of a head.
    """
    batch, groups, num_queries, _ = queries.shape
    budget = _CHUNK_BYTES.get(queries.device.type, _CHUNK_BYTES["cuda"])
    fitting = max(1, budget // (4 * max(1, keys.shape[2])))
    query_step = max(1, min(num_queries, fitting))
    group_step = max(1, min(groups, fitting // max(1, num_queries)))
    row_step = max(1, min(batch, fitting // max(1, num_queries * groups)))
    return [
        (
            slice(row, row + row_step),
            slice(group, group + group_step),
            slice(query, query + query_step),
        )
        for row in range(0, batch, row_step)
        for group in range(0, groups, group_step)
        for query in range(0, num_queries, query_step)
    ]
