"""Exact nearest neighbours by inner product.

The result is that of a float32 matrix product followed by `topk`; the score matrix is never held.
`byheart.ops.reference_search` says the same in loops.
"""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from byheart.ops import known, search_plan, search_triton
from byheart.ops.search_rows import search_rows
from byheart.ops.search_select import (
    EXCLUDED,
    Buffers,
    buffers_on,
    default_max_bytes,
    product_top_k,
)


class Neighbours(NamedTuple):
    """The entries with the largest inner products, for each query and head."""

    scores: Float[Tensor, "batch heads query top_k"]
    """Inner products, with the bias if there is one, in float32; `finfo.min` where `valid` is
    false. In descending order if they come from a search."""
    slots: Int[Tensor, "batch heads query top_k"]
    """Their slots, int64 and always in range; 0 where `valid` is false."""
    valid: Bool[Tensor, "batch heads query top_k"]
    """False at the end of rows with fewer than `top_k` valid entries."""


def check_shapes(
    queries: Tensor, keys: Tensor, valid: Tensor | None = None, bias: Tensor | None = None
) -> None:
    """Refuse tensors that do not fit together.

    Args:
        queries: Batch, heads, queries, head_dim.
        keys: Batch, key-value heads, entries, head_dim.
        valid: Batch, entries; `None` if the caller has counted them.
        bias: Batch, entries.

    Raises:
        ValueError: If their shapes do not fit.
    """
    if queries.ndim != 4 or keys.ndim != 4:
        msg = (
            "queries and keys must have the axes batch, heads, tokens, head_dim, got shapes "
            f"{tuple(queries.shape)} and {tuple(keys.shape)}. Add the missing axes."
        )
        raise ValueError(msg)
    batch, heads, _, head_dim = queries.shape
    if keys.shape[0] != batch or keys.shape[3] != head_dim:
        msg = (
            f"keys must have the batch size ({batch}) and head_dim ({head_dim}) of the queries, "
            f"got {keys.shape[0]} and {keys.shape[3]}. Search a memory of the same model and batch."
        )
        raise ValueError(msg)
    if heads % keys.shape[1] != 0:
        msg = (
            f"The number of query heads must be a multiple of the key-value heads "
            f"({keys.shape[1]}), got {heads}. Search a memory of the same model."
        )
        raise ValueError(msg)
    if valid is not None and valid.shape != (batch, keys.shape[2]):
        msg = (
            f"valid must have the shape (batch, entry) = ({batch}, {keys.shape[2]}), got "
            f"{tuple(valid.shape)}. Pass one flag per row and slot."
        )
        raise ValueError(msg)
    if bias is not None and bias.shape != (batch, keys.shape[2]):
        msg = (
            f"bias must have the shape (batch, entry) = ({batch}, {keys.shape[2]}), got "
            f"{tuple(bias.shape)}. Pass one number per row and slot."
        )
        raise ValueError(msg)


def check_top_k(
    top_k: int,
    num_slots: int,
    *,
    name: str = "top_k",
    of: str = "memory slots",
    remedy: str = "raise memory_size",
) -> None:
    """Refuse a number of neighbours that a search cannot return.

    Args:
        top_k: Neighbours per query.
        num_slots: Slots of the memory, used or not.
        name: What the caller calls `top_k`.
        of: What the caller calls the slots.
        remedy: What to do instead of lowering `top_k`.

    Raises:
        ValueError: If `top_k` is not between 1 and `num_slots`.
    """
    if not 1 <= top_k <= num_slots:
        msg = (
            f"{name} must be between 1 and the number of {of} ({num_slots}), got {top_k}. "
            f"Lower {name} or {remedy}."
        )
        raise ValueError(msg)


def check_finite(queries: Tensor) -> None:
    """Refuse queries on the CPU that are not finite; elsewhere that would wait for the device.

    Args:
        queries: Of any shape.

    Raises:
        ValueError: If a query is NaN or infinite.
    """
    if known.values_are_known(queries) and not torch.isfinite(queries).all():
        msg = (
            "queries must be finite, got NaN or infinity. Look for the first layer whose output "
            "is not finite, or lower the learning rate."
        )
        raise ValueError(msg)


