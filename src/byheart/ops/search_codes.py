"""Exact top-k for a few queries on the CPU: 8-bit codes of the keys, bounds, float32 scores.

A search for one query reads every key once, so its time is the time to read them. Codes
(`byheart.ops.key_codes`) have a quarter of the bytes of float32 keys, and bounds say how far the
score of any entry can be from that of its code (`byheart.ops.code_scan`).

The `top_k`-th largest of the blocks' lower bounds is reached by at least `top_k` entries, so an
entry whose upper bound lies below it is not among the `top_k` largest. What is left, usually a few
times `top_k` entries, is scored in float32. Nothing is assumed about keys or queries: where bounds
discard too little, a float32 product searches, mostly before all codes are read. Where a bias falls
with the age of entries, the newest are scored first, and old blocks that it has put below the cut
are not read at all.
"""

from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from byheart.ops.code_scan import CodeScan, Problems
from byheart.ops.key_codes import BLOCK, KeyCodes, code_product
from byheart.ops.search import Neighbours
from byheart.ops.search_select import (
    EXCLUDED,
    Buffers,
    buffers_on,
    default_max_bytes,
    largest,
    product_top_k,
)

# slabs that are scanned before it is known which of the others can matter
_FIRST_SLABS = 2

# bytes of scores held at a time; a buffer beyond what is kept between searches costs more
# than its use
_SCORE_BYTES = 32 << 20

# one in so many entries, but at least so many times top_k, may be left to be scored in float32:
# picked one by one they take some ten times as long as in a product
_MAX_SHARE, _MAX_SURVIVORS = 64, 8

# after the first slabs the cut is still low, and so many times as many may be left
_EARLY = 4

# blocks of a problem from which it is estimated how many entries are left
_SAMPLED_BLOCKS = 16


@runtime_checkable
class EntryBias(Protocol):
    """A bias of the entries that is worked out where it is needed."""

    def at(
        self, row_ids: Int[Tensor, "*#shape"], slots: Int[Tensor, "*#shape"]
    ) -> Float[Tensor, "*shape"]:
        """Return the bias of the entries in slots of rows."""

    def of_blocks(
        self, block_size: int
    ) -> tuple[Float[Tensor, "batch block"], Float[Tensor, "batch block"]]:
        """Return bounds of the bias in each block of slots: no entry has less, none more."""

    def dense(self) -> Float[Tensor, "batch entry"]:
        """Return the bias of every slot."""


