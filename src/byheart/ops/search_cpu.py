"""Exact top-k on the CPU: a bfloat16 scan, float32 scores of the survivors, a proof per query.

A bfloat16 product costs half a float32 product and leaves half as many bytes to select from, but
its scores are wrong in the third digit. So it only discards: with `error` a bound on how far any
scan score of a query can be from the truth, every entry whose scan score lies below `cut` has a
true score below `cut + error`. The survivors are scored again in float32; if the `top_k`-th of
those scores reaches `cut + error`, no discarded entry can belong to the top k. A query for which
that fails, or that has too many survivors, is returned as unproven and searched in float32.

Keys are shifted by a common vector before rounding. That changes all scores of a query by the same
amount, makes the error proportional to the spread of the keys and not to their length, and makes
the scores that matter positive, where bfloat16 numbers order like the integers of the same bits.

A bias of the entries is two more columns of the keys, its rounded value and what rounding left, for
which every query has a 1: the product adds it to the score almost without an error.
"""

import itertools
import math
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from byheart.ops.search_groups import ScanPlan, drop_crowded, plan_scan
from byheart.ops.search_select import EXCLUDED, GROUP, Buffers, sort_packed, unpack

# four int16 side by side in one int64 word: their sign bits
_SIGN_BITS = -0x7FFF7FFF7FFF8000
_LANES = 4

# the cut lies this many error bounds below the `top_k`-th bucket maximum. The proof needs one, and
# as much again as that maximum is overestimated. Of 1, 1.25, 1.5, 2 bounds, 1.5 is the first that
# leaves fewer than 1 in 1000 ordinary queries unproven; 2 keeps 5% more survivors
_CUT_ERRORS = 1.5

# columns that hold the bias of an entry: its bfloat16 value and the rest
_BIAS_COLUMNS = 2

# survivors of a query, in units of top_k, above which it is given up as unproven; typical is 1.2
_MAX_SURVIVORS = 4


class _Bias(NamedTuple):
    """A bias of the entries, shifted by `center`; how large it then is, and how far rounded."""

    values: Float[Tensor, " entry"]
    center: Float[Tensor, ""]
    max_size: Float[Tensor, ""]
    max_error: Float[Tensor, ""]


class _Codes(NamedTuple):
    """Keys of one head, shifted by `center` and rounded; rows beyond the entries are zero."""

    codes: Float[Tensor, "column width"]
    center: Float[Tensor, " head_dim"]
    max_norm: Float[Tensor, ""]
    max_error: Float[Tensor, ""]
    bias: _Bias | None


class _Queries(NamedTuple):
    """A block of queries with the bound on the error of their scan scores."""

    values: Float[Tensor, "query head_dim"]
    codes: Float[Tensor, "query width"]
    shift: Float[Tensor, " query"]
    error: Float[Tensor, " query"]


def _norms(vectors_ND: Tensor) -> Float[Tensor, " entry"]:
    """Return upper bounds of the lengths: squares of numbers below `2**-63` underflow to zero."""
    norms_N: Tensor = torch.linalg.vector_norm(vectors_ND, dim=1)
    return norms_N + math.sqrt(vectors_ND.shape[1]) * 2.0**-63


def _encode_bias(bias_N: Tensor, codes_N2: Tensor) -> _Bias:
    center = bias_N.mean()
    shifted_N = bias_N - center
    codes_N2[:, 0] = shifted_N
    rest_N = shifted_N - codes_N2[:, 0]
    codes_N2[:, 1] = rest_N
    max_error = (rest_N - codes_N2[:, 1]).abs().amax()
    return _Bias(bias_N, center, shifted_N.abs().amax(), max_error)