def _checked_bias(bias: Tensor | None, valid: Tensor) -> Tensor | None:
    """Return the bias in float32, zero where no entry is.

    Raises:
        ValueError: If a bias on the CPU is NaN or infinite.
    """
    if bias is None:
        return None
    bias = torch.where(valid, bias.float(), 0.0)
    if bias.is_cpu and not torch.isfinite(bias).all():
        msg = "bias must be finite where valid, got NaN or infinity. Leave entries out by valid."
        raise ValueError(msg)
    return bias


def _search_batch(
    queries_BGQD: Tensor,
    keys_BGND: Tensor,
    valid_BN: Tensor,
    bias_BN: Tensor | None,
    top_k: int,
    max_bytes: int,
    buffers: Buffers,
) -> Neighbours:
    """Search all rows at once and mask what is not valid: no shape depends on the values.

    Returns:
        Neighbours of the grouped queries.
    """
    num_groups = keys_BGND.shape[1]
    excluded_BN: Tensor | None = ~valid_BN
    if valid_BN.is_cpu:
        used = valid_BN.any(0).nonzero()
        last = max(top_k, int(used[-1]) + 1 if len(used) else 0)
        keys_BGND = keys_BGND[:, :, :last]
        excluded_BN = None if valid_BN[:, :last].all() else ~valid_BN[:, :last]
        bias_BN = None if bias_BN is None else bias_BN[:, :last]
    excluded_PN, bias_PN = (
        None if side is None else side.unsqueeze(1).expand(-1, num_groups, -1).flatten(0, 1)
        for side in (excluded_BN, bias_BN)
    )
    scores, slots = product_top_k(
        queries_BGQD.flatten(0, 1),
        keys_BGND.flatten(0, 1),
        excluded_PN,
        top_k,
        max_bytes,
        buffers,
        bias_PN,
    )
    is_valid = scores > EXCLUDED
    return Neighbours(scores, slots.masked_fill_(~is_valid, 0), is_valid)


@torch.no_grad()
def top_k_inner_product(
    queries: Float[Tensor, "batch heads query head_dim"],
    keys: Float[Tensor, "batch kv_heads entry head_dim"],
    valid: Bool[Tensor, "batch entry"],
    top_k: int,
    *,
    bias: Float[Tensor, "batch entry"] | None = None,
    max_bytes: int | None = None,
    scan_dtype: torch.dtype | None = None,
) -> Neighbours:
    """Find the `top_k` keys with the largest inner product with each query, exactly.

    Scores are not scaled by `1/sqrt(head_dim)`: the order does not depend on it. Consecutive query
    heads share a key-value head. The order of equal scores is not specified. Nothing carries a
    gradient.

    On a CPU that has bfloat16 products, large searches discard most keys by one, whose error is
    bounded, score the rest in float32 and prove the result for each query; what cannot be proven,
    and what other CPUs search, is selected from float32 scores (`byheart.ops.search_head`). Heads
    are searched side by side (`byheart.ops.search_rows`). On CUDA nothing waits for the device, and
    large searches keep group maxima instead of scores where Triton works
    (`byheart.ops.search_triton`).

    Args:
        queries: One query per token of the segment.
        keys: All slots of the memory, used or not, in any floating type; scores are sums of
            products of the stored values in float32, at the precision that
            `torch.set_float32_matmul_precision` allows.
        valid: `True` where the slot holds an entry. Keys of other slots are never looked at: they
            may hold NaN.
        top_k: Number of neighbours, at most the number of slots.
        bias: Added to the scores of each entry before the largest are chosen; finite where `valid`.
        max_bytes: Bytes of scores that a thread holds at a time; 16 MiB by default, and 512 MiB
            on CUDA.
        scan_dtype: `torch.bfloat16` or `torch.float32` for the first pass on a CPU; by default the
            faster of the two for the size and the processor. On CUDA, `torch.float32` asks for a
            product without the kernels. The result is the same.

    Returns:
        Scores, slots and validity.

    Raises:
        ValueError: If `top_k` is not between 1 and the number of slots, shapes do not fit,
            a query or bias on the CPU is not finite, or `scan_dtype` is another type.

    Source:
        Wu et al. 2022, Memorizing Transformers, "kNN-augmented attention layer" (arXiv:2203.08913),
        which searches approximately: see `byheart.ops.bucket_search`.
    """
    check_shapes(queries, keys, valid, bias)
    check_top_k(top_k, keys.shape[2])
    if scan_dtype not in (None, torch.float32, torch.bfloat16):
        msg = (
            f"scan_dtype must be torch.float32, torch.bfloat16 or None, got {scan_dtype}. "
            "Leave it out for the faster one."
        )
        raise ValueError(msg)
    if max_bytes is None:
        max_bytes = default_max_bytes(queries.device)
    return Neighbours(*_search(queries, keys, valid, bias, top_k, max_bytes, scan_dtype))


