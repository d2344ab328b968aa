"""Exact top-k of one head on the CPU: a float32 product, group maxima, the scores above a cut.

The scores of a block of queries stay in the cache while they are selected from. They lie keys
first, `[entry, query]`: a product of many keys by few queries is up to three times as fast that way
(MKL on AVX2), and maxima over entries then run along whole rows.

The `top_k`-th largest of some bucket maxima is reached by at least `top_k` entries, so whatever
lies below that cut is not among the `top_k` largest. Usually 1.1 times `top_k` entries reach it.
They are found from the top, group by group, and one vectorised sort of 64-bit words, query, score
and slot in one, orders those of all queries. A query with too many of them, such as one with
thousands of equal scores, has its row of scores searched instead.
"""

from itertools import pairwise

import torch
from jaxtyping import Float, Int
from torch import Tensor

from byheart.ops.search_groups import ScanPlan, drop_crowded, plan_scan
from byheart.ops.search_select import GROUP, Buffers, largest, ordered_bits

# bytes of a score
SCORE_BYTES = 4

# entries that reach the cut, in units of top_k, above which a query is searched by itself
_MAX_SURVIVORS = 4

# eight flags side by side in one int64 word
_LANES = 8

# blocks of other numbers of queries are multiplied more slowly, by up to a third
_BLOCK_MULTIPLE = 64

# a word of the last sort holds a query, the 32 bits of a score and a slot
_MAX_SCORES = 1 << 29


def _true_places(flags: Tensor) -> Int[Tensor, " place"]:
    """List where flags are set, in order; there must be a multiple of `_LANES` of them.

    Few are: listing an eighth as many words first takes a quarter of the time.

    Returns:
        Places among the flags.
    """
    word_ids = flags.view(-1).view(torch.int64).nonzero().squeeze(1)
    lane_ids = flags.view(-1, _LANES).index_select(0, word_ids).view(-1).nonzero().squeeze(1)
    words = word_ids.index_select(0, lane_ids >> (_LANES.bit_length() - 1))
    return words.mul_(_LANES).add_(lane_ids & (_LANES - 1))


def _scores(
    queries_QD: Tensor, keys_ND: Tensor, bias_N: Tensor | None, plan: ScanPlan, buffers: Buffers
) -> list[Tensor]:
    """Return the scores, entries first and padded, then their group maxima, level by level.

    Group `j` of `n` holds the entries `j`, `j + n`, `j + 2 * n`, ...: neighbours in time fall into
    different groups.
    """
    num_queries, num_entries, width = len(queries_QD), len(keys_ND), plan.width
    scores_NQ = buffers.take("float32.scores", (width, num_queries), torch.float32)
    out = scores_NQ[:num_entries]
    if bias_N is None:
        torch.mm(keys_ND, queries_QD.t(), out=out)
    else:
        bias_NQ = bias_N.unsqueeze(1).expand(-1, num_queries)
        torch.addmm(bias_NQ, keys_ND, queries_QD.t(), out=out)
    scores_NQ[num_entries:] = -torch.inf
    levels = [scores_NQ]
    for level in range(1, plan.levels + 1):
        width //= GROUP
        coarse = buffers.take(f"float32.level{level}", (width, num_queries), torch.float32)
        torch.amax(levels[-1].view(GROUP, width, num_queries), dim=0, out=coarse)
        levels.append(coarse)
    return levels


def _cut(coarsest_GQ: Tensor, plan: ScanPlan, top_k: int, buffers: Buffers) -> Tensor:
    """Return a score per query that at least `top_k` entries reach; NaN where none is known."""
    num_queries = coarsest_GQ.shape[1]
    maxima_BQ = coarsest_GQ.view(plan.repeats, plan.buckets, num_queries).amax(0)
    maxima_QB = buffers.take("float32.maxima", (num_queries, plan.buckets), torch.float32)
    # to sort these short rows takes no longer than to partition them; NaN comes last
    maxima_QB.copy_(maxima_BQ.t()).numpy().sort(axis=1)
    cut_Q = maxima_QB[:, -top_k]
    # padding reaches minus infinity
    unknown_Q = maxima_QB[:, -1].isnan().logical_or_(cut_Q == -torch.inf)
    return cut_Q.masked_fill(unknown_Q, torch.nan)