def _encode(keys_ND: Tensor, bias_N: Tensor | None, width: int, buffers: Buffers) -> _Codes:
    num_entries, head_dim = keys_ND.shape
    code_dim = head_dim if bias_N is None else head_dim + _BIAS_COLUMNS
    codes_NC = buffers.take("codes", (width, code_dim), torch.bfloat16)
    codes_ND = codes_NC[:, :head_dim]
    # any vector near the keys serves; a sample of 512 costs nothing
    center_D = keys_ND[:: max(1, num_entries // 512)].float().mean(0)
    max_norm = max_error = torch.zeros(())
    # 2 MiB of float32 at 64 dimensions; smaller blocks were slower
    block = 8192
    for start in range(0, num_entries, block):
        stop = min(start + block, num_entries)
        # mixed types in one operation would make a temporary copy each time
        shifted = buffers.take("shifted", (stop - start, head_dim), torch.float32)
        shifted.copy_(keys_ND[start:stop]).sub_(center_D)
        codes_ND[start:stop] = shifted
        rounded = buffers.take("rounded", (stop - start, head_dim), torch.float32)
        rounded.copy_(codes_ND[start:stop])
        max_norm = torch.maximum(max_norm, _norms(shifted).amax())
        max_error = torch.maximum(max_error, _norms(shifted.sub_(rounded)).amax())
    bias = None if bias_N is None else _encode_bias(bias_N, codes_NC[:num_entries, head_dim:])
    codes_NC[num_entries:] = 0
    return _Codes(codes_NC, center_D, max_norm, max_error, bias)


def _prepare(queries_QD: Tensor, keys: _Codes) -> _Queries:
    codes_QD = queries_QD.to(torch.bfloat16)
    norm_Q, rounded_Q = _norms(queries_QD), _norms(codes_QD.float())
    error_Q = _norms(queries_QD - codes_QD)
    # Cauchy-Schwarz on q.c - q'.c' = (q - q').c + q'.(c - c')
    bound_Q = error_Q * keys.max_norm + rounded_Q * keys.max_error
    # float32 sums of head_dim products, in the scan, in the shift and in the second scoring: each
    # wrong by at most head_dim * 2**-24 times the product of the norms
    length = keys.max_norm + _norms(keys.center.unsqueeze(0))
    size_Q, shift_Q = torch.maximum(norm_Q, rounded_Q) * length, queries_QD @ keys.center
    if keys.bias is not None:
        ones = codes_QD.new_ones(codes_QD.shape[0], _BIAS_COLUMNS)
        codes_QD = torch.cat([codes_QD, ones], dim=1)
        bound_Q += keys.bias.max_error
        size_Q += keys.bias.max_size + keys.bias.center.abs()
        shift_Q += keys.bias.center
    bound_Q += size_Q * (codes_QD.shape[1] + 8) * 2.0**-22
    return _Queries(queries_QD, codes_QD, shift_Q, bound_Q)


def _scan(queries: _Queries, codes_ND: Tensor, plan: ScanPlan, buffers: Buffers) -> list[Tensor]:
    """Return the scan scores as integer bits, then their group maxima, level by level."""
    num_queries, width = queries.codes.shape[0], plan.width
    scores_QN = buffers.take("scan", (num_queries, width), torch.bfloat16)
    levels = [scores_QN.view(torch.int16)]
    for level in range(1, plan.levels + 1):
        width //= GROUP
        levels.append(buffers.take(f"level{level}", (num_queries, width), torch.int16))
    torch.mm(queries.codes, codes_ND.t(), out=scores_QN)
    for fine, coarse in itertools.pairwise(levels):
        torch.amax(fine.view(num_queries, GROUP, -1), dim=1, out=coarse)
    return levels


def _cut(
    coarsest_QG: Tensor, plan: ScanPlan, top_k: int, queries: _Queries
) -> tuple[Tensor, Tensor]:
    """Return the scan score below which entries are discarded, and its integer bits."""
    maxima_QB = coarsest_QG.view(-1, plan.repeats, plan.buckets).amax(1)
    maxima_QB.numpy().partition(plan.buckets - top_k, axis=1)
    bar_Q = maxima_QB[:, plan.buckets - top_k].contiguous().view(torch.bfloat16).float()
    cut_Q = (bar_Q - _CUT_ERRORS * queries.error).to(torch.bfloat16)
    return cut_Q.float(), cut_Q.view(torch.int16)


def _hits(coarsest_QG: Tensor, bits_Q: Tensor) -> tuple[Tensor, Tensor]:
    """List the maxima that reach the cut; overwrites the maxima.

    Returns:
        Their queries, ascending, and columns.
    """
    width = coarsest_QG.shape[1]
    # both terms are non-negative, so the difference cannot overflow: negative means reached
    below_QG = coarsest_QG.clamp_min_(0)
    torch.sub((bits_Q - 1).unsqueeze(1), below_QG, out=below_QG)
    # listing a quarter as many words, most of them empty, is the cheapest way to list the hits
    words_QW = below_QG.view(torch.int64).bitwise_and_(_SIGN_BITS)
    word_ids = words_QW.view(-1).nonzero().squeeze(1)
    lane_ids = words_QW.view(-1).index_select(0, word_ids).view(torch.int16).nonzero().squeeze(1)
    flat = (
        word_ids.index_select(0, lane_ids >> (_LANES.bit_length() - 1))
        .mul_(_LANES)
        .add_(lane_ids & (_LANES - 1))
    )
    query_ids = flat // width
    return query_ids, flat - query_ids * width


def _descend(
    fine_QN: Tensor, hits: tuple[Tensor, Tensor], groups: int, bits_Q: Tensor, buffers: Buffers
) -> tuple[Tensor, Tensor]:
    """Replace hit groups by those of their members that reach the cut.

    Returns:
        Queries, ascending, and columns one level down.
    """
    query_ids, columns = hits
    bits = fine_QN.view(fine_QN.shape[0], GROUP, groups)[query_ids, :, columns]
    reached = buffers.take("reached", tuple(bits.shape), torch.bool)
    torch.ge(bits, bits_Q.index_select(0, query_ids).unsqueeze(1), out=reached)
    members = reached.view(-1).nonzero().squeeze(1)
    parents = members >> (GROUP.bit_length() - 1)
    columns = columns.index_select(0, parents).add_((members & (GROUP - 1)).mul_(groups))
    return query_ids.index_select(0, parents), columns


def _score_survivors(
    queries_QD: Tensor, keys_ND: Tensor, table_QC: Tensor, buffers: Buffers
) -> Tensor:
    num_queries, width = table_QC.shape
    head_dim = keys_ND.shape[1]
    rows = buffers.take("rows", (num_queries * width, head_dim), keys_ND.dtype)
    torch.index_select(keys_ND, 0, table_QC.view(-1), out=rows)
    if rows.dtype is not torch.float32:
        wide = buffers.take("rows", (num_queries * width, head_dim), torch.float32)
        rows = wide.copy_(rows)
    products_QCD = rows.view(num_queries, width, head_dim).mul_(queries_QD.unsqueeze(1))
    scores_QC = buffers.take("scores", (num_queries, width), torch.float32)
    return torch.sum(products_QCD, dim=2, out=scores_QC)


def _search_block(
    queries: _Queries, keys_ND: Tensor, codes: _Codes, plan: ScanPlan, top_k: int, buffers: Buffers
) -> tuple[Tensor, Tensor, Tensor]:
    num_queries = queries.values.shape[0]
    levels = _scan(queries, codes.codes, plan, buffers)
    cut_Q, bits_Q = _cut(levels[-1], plan, top_k, queries)
    # zero padding and negative scores never reach a positive cut
    positive_Q = bits_Q > 0
    bits_Q = bits_Q.clamp_min(1)
    limit = _MAX_SURVIVORS * top_k
    hits = _hits(levels[-1], bits_Q)
    for fine, coarse in zip(levels[-2::-1], levels[:0:-1], strict=True):
        if hits[0].numel() > limit * num_queries // 2:
            hits = drop_crowded(*hits, num_queries, limit)[:2]
        hits = _descend(fine, hits, coarse.shape[1], bits_Q, buffers)
    query_ids, slots, counts_Q = drop_crowded(*hits, num_queries, limit)

    width = max(int(counts_Q.max()), top_k)
    table_QC = buffers.take("table", (num_queries, width), torch.int64).zero_()
    # hits come in the order of their queries: the rank of a hit is its distance from the first
    shift_Q = torch.arange(0, num_queries * width, width) - (counts_Q.cumsum(0) - counts_Q)
    places = shift_Q.index_select(0, query_ids).add_(torch.arange(query_ids.numel()))
    table_QC.view(-1).scatter_(0, places, slots)
    scores_QC = _score_survivors(queries.values, keys_ND, table_QC, buffers)
    if codes.bias is not None:
        scores_QC += codes.bias.values[table_QC]
    scores_QC.masked_fill_(torch.arange(width) >= counts_Q.unsqueeze(1), EXCLUDED)
    scores_QK, slots_QK = unpack(sort_packed(scores_QC, table_QC, top_k, buffers, in_order=True))
    # a query with fewer survivors than top_k has EXCLUDED as its last score and fails, too
    reaches_Q = scores_QK[:, -1] - queries.shift >= cut_Q + queries.error
    return scores_QK, slots_QK, positive_Q & reaches_Q


def scan_top_k(
    queries_QD: Float[Tensor, "query head_dim"],
    keys_ND: Float[Tensor, "entry head_dim"],
    top_k: int,
    max_bytes: int,
    buffers: Buffers,
    bias_N: Float[Tensor, " entry"] | None = None,
) -> tuple[Float[Tensor, "query top_k"], Int[Tensor, "query top_k"], Bool[Tensor, " query"]]:
    """Find the keys with the largest inner products and say for which queries that is proven.

    Args:
        queries_QD: Queries in float32 on the CPU.
        keys_ND: Keys of one head, at least `GROUP * num_buckets(top_k)` of them.
        top_k: Neighbours per query.
        max_bytes: Size of the buffer of scan scores; decides how many queries share one.
        buffers: Reused memory.
        bias_N: Added to the scores of each entry.

    Returns:
        Float32 scores, descending, slots, and the queries for which both are exact. The content of
        the other rows is unspecified.
    """
    num_queries = queries_QD.shape[0]
    plan = plan_scan(keys_ND.shape[0], top_k, _LANES)
    codes = _encode(keys_ND, bias_N, plan.width, buffers)
    queries = _prepare(queries_QD, codes)
    scores_QK = torch.empty(num_queries, top_k)
    slots_QK = torch.empty(num_queries, top_k, dtype=torch.int64)
    proven_Q = torch.empty(num_queries, dtype=torch.bool)
    # the scan scores of a block and the keys of its survivors both stay within the bytes
    bytes_per_query = max(2 * plan.width, 8 * top_k * queries_QD.shape[1])
    block = max(1, max_bytes // bytes_per_query)
    for start in range(0, num_queries, block):
        part = slice(start, start + block)
        scores_QK[part], slots_QK[part], proven_Q[part] = _search_block(
            _Queries(*(x[part] for x in queries)), keys_ND, codes, plan, top_k, buffers
        )
    return scores_QK, slots_QK, proven_Q
