"""Groups and buckets of scores, which the searches of a CPU reduce to maxima."""

from typing import NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor

from byheart.ops.search_select import GROUP

# a level of group maxima wider than this is reduced once more before its hits are listed
_LISTED_WIDTH = 2048


class ScanPlan(NamedTuple):
    """How the scores of a query are reduced: `GROUP ** levels * repeats * buckets` of them."""

    levels: int
    repeats: int
    buckets: int

    @property
    def width(self) -> int:
        """Scores, padding included."""
        return int(GROUP**self.levels * self.repeats * self.buckets)


def num_buckets(top_k: int) -> int:
    """Return the number of buckets whose maxima give the cut.

    The `top_k`-th largest of `n` bucket maxima is exceeded by about `top_k * (1 + top_k / (2 * n))`
    scores.

    Args:
        top_k: Neighbours per query.

    Returns:
        The least number of buckets; the scan needs `GROUP` entries for each.
    """
    # 512 is the widest row that NumPy partitions within vector registers
    return max(2 * top_k, min(8 * top_k, 512))


def plan_scan(num_entries: int, top_k: int, multiple: int) -> ScanPlan:
    """Choose levels of groups and buckets.

    Args:
        num_entries: Entries, at least `GROUP * num_buckets(top_k)`.
        top_k: Neighbours per query.
        multiple: What divides the number of buckets.

    Returns:
        A plan at least as wide as the entries.
    """
    least = num_buckets(top_k)
    levels = 1
    while (
        num_entries // GROUP**levels > _LISTED_WIDTH
        and num_entries // GROUP ** (levels + 1) >= least
    ):
        levels += 1
    columns = -(-num_entries // GROUP**levels)
    repeats = max(1, columns // least)
    wide = ScanPlan(levels, repeats, _round_up(-(-columns // repeats), multiple))
    buckets = _round_up(least, multiple)
    narrow = ScanPlan(levels, -(-columns // buckets), buckets)
    return min(wide, narrow, key=lambda plan: plan.width)


def _round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


def drop_crowded(
    query_ids: Int[Tensor, " hit"], places: Int[Tensor, " hit"], num_queries: int, limit: int
) -> tuple[Int[Tensor, " kept"], Int[Tensor, " kept"], Int[Tensor, " query"]]:
    """Drop all hits of queries that have more than `limit`.

    Args:
        query_ids: Queries of the hits.
        places: Where they are.
        num_queries: Queries in all.
        limit: Hits that a query may have.

    Returns:
        The queries and places kept, and how many each query keeps.
    """
    counts_Q = torch.bincount(query_ids, minlength=num_queries)
    too_many_Q = counts_Q > limit
    if too_many_Q.any():
        kept = ~too_many_Q.index_select(0, query_ids)
        query_ids, places = query_ids[kept], places[kept]
        counts_Q = counts_Q.masked_fill(too_many_Q, 0)
    return query_ids, places, counts_Q
