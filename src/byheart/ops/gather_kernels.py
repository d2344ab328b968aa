"""Kernels of attention over retrieved entries on a GPU. Imports Triton, as `search_kernels` does.

One program reads the entries of one query from where they are, a part of their width at a time, and
keeps a number per entry: nothing of the size `top_k * head_dim` is written.
"""

from typing import no_type_check

import triton
import triton.language as tl

from byheart.ops.search_kernels import widened

# must be `byheart.ops.attention.EXCLUDED`; kernels can only read constants of their own module
EXCLUDED = tl.constexpr(-1.7014117331926443e38)


@triton.jit
@no_type_check
def _load_logits(
    scores_ptr,
    valid_ptr,
    bias_ptr,
    place,
    scale,
    ranks,
    TOP_K: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    EMPTY_AS_ZERO: tl.constexpr,
):
    """Return scores, validity and logits of the neighbours of a query; -inf beyond `TOP_K`."""
    inside = ranks < TOP_K
    at = place * TOP_K + ranks
    is_valid = tl.load(valid_ptr + at, mask=inside, other=0) != 0
    scores = tl.load(scores_ptr + at, mask=is_valid, other=0.0).to(tl.float32)
    logits = scores * scale
    if HAS_BIAS:
        logits += tl.load(bias_ptr + at, mask=is_valid, other=0.0).to(tl.float32)
    if EMPTY_AS_ZERO:
        logits = tl.where(is_valid, logits, 0.0)
    else:
        logits = tl.where(is_valid, logits, EXCLUDED)
    return scores, is_valid, tl.where(inside, logits, float("-inf"))


@triton.jit
@no_type_check
def _load_slots(slots_ptr, place, is_valid, ranks, TOP_K: tl.constexpr):
    return tl.load(slots_ptr + place * TOP_K + ranks, mask=is_valid, other=0).to(tl.int64)


@triton.jit
@no_type_check
def _load_part(entry_ptrs, is_valid, dims, HEAD_DIM: tl.constexpr, ENTRY_DTYPE: tl.constexpr):
    # what an invalid slot holds may be NaN, and zero times NaN is not zero
    mask = is_valid[:, None] & (dims < HEAD_DIM)[None, :]
    part = tl.load(entry_ptrs[:, None] + dims[None, :], mask=mask, other=0)
    return widened(part, ENTRY_DTYPE).to(tl.float32)


@triton.jit
@no_type_check
def _store_weighted_sum(
    weights,
    entry_ptrs,
    is_valid,
    output_ptr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ENTRY_DTYPE: tl.constexpr,
):
    for start in range(0, HEAD_DIM, BLOCK_D):
        dims = start + tl.arange(0, BLOCK_D)
        part = _load_part(entry_ptrs, is_valid, dims, HEAD_DIM, ENTRY_DTYPE)
        total = tl.sum(weights[:, None] * part, axis=0)
        total = total.to(output_ptr.dtype.element_ty)
        tl.store(output_ptr + dims, total, mask=dims < HEAD_DIM)


@triton.jit
@no_type_check
def _dot_entries(
    vector_ptr,
    entry_ptrs,
    is_valid,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ENTRY_DTYPE: tl.constexpr,
):
    dots = tl.zeros(is_valid.shape, tl.float32)
    for start in range(0, HEAD_DIM, BLOCK_D):
        dims = start + tl.arange(0, BLOCK_D)
        part = _load_part(entry_ptrs, is_valid, dims, HEAD_DIM, ENTRY_DTYPE)
        vector = tl.load(vector_ptr + dims, mask=dims < HEAD_DIM, other=0.0).to(tl.float32)
        dots += tl.sum(part * vector[None, :], axis=1)
    return dots


