"""Slow twins of the searches: what a neighbour is, in loops a reader can check."""

from itertools import product

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from byheart.ops.search import Neighbours


def _scored_entries(
    query_D: Tensor, keys_ND: Tensor, valid_N: Tensor, bias_N: Tensor | None
) -> list[tuple[float, int]]:
    """Return score and slot of every valid entry."""
    bias = [0.0] * len(keys_ND) if bias_N is None else bias_N.tolist()
    return [
        (float(torch.dot(query_D.float(), key_D.float()) + bias[slot]), slot)
        for slot, key_D in enumerate(keys_ND)
        if valid_N[slot]
    ]


def _empty(queries: Tensor, top_k: int) -> Neighbours:
    shape = (*queries.shape[:3], top_k)
    return Neighbours(
        torch.full(shape, torch.finfo(torch.float32).min),
        torch.zeros(shape, dtype=torch.int64),
        torch.zeros(shape, dtype=torch.bool),
    )


def _fill(found: Neighbours, place: tuple[int, int, int], best: list[tuple[float, int]]) -> None:
    for rank, (score, slot) in enumerate(best):
        found.scores[(*place, rank)] = score
        found.slots[(*place, rank)] = slot
        found.valid[(*place, rank)] = True


def top_k_inner_product(
    queries: Float[Tensor, "batch heads query head_dim"],
    keys: Float[Tensor, "batch kv_heads entry head_dim"],
    valid: Bool[Tensor, "batch entry"],
    top_k: int,
    bias: Float[Tensor, "batch entry"] | None = None,
) -> Neighbours:
    """Score every valid entry, sort, and keep the first `top_k`.

    The twin of `byheart.ops.search.top_k_inner_product`.

    Args:
        queries: One query per token of the segment.
        keys: All slots of the memory.
        valid: `True` where the slot holds an entry.
        top_k: Number of neighbours.
        bias: Added to the scores of each entry.

    Returns:
        Scores, slots and validity.
    """
    batch, heads, num_queries, _ = queries.shape
    repeats = heads // keys.shape[1]
    found = _empty(queries, top_k)
    for b, h, q in product(range(batch), range(heads), range(num_queries)):
        bias_N = None if bias is None else bias[b]
        scored = _scored_entries(queries[b, h, q], keys[b, h // repeats], valid[b], bias_N)
        _fill(found, (b, h, q), sorted(scored, reverse=True)[:top_k])
    return found


def strided_bucket_top_k(
    queries: Float[Tensor, "batch heads query head_dim"],
    keys: Float[Tensor, "batch kv_heads entry head_dim"],
    valid: Bool[Tensor, "batch entry"],
    num_buckets: int,
    top_k: int | None = None,
    bias: Float[Tensor, "batch entry"] | None = None,
) -> Neighbours:
    """Keep the best valid entry of each bucket, sort, and keep the first `top_k` of these.

    The twin of `byheart.ops.bucket_search.strided_bucket_top_k`.

    Args:
        queries: One query per token of the segment.
        keys: All slots of the memory.
        valid: `True` where the slot holds an entry.
        num_buckets: Slot `i` lies in bucket `i % num_buckets`.
        top_k: Number of neighbours; `None` for one of each bucket.
        bias: Added to the scores of each entry.

    Returns:
        Scores, slots and validity.
    """
    batch, heads, num_queries, _ = queries.shape
    repeats = heads // keys.shape[1]
    kept = num_buckets if top_k is None else top_k
    found = _empty(queries, kept)
    for b, h, q in product(range(batch), range(heads), range(num_queries)):
        best_of_bucket: dict[int, tuple[float, int]] = {}
        bias_N = None if bias is None else bias[b]
        scored = _scored_entries(queries[b, h, q], keys[b, h // repeats], valid[b], bias_N)
        for score, slot in scored:
            bucket = slot % num_buckets
            best_of_bucket[bucket] = max(best_of_bucket.get(bucket, (score, slot)), (score, slot))
        _fill(found, (b, h, q), sorted(best_of_bucket.values(), reverse=True)[:kept])
    return found


def recall(found: Neighbours, exact: Neighbours) -> Float[Tensor, ""]:
    """Count the exact neighbours that were found.

    The twin of `byheart.ops.search.recall`.

    Args:
        found: Neighbours from any search.
        exact: The true neighbours.

    Returns:
        Their share; 1 where there is no neighbour to find.
    """
    hits = total = 0
    for place in product(*map(range, exact.slots.shape[:3])):
        wanted = set(exact.slots[place][exact.valid[place]].tolist())
        hits += len(wanted & set(found.slots[place][found.valid[place]].tolist()))
        total += len(wanted)
    return torch.tensor(hits / total if total else 1.0)