# one opaque operator: torch.compile would trace into the row loop and the NumPy sorts
@torch.library.custom_op("byheart::top_k_inner_product", mutates_args=())
def _search(
    queries: Tensor,
    keys: Tensor,
    valid: Tensor,
    bias: Tensor | None,
    top_k: int,
    max_bytes: int,
    scan_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor, Tensor]:
    check_finite(queries)
    bias = _checked_bias(bias, valid)
    shape = (*queries.shape[:3], top_k)
    device = queries.device
    with torch.autocast(device.type, enabled=False):
        # query heads that share a key-value head become more queries of it
        repeats = shape[1] // keys.shape[1]
        queries_BGQD = queries.reshape(shape[0], keys.shape[1], repeats * shape[2], keys.shape[3])
        score_bytes = 4 * shape[0] * shape[1] * shape[2] * keys.shape[2]
        fits = score_bytes <= max_bytes and scan_dtype is not torch.bfloat16
        plan = None
        if scan_dtype is not torch.float32:
            plan = search_plan.plan_search(queries, keys, top_k)
        found: tuple[Tensor, Tensor, Tensor]
        if plan is not None:
            # not widened: bfloat16 queries are multiplied as they are
            found = search_triton.search(queries_BGQD, keys, valid, bias, top_k, max_bytes, plan)
        elif fits or not queries.is_cpu:
            wide = queries_BGQD.float()
            with buffers_on(device) as buffers:
                found = _search_batch(wide, keys, valid, bias, top_k, max_bytes, buffers)
        else:
            wide = queries_BGQD.float()
            found = search_rows(wide, keys, valid, bias, top_k, max_bytes, scan_dtype)
    return found[0].view(shape), found[1].view(shape), found[2].view(shape)


@_search.register_fake
def _(
    queries: Tensor,
    keys: Tensor,
    valid: Tensor,
    bias: Tensor | None,
    top_k: int,
    max_bytes: int,
    scan_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor, Tensor]:
    shape = (*queries.shape[:3], top_k)
    return (
        queries.new_empty(shape, dtype=torch.float32),
        queries.new_empty(shape, dtype=torch.int64),
        queries.new_empty(shape, dtype=torch.bool),
    )


def recall(found: Neighbours, exact: Neighbours) -> Float[Tensor, ""]:
    """Return the share of the exact neighbours that were found.

    Args:
        found: Neighbours from any search.
        exact: The true neighbours.

    Returns:
        The mean over all valid entries of `exact`; 1 where there is none.
    """
    matches = (exact.slots.unsqueeze(-1) == found.slots.unsqueeze(-2)) & found.valid.unsqueeze(-2)
    hits = (matches.any(-1) & exact.valid).sum()
    total = exact.valid.sum()
    return torch.where(total > 0, hits / total.clamp_min(1), torch.ones_like(hits)).float()
