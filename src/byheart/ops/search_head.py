"""Exact top-k of one head on the CPU: a scan or a product, whichever is faster, slab by slab."""

from itertools import pairwise

import torch
from jaxtyping import Float, Int
from torch import Tensor

from byheart.ops.processor import multiplies_bfloat16
from byheart.ops.search_cpu import scan_top_k
from byheart.ops.search_float32 import SCORE_BYTES, float32_top_k
from byheart.ops.search_groups import num_buckets
from byheart.ops.search_select import GROUP, Buffers, product_top_k, sort_packed, unpack

# below these sizes the float32 product is as fast as the bfloat16 scan, whose cost per key (the
# rounding) and per call of a PyTorch operation does not shrink with the queries
_SCAN_MIN_ENTRIES = 8192
_SCAN_MIN_QUERIES = 128
# below these, the product in which neighbours are queries first is as fast (AVX2, 2 cores)
_CUT_MIN_ENTRIES = 8192
_CUT_MIN_QUERIES = 4
# a block of queries reads the keys of a slab; with fewer at once that takes longer than the product
_BLOCK_QUERIES = 64
# a slab is no longer for fewer queries than these: its keys may have to be copied in float32
_FEWEST_QUERIES = 16


def _uses_scan(
    num_queries: int, num_entries: int, top_k: int, scan_dtype: torch.dtype | None
) -> bool:
    if num_entries < GROUP * num_buckets(top_k) or scan_dtype is torch.float32:
        return False
    if scan_dtype is torch.bfloat16:
        return True
    if num_queries < _SCAN_MIN_QUERIES or num_entries < _SCAN_MIN_ENTRIES:
        return False
    return multiplies_bfloat16(torch.device("cpu"))


def _uses_cut(num_queries: int, num_entries: int, top_k: int) -> bool:
    least = max(_CUT_MIN_ENTRIES, GROUP * num_buckets(top_k))
    return num_queries >= _CUT_MIN_QUERIES and num_entries >= least


def _search_slab(
    queries_QD: Tensor,
    keys_ND: Tensor,
    bias_N: Tensor | None,
    top_k: int,
    max_bytes: int,
    scan_dtype: torch.dtype | None,
    buffers: Buffers,
) -> tuple[Tensor, Tensor]:
    def product(queries_QD: Tensor) -> tuple[Tensor, Tensor]:
        if _uses_cut(queries_QD.shape[0], keys_ND.shape[0], top_k):
            return float32_top_k(queries_QD, keys_ND, bias_N, top_k, max_bytes, buffers)
        bias_PN = None if bias_N is None else bias_N[None]
        scores, slots = product_top_k(
            queries_QD[None], keys_ND[None], None, top_k, max_bytes, buffers, bias_PN
        )
        return scores[0], slots[0]

    if not _uses_scan(queries_QD.shape[0], keys_ND.shape[0], top_k, scan_dtype):
        return product(queries_QD)
    scores_QK, slots_QK, proven_Q = scan_top_k(
        queries_QD, keys_ND, top_k, max_bytes // 2, buffers, bias_N
    )
    if not proven_Q.all():
        rest = (~proven_Q).nonzero().squeeze(1)
        scores_QK[rest], slots_QK[rest] = product(queries_QD[rest])
    return scores_QK, slots_QK


def search_head(
    queries_QD: Float[Tensor, "query head_dim"],
    keys_ND: Float[Tensor, "entry head_dim"],
    bias_N: Float[Tensor, " entry"] | None,
    top_k: int,
    max_bytes: int,
    scan_dtype: torch.dtype | None,
    buffers: Buffers,
) -> tuple[Float[Tensor, "query top_k"], Int[Tensor, "query top_k"]]:
    """Find the keys with the largest inner products, exactly; many keys a slab at a time.

    Args:
        queries_QD: Queries in float32.
        keys_ND: Keys of one head, all of them entries.
        bias_N: Added to the scores of each entry.
        top_k: Neighbours per query, at most `entry`.
        max_bytes: Bytes of scores held at a time.
        scan_dtype: Precision of the first pass; `None` for the faster one.
        buffers: Reused memory.

    Returns:
        Scores, descending, and slots.
    """
    num_queries, num_entries = queries_QD.shape[0], keys_ND.shape[0]
    limits = (top_k, max_bytes, scan_dtype, buffers)
    together = max(_FEWEST_QUERIES, min(num_queries, _BLOCK_QUERIES))
    least = GROUP * num_buckets(top_k)
    fitting = max(max_bytes // (SCORE_BYTES * together), least)
    num_slabs = min(round(num_entries / fitting), num_entries // least)
    in_slabs = _uses_scan(num_queries, num_entries, top_k, scan_dtype) or _uses_cut(
        num_queries, num_entries, top_k
    )
    if num_slabs < 2 or not in_slabs:
        return _search_slab(queries_QD, keys_ND, bias_N, *limits)  # cuts a product by itself
    # of equal size, so that each holds `top_k` entries
    edges = [num_entries * index // num_slabs for index in range(num_slabs + 1)]
    best: tuple[Tensor, Tensor] | None = None
    for start, stop in pairwise(edges):
        part = slice(start, stop)
        bias = None if bias_N is None else bias_N[part]
        scores_QK, slots_QK = _search_slab(queries_QD, keys_ND[part], bias, *limits)
        slots_QK = slots_QK + start
        if best is not None:
            scores_QK = torch.cat([best[0], scores_QK], dim=1)
            slots_QK = torch.cat([best[1], slots_QK], dim=1)
            scores_QK, slots_QK = unpack(
                sort_packed(scores_QK, slots_QK, top_k, buffers, in_order=True)
            )
        best = scores_QK, slots_QK
    assert best is not None
    return best