@triton.jit
@no_type_check
def attend(
    scale_ptr,
    values_ptr,
    scores_ptr,
    slots_ptr,
    valid_ptr,
    bias_ptr,
    output_ptr,
    logsumexp_ptr,
    num_queries,
    num_heads,
    queries_per_kv_head,
    row_stride,
    head_stride,
    entry_stride,
    HEAD_DIM: tl.constexpr,
    TOP_K: tl.constexpr,
    TOP_K_PAD: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ENTRY_DTYPE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    EMPTY_AS_ZERO: tl.constexpr,
):
    """Average the values of the neighbours of one query."""
    pair = tl.program_id(1).to(tl.int64)
    place = pair * num_queries + tl.program_id(0)
    row, head = pair // num_heads, pair % num_heads
    ranks = tl.arange(0, TOP_K_PAD)
    _, is_valid, logits = _load_logits(
        scores_ptr, valid_ptr, bias_ptr, place, tl.load(scale_ptr + head).to(tl.float32),
        ranks, TOP_K, HAS_BIAS, EMPTY_AS_ZERO,
    )  # fmt: skip
    largest = tl.max(logits, axis=0)
    powers = tl.exp(logits - largest)
    denominator = tl.sum(powers, axis=0)
    logsumexp = largest + tl.log(denominator)
    if not EMPTY_AS_ZERO:
        is_empty = tl.max(is_valid.to(tl.int32), axis=0) == 0
        logsumexp = tl.where(is_empty, EXCLUDED, logsumexp)
    tl.store(logsumexp_ptr + place, logsumexp)
    # a query without any entry would average the stale content of empty slots
    weights = tl.where(is_valid, powers / denominator, 0.0)
    slots = _load_slots(slots_ptr, place, is_valid, ranks, TOP_K)
    values_ptr += row * row_stride + (head // queries_per_kv_head) * head_stride
    value_ptrs = values_ptr + slots * entry_stride
    output_ptr += place * HEAD_DIM
    _store_weighted_sum(weights, value_ptrs, is_valid, output_ptr, HEAD_DIM, BLOCK_D, ENTRY_DTYPE)


@triton.jit
@no_type_check
def attend_backward(
    grad_output_ptr,
    grad_logsumexp_ptr,
    logsumexp_ptr,
    scale_ptr,
    keys_ptr,
    values_ptr,
    scores_ptr,
    slots_ptr,
    valid_ptr,
    bias_ptr,
    grad_queries_ptr,
    grad_scale_ptr,
    num_queries,
    num_heads,
    queries_per_kv_head,
    key_row_stride,
    key_head_stride,
    key_entry_stride,
    value_row_stride,
    value_head_stride,
    value_entry_stride,
    HEAD_DIM: tl.constexpr,
    TOP_K: tl.constexpr,
    TOP_K_PAD: tl.constexpr,
    BLOCK_D: tl.constexpr,
    KEY_DTYPE: tl.constexpr,
    VALUE_DTYPE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    EMPTY_AS_ZERO: tl.constexpr,
):
    """Write the gradient of one query, and its share of the gradient of the scale."""
    pair = tl.program_id(1).to(tl.int64)
    place = pair * num_queries + tl.program_id(0)
    row, head = pair // num_heads, pair % num_heads
    kv_head = head // queries_per_kv_head
    ranks = tl.arange(0, TOP_K_PAD)
    scale = tl.load(scale_ptr + head).to(tl.float32)
    scores, is_valid, logits = _load_logits(
        scores_ptr, valid_ptr, bias_ptr, place, scale, ranks, TOP_K, HAS_BIAS, EMPTY_AS_ZERO
    )
    # the weights again, from the denominator
    weights = tl.where(is_valid, tl.exp(logits - tl.load(logsumexp_ptr + place)), 0.0)
    slots = _load_slots(slots_ptr, place, is_valid, ranks, TOP_K)
    values_ptr += row * value_row_stride + kv_head * value_head_stride
    value_ptrs = values_ptr + slots * value_entry_stride
    grad_output_ptr += place * HEAD_DIM
    grad_weights = _dot_entries(
        grad_output_ptr, value_ptrs, is_valid, HEAD_DIM, BLOCK_D, VALUE_DTYPE
    )
    inner = tl.sum(weights * grad_weights, axis=0)
    grad_logits = weights * (grad_weights - inner + tl.load(grad_logsumexp_ptr + place))
    tl.store(grad_scale_ptr + place, tl.sum(grad_logits * scores, axis=0))
    grad_scores = grad_logits * scale
    keys_ptr += row * key_row_stride + kv_head * key_head_stride
    key_ptrs = keys_ptr + slots * key_entry_stride
    grad_queries_ptr += place * HEAD_DIM
    _store_weighted_sum(
        grad_scores, key_ptrs, is_valid, grad_queries_ptr, HEAD_DIM, BLOCK_D, KEY_DTYPE
    )