def _survivors(levels: list[Tensor], cut_Q: Tensor, limit: int) -> tuple[Tensor, Tensor, Tensor]:
    """List the scores that reach the cut.

    Returns:
        Their queries, places among all scores, and values. Where many groups reach the cut, queries
        with more than `limit` of them are left out.
    """
    num_queries = len(cut_Q)
    places = _true_places(levels[-1] >= cut_Q)
    query_ids, values = places % num_queries, levels[-1].view(-1)
    for coarse, fine in pairwise(reversed(levels)):
        if len(places) > limit * num_queries // 2:
            query_ids, places = drop_crowded(query_ids, places, num_queries, limit)[:2]
        values_GH = fine.view(GROUP, -1).index_select(1, places)
        members = _true_places(values_GH >= cut_Q.index_select(0, query_ids))
        ranks = members // max(1, len(places))
        parents = members - ranks * len(places)
        query_ids = query_ids.index_select(0, parents)
        places = ranks.mul_(coarse.numel()).add_(places.index_select(0, parents))
        values = values_GH.view(-1).index_select(0, members)
    return query_ids, places, values


def _sorted_words(query_ids: Tensor, values: Tensor, slots: Tensor, slot_bits: int) -> Tensor:
    """Return the survivors as words, ordered by query, then score, then slot."""
    bits = torch.empty_like(values, dtype=torch.int32)
    ordered_bits(values.view(torch.int32), bits)
    # signed integers that keep their order as the middle of a word: from zero up
    words = bits.long().add_(1 << 31).bitwise_or_(query_ids << 32)
    words.bitwise_left_shift_(slot_bits).bitwise_or_(slots)
    words.numpy().sort()
    return words


def _scores_of_words(words: Tensor, slot_bits: int) -> Tensor:
    bits = (words >> slot_bits).bitwise_and_((1 << 32) - 1).sub_(1 << 31).to(torch.int32)
    return ordered_bits(bits, torch.empty_like(bits)).view(torch.float32)


def _search_block(
    queries_QD: Tensor,
    keys_ND: Tensor,
    bias_N: Tensor | None,
    plan: ScanPlan,
    top_k: int,
    buffers: Buffers,
) -> tuple[Tensor, Tensor]:
    num_queries, num_entries = len(queries_QD), len(keys_ND)
    levels = _scores(queries_QD, keys_ND, bias_N, plan, buffers)
    cut_Q = _cut(levels[-1], plan, top_k, buffers)
    limit = _MAX_SURVIVORS * top_k
    query_ids, places, values = _survivors(levels, cut_Q, limit)
    counts_Q = torch.bincount(query_ids, minlength=num_queries)
    slot_bits = plan.width.bit_length()
    words = _sorted_words(query_ids, values, places // num_queries, slot_bits)
    last_Q = counts_Q.cumsum(0).sub_(1)
    # a query without survivors points at those of another, and is searched below
    found_QK = (last_Q.unsqueeze(1) - torch.arange(top_k)).clamp_(min=0)
    words_QK = words[found_QK] if len(words) > 0 else torch.zeros_like(found_QK)
    scores_QK = _scores_of_words(words_QK, slot_bits)
    slots_QK = words_QK.bitwise_and_((1 << slot_bits) - 1)
    rest = (counts_Q < top_k).nonzero().squeeze(1)
    if len(rest) > 0:
        rows = buffers.take("float32.rows", (len(rest), num_entries), torch.float32)
        rows.copy_(levels[0][:num_entries].index_select(1, rest).t())
        scores_QK[rest], slots_QK[rest] = largest(rows, top_k, buffers)
    return scores_QK, slots_QK


def float32_top_k(
    queries_QD: Float[Tensor, "query head_dim"],
    keys_ND: Float[Tensor, "entry head_dim"],
    bias_N: Float[Tensor, " entry"] | None,
    top_k: int,
    max_bytes: int,
    buffers: Buffers,
) -> tuple[Float[Tensor, "query top_k"], Int[Tensor, "query top_k"]]:
    """Find the keys with the largest inner products.

    Args:
        queries_QD: Queries in float32 on the CPU.
        keys_ND: Keys of one head, at least `GROUP * num_buckets(top_k)` of them, of any type.
        bias_N: Added to the scores of each entry.
        top_k: Neighbours per query.
        max_bytes: Size of the buffer of scores; decides how many queries share one.
        buffers: Reused memory.

    Returns:
        Scores, descending, and slots.
    """
    num_queries = len(queries_QD)
    plan = plan_scan(len(keys_ND), top_k, _LANES)
    if keys_ND.dtype is not torch.float32:
        keys_ND = buffers.take("float32.keys", tuple(keys_ND.shape), torch.float32).copy_(keys_ND)
    block = max(1, min(max_bytes // SCORE_BYTES, _MAX_SCORES) // plan.width)
    block -= block % _BLOCK_MULTIPLE if block > _BLOCK_MULTIPLE else 0
    scores_QK = torch.empty(num_queries, top_k)
    slots_QK = torch.empty(num_queries, top_k, dtype=torch.int64)
    for start in range(0, num_queries, block):
        part = slice(start, start + block)
        scores_QK[part], slots_QK[part] = _search_block(
            queries_QD[part], keys_ND, bias_N, plan, top_k, buffers
        )
    return scores_QK, slots_QK