def _estimate(
    scan: CodeScan, hits: Int[Tensor, " hit"], cut_P: Float[Tensor, " problem"]
) -> Float[Tensor, " problem"]:
    """Take a sample of the blocks that may hold one of the `top_k` largest.

    Returns:
        About how many of their entries may be.
    """
    num_problems, num_blocks = scan.bounds.low.shape
    problem_H = hits // num_blocks
    counts_P = torch.bincount(problem_H, minlength=num_problems)
    ranks_H = torch.arange(len(hits)) - (counts_P.cumsum(0) - counts_P)[problem_H]
    steps_P = (counts_P // _SAMPLED_BLOCKS).clamp_(min=1)
    sampled_H = ranks_H % steps_P[problem_H] == 0
    problem_ids = scan.members(hits[sampled_H], cut_P)[0]
    found_P = torch.bincount(problem_ids, minlength=num_problems)
    sampled_P = torch.bincount(problem_H[sampled_H], minlength=num_problems)
    return found_P * counts_P / sampled_P.clamp_(min=1)


def _scan_what_matters(
    scan: CodeScan, top_k: int, limit_P: Tensor
) -> tuple[Float[Tensor, " problem"], Int[Tensor, " hit"], Bool[Tensor, " problem"]]:
    """Score slabs, those with the largest bounds first, until no other can matter.

    Returns:
        A score that the `top_k` largest of each problem reach; the blocks that may hold one of
        them; and the problems with more than `limit_P` entries left, as far as a sample says, not
        all of whose slabs are scored.
    """
    most_PS = scan.bounds.most
    num_problems, num_slabs = most_PS.shape
    used_PS, first_PS = most_PS > -torch.inf, torch.zeros_like(most_PS, dtype=torch.bool)
    first_PS.scatter_(1, most_PS.topk(min(_FIRST_SLABS, num_slabs), dim=1).indices, True)
    scan.run(first_PS & used_PS)
    cut_P, hopeless_P = scan.cut(top_k), torch.zeros(num_problems, dtype=torch.bool)
    hits = scan.reached(cut_P)
    left_P = _estimate(scan, hits, cut_P)
    if num_slabs > _FIRST_SLABS:
        wanted_PS = used_PS & ~first_PS & ~(most_PS < cut_P[:, None])
        share_P = left_P / (scan.num_scored.clamp(min=1) * BLOCK)
        hopeless_P = share_P * scan.num_entries(wanted_PS) > _EARLY * limit_P
        scan.run(wanted_PS & ~hopeless_P[:, None])
        cut_P = scan.cut(top_k)
        hits = scan.reached(cut_P)
        left_P = _estimate(scan, hits, cut_P)
    return cut_P, hits, hopeless_P | (left_P > limit_P)


def _survivors(
    scan: CodeScan, num_used: Int[Tensor, " problem"], top_k: int
) -> tuple[Tensor, Tensor, Tensor]:
    """List the entries that may be among the `top_k` largest.

    Returns:
        Their problems, ascending, their slots, and the problems with too many, which are left out.
    """
    limit_P = (num_used // _MAX_SHARE).clamp_(min=_MAX_SURVIVORS * top_k)
    cut_P, hits, hopeless_P = _scan_what_matters(scan, top_k, limit_P)
    hopeful_H = ~hopeless_P[hits // scan.bounds.low.shape[1]]
    problem_ids, slots = scan.members(hits[hopeful_H], cut_P)
    # what the sample did not show
    hopeless_P |= torch.bincount(problem_ids, minlength=len(hopeless_P)) > limit_P
    kept = ~hopeless_P[problem_ids]
    return problem_ids[kept], slots[kept], hopeless_P


def _search_problems(
    problems: Problems,
    keys_BGND: Tensor,
    codes: KeyCodes,
    top_k: int,
    bias: EntryBias | None,
    buffers: Buffers,
) -> tuple[Tensor, Tensor, Tensor]:
    """Search a range of the problems.

    Returns:
        Scores, slots, and the problems that are left to a float32 product.
    """
    num_problems, num_slots = len(problems.queries), keys_BGND.shape[2]
    product = code_product()
    assert product is not None
    ranges = None if bias is None else bias.of_blocks(BLOCK)
    scan = CodeScan(codes, problems, product, ranges, buffers)
    problem_ids, slots, hopeless_P = _survivors(scan, problems.num_used, top_k)
    counts_P = torch.bincount(problem_ids, minlength=num_problems)
    width = max(int(counts_P.max()), top_k)
    rows = problems.pair_ids[problem_ids] * num_slots + slots
    keys_SD = keys_BGND.reshape(-1, keys_BGND.shape[3]).index_select(0, rows).float()
    scores_S = (keys_SD * problems.queries[problem_ids]).sum(1)
    if bias is not None:
        scores_S += bias.at(problems.row_ids[problem_ids], slots)
    # survivors come in the order of their problems: the rank of one is its distance from the first
    places = torch.arange(len(slots)) - (counts_P.cumsum(0) - counts_P)[problem_ids]
    table_PC = torch.full((num_problems, width), EXCLUDED)
    table_PC[problem_ids, places] = scores_S
    slots_PC = torch.zeros(num_problems, width, dtype=torch.int64)
    slots_PC[problem_ids, places] = slots
    best_PK, columns_PK = largest(table_PC, top_k, buffers)
    return best_PK, slots_PC.gather(1, columns_PK), hopeless_P


def _search_by_product(
    problems: Problems,
    rest: Int[Tensor, " rest"],
    keys_BGND: Tensor,
    found: tuple[Tensor, Tensor],
    bias: EntryBias | None,
    buffers: Buffers,
) -> None:
    """Search the problems whose bounds do not discard enough; those of a head share its product.

    Args:
        problems: All problems.
        rest: Those to search, with more than `top_k` entries each.
        keys_BGND: All slots of the memory.
        found: Scores and slots of all problems; those of `rest` are overwritten.
        bias: Added to the scores of each entry.
        buffers: Reused memory.
    """
    kv_heads, top_k = keys_BGND.shape[1], found[0].shape[1]
    pairs_R, dense_BN = problems.pair_ids[rest], None if bias is None else bias.dense()
    per_row = len(problems.queries) // len(keys_BGND)
    for row, num_rest in enumerate((pairs_R // kv_heads).bincount().tolist()):
        # products of several heads at once are faster than one after the other
        step, used = kv_heads if num_rest == per_row else 1, int(problems.num_used[row * per_row])
        for group in range(0, kv_heads, step):
            first = row * kv_heads + group
            mine = rest[(pairs_R >= first) & (pairs_R < first + step)]
            if len(mine) > 0:
                scores, slots = product_top_k(
                    problems.queries[mine].view(step, -1, keys_BGND.shape[3]),
                    keys_BGND[row, group : group + step, :used],
                    None,
                    top_k,
                    default_max_bytes(keys_BGND.device),
                    buffers,
                    None if dense_BN is None else dense_BN[row, :used].expand(step, -1),
                )
                found[0][mine], found[1][mine] = scores.flatten(0, 1), slots.flatten(0, 1)


@torch.no_grad()
def codes_top_k(
    queries: Float[Tensor, "batch heads query head_dim"],
    keys: Float[Tensor, "batch kv_heads entry head_dim"],
    codes: KeyCodes,
    num_used: Int[Tensor, " batch"],
    top_k: int,
    bias: EntryBias | None = None,
) -> Neighbours:
    """Find the `top_k` keys with the largest inner product with each query, exactly.

    The result is that of `byheart.ops.search.top_k_inner_product`; meant for one or few queries,
    because every query reads all codes of its head. On the CPU only.

    Args:
        queries: Finite queries.
        keys: All slots of the memory, used or not.
        codes: Codes of these keys, at least in the blocks that are in use.
        num_used: Slots that hold an entry, the first so many of each row.
        top_k: Number of neighbours, at most the number of slots.
        bias: Added to the scores of each entry before the largest are chosen.

    Returns:
        Scores, slots and validity.
    """
    batch, heads, num_queries, head_dim = queries.shape
    shape = (batch, heads, num_queries, top_k)
    num_problems = batch * heads * num_queries
    if num_problems == 0:
        nothing = torch.empty(shape)
        return Neighbours(nothing, nothing.long(), nothing.bool())
    pair_ids = torch.arange(num_problems) // (num_problems // (batch * keys.shape[1]))
    row_ids = pair_ids // keys.shape[1]
    # query heads that share a key-value head become more queries of it
    everything = Problems(
        queries.float().reshape(-1, head_dim), pair_ids, row_ids, num_used[row_ids]
    )
    scores, slots = torch.empty(num_problems, top_k), torch.empty(num_problems, top_k).long()
    step = max(1, _SCORE_BYTES // (4 * BLOCK * codes.scales.shape[2]))
    with torch.autocast("cpu", enabled=False), buffers_on(queries.device) as buffers:
        hopeless = []
        for start in range(0, num_problems, step):
            part = slice(start, start + step)
            problems = Problems(*(side[part] for side in everything))
            scores[part], slots[part], hopeless_P = _search_problems(
                problems, keys, codes, top_k, bias, buffers
            )
            hopeless.append(hopeless_P)
        rest = torch.cat(hopeless).nonzero().squeeze(1)
        if len(rest):
            _search_by_product(everything, rest, keys, (scores, slots), bias, buffers)
    is_valid = scores > EXCLUDED
    slots.masked_fill_(~is_valid, 0)
    return Neighbours(scores.view(shape), slots.view(shape), is_valid.view(shape))
