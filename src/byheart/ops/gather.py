"""Attention over retrieved entries, without a gradient into the memory."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from byheart.ops.attention import EXCLUDED, Attended, wide_dtype
from byheart.ops.gather_triton import KernelGatherAttend, uses_gather_kernels
from byheart.ops.search import Neighbours

# Gathered keys or values held at a time. On a CPU a chunk should stay in the cache; on a GPU
# larger chunks mean fewer launches.
_CHUNK_BYTES = {"cpu": 8 << 20, "cuda": 512 << 20}


def gather_attend(
    queries: Float[Tensor, "batch heads query head_dim"],
    scale: Float[Tensor, " heads"],
    keys: Float[Tensor, "batch kv_heads entry head_dim"],
    values: Float[Tensor, "batch kv_heads entry head_dim"],
    found: Neighbours,
    *,
    bias: Float[Tensor, "batch heads query top_k"] | None = None,
    empty_as_zero: bool = False,
) -> Attended:
    """Attend to the retrieved entries only: softmax over the neighbours, then their values.

    The gradient reaches `queries` and `scale`, never `keys` and `values`. Backward gathers again
    instead of keeping `[batch, heads, query, top_k, head_dim]` tensors; if the memory was written
    in between, autograd refuses (commit after backward).

    On CUDA, kernels do the same without any such tensor, where Triton works and knows the types.

    Args:
        queries: Queries before the scale.
        scale: Factor of the scores, per head.
        keys: All slots of the memory.
        values: All slots of the memory.
        found: What a search found for these queries; its scores are inner products without a bias,
            used as they are.
        bias: Added to the scores of retrieved entries, after the scale; gets no gradient.
        empty_as_zero: Whether a retrieved slot without an entry takes part in the softmax as a key
            and value of zeros, as in the authors' code, instead of being left out.

    Returns:
        Output (in the dtype of the queries) and log of the softmax denominator (in `wide_dtype`). A
        query without any entry gets zeros and `EXCLUDED`.

    Source:
        Wu et al. 2022, Memorizing Transformers, "kNN-augmented attention layer" (arXiv:2203.08913).
    """
    if uses_gather_kernels(queries, keys, values, found.slots.shape[3]):
        return Attended(
            *KernelGatherAttend.apply(  # type: ignore[no-untyped-call]
                queries, scale, keys, values, *found, bias, empty_as_zero
            )
        )
    logit_of_empty = 0.0 if empty_as_zero else EXCLUDED
    # weights are computed in float32, and backward, which knows no autocast, computes them again
    with torch.autocast(queries.device.type, enabled=False):
        output, logsumexp = _GatherAttend.apply(  # type: ignore[no-untyped-call]
            queries, scale, keys, values, found, bias, logit_of_empty
        )
    return Attended(output, logsumexp)


class _GatherAttend(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        queries: Tensor,
        scale: Tensor,
        keys: Tensor,
        values: Tensor,
        found: Neighbours,
        bias: Tensor | None,
        logit_of_empty: float,
    ) -> tuple[Tensor, Tensor]:
        valid, wide = found.valid, wide_dtype(queries)
        scores = found.scores.to(wide).masked_fill(~valid, 0.0)
        logits_BHQK = scores * scale.to(wide)[:, None, None]
        if bias is not None:
            logits_BHQK = logits_BHQK + bias.to(wide)
        logits_BHQK = logits_BHQK.masked_fill(~valid, logit_of_empty)
        # a query without any entry would average the stale content of empty slots
        weights_BHQK = torch.softmax(logits_BHQK, dim=-1) * valid
        logsumexp = torch.logsumexp(logits_BHQK, dim=-1)
        if logit_of_empty == EXCLUDED:
            logsumexp = logsumexp.masked_fill(~valid.any(-1), EXCLUDED)
        output = torch.empty(queries.shape, device=queries.device, dtype=wide)
        for part, rows in _chunks(found.slots, values):
            output.flatten(0, 1)[part] = _weighted(weights_BHQK.flatten(0, 1)[part], values, rows)
        ctx.save_for_backward(queries, scale, keys, values, found.slots, scores, weights_BHQK)
        # compiled by torch 2.11, an output that `to` leaves as it is loses its gradient
        return output if wide == queries.dtype else output.to(queries.dtype), logsumexp

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad_output: Tensor, grad_logsumexp: Tensor
    ) -> tuple[Tensor | None, ...]:
        queries, scale, keys, values, slots, scores, weights_BHQK = ctx.saved_tensors
        wide = weights_BHQK.dtype
        grad_weights_BHQK = torch.empty(weights_BHQK.shape, device=queries.device, dtype=wide)
        grad_output_BHQD = grad_output.to(wide).contiguous()
        for part, rows in _chunks(slots, values):
            values_NQKD = _gather(values, rows, wide)
            grad_weights_BHQK.flatten(0, 1)[part] = (
                values_NQKD @ grad_output_BHQD.flatten(0, 1)[part][..., None]
            ).squeeze(-1)
        inner_BHQ1 = (weights_BHQK * grad_weights_BHQK).sum(-1, keepdim=True)
        grad_logits_BHQK = weights_BHQK * (
            grad_weights_BHQK - inner_BHQ1 + grad_logsumexp[..., None]
        )
        grad_scale = (grad_logits_BHQK * scores).sum((0, 2, 3)).to(scale.dtype)
        grad_scores_BHQK = grad_logits_BHQK * scale.to(wide)[:, None, None]
        grad_queries = torch.empty(queries.shape, device=queries.device, dtype=wide)
        for part, rows in _chunks(slots, keys):
            grad_queries.flatten(0, 1)[part] = _weighted(
                grad_scores_BHQK.flatten(0, 1)[part], keys, rows
            )
        return grad_queries.to(queries.dtype), grad_scale, None, None, None, None, None


def _chunks(slots_BHQK: Tensor, entries_BGND: Tensor) -> list[tuple[slice, Tensor]]:
    """Cut the (row, head) pairs into chunks whose gathered entries fit the byte budget.

    Returns:
        For each chunk its slice of the flattened (row, head) axis, and the row numbers of its
        slots in the memory seen as one `[batch * kv_heads * entry, head_dim]` matrix.
    """
    batch, heads, num_queries, top_k = slots_BHQK.shape
    _, kv_heads, num_slots, head_dim = entries_BGND.shape
    pair = torch.arange(batch * heads, device=slots_BHQK.device)
    store_of_pair = pair // heads * kv_heads + pair % heads // (heads // kv_heads)
    bytes_per_pair = max(1, num_queries * top_k * head_dim * 4)
    budget = _CHUNK_BYTES.get(slots_BHQK.device.type, _CHUNK_BYTES["cuda"])
    step = max(1, budget // bytes_per_pair)
    slots_NQK = slots_BHQK.flatten(0, 1)
    return [
        (
            slice(start, start + step),
            slots_NQK[start : start + step]
            + store_of_pair[start : start + step, None, None] * num_slots,
        )
        for start in range(0, batch * heads, step)
    ]


def _gather(entries_BGND: Tensor, rows_NQK: Tensor, dtype: torch.dtype) -> Tensor:
    flat = entries_BGND.reshape(-1, entries_BGND.shape[-1])
    gathered = flat.index_select(0, rows_NQK.reshape(-1)).to(dtype)
    return gathered.view(*rows_NQK.shape, -1)


def _weighted(weights_NQK: Tensor, entries_BGND: Tensor, rows_NQK: Tensor) -> Tensor:
    return (weights_NQK[..., None, :] @ _gather(entries_BGND, rows_NQK, weights_NQK.dtype)).squeeze(
        -2
    )
