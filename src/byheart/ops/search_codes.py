"""Exact top-k for a few queries on the CPU: 8-bit codes of the keys, bounds, float32 scores.

A search for one query reads every key once, so its time is the time to read them. Codes
(`byheart.ops.key_codes`) have a quarter of the bytes of float32 keys, and an inner product of codes
is exact in int32. The query is rounded to a code as well, and by Cauchy and Schwarz the lengths
that each block of slots keeps bound how far the score of any entry can be from that of its code.

The `top_k`-th largest of the blocks' lower bounds is reached by at least `top_k` entries, so an
entry whose upper bound lies below it is not among the `top_k` largest. What is left, usually a few
times `top_k` entries, is scored in float32. Nothing is assumed about keys or queries: where bounds
discard too little, a float32 product searches, mostly before all codes are read. Where a bias falls
with the age of entries, the newest are scored first, and old blocks that it has put below the cut
are not read at all.
"""

import math
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from byheart.ops.key_codes import BLOCK, LARGEST_CODE, UNDERFLOW, KeyCodes, multiply_codes
from byheart.ops.search import Neighbours
from byheart.ops.search_select import (
    EXCLUDED,
    Buffers,
    buffers_on,
    default_max_bytes,
    largest,
    product_top_k,
)

# blocks whose products share one call, and are skipped together: the scores stay in the cache
# until they are reduced, and half as many take a tenth longer
_SLAB = 512

# slabs that are scanned before it is known which of the others can matter
_FIRST_SLABS = 2

# bytes of int32 scores held at a time; a buffer beyond what is kept between searches costs more
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


class _Problems(NamedTuple):
    """Queries against the keys of their own row and head, a range of all of them."""

    queries: Float[Tensor, "problem head_dim"]
    pair_ids: Int[Tensor, " problem"]
    """Row and key-value head as one number."""
    row_ids: Int[Tensor, " problem"]
    num_used: Int[Tensor, " problem"]


class _Bounds(NamedTuple):
    """What is known about the blocks of each problem before their codes are scored."""

    factors: Float[Tensor, "problem block"]
    """What one unit of the integer scores is worth."""
    low: Float[Tensor, "problem block"]
    """Added to the worth of the largest integer score: what at least one entry reaches."""
    high: Float[Tensor, "problem block"]
    """Added to the worth of an integer score: what no entry that has it exceeds."""
    most: Float[Tensor, "problem block"]
    """What no entry of the block exceeds; minus infinity for a block that is not in use."""


class _Scan:
    """Integer scores of the slabs that were wanted so far."""

    def __init__(self, codes: KeyCodes, problems: _Problems, buffers: Buffers) -> None:
        num_problems, num_blocks = len(problems.queries), codes.scales.shape[2]
        self.scores_PBS = buffers.take(
            "codes.scores", (num_problems, num_blocks, BLOCK), torch.int32
        )
        self.best_PB = torch.zeros(num_problems, num_blocks, dtype=torch.int32)
        self.done_PB = torch.zeros(num_problems, num_blocks, dtype=torch.bool)
        scales_P1 = problems.queries.abs().amax(1, keepdim=True) / LARGEST_CODE
        self.scales_P1 = scales_P1.clamp_(min=UNDERFLOW)
        self.rounded_PD = (problems.queries / self.scales_P1).round_()
        self._codes_P1D = self.rounded_PD.to(torch.int8).unsqueeze(1)
        self._keys_RND = codes.codes.flatten(0, 1).flatten(1, 2)
        self._pairs, self._used = problems.pair_ids.tolist(), problems.num_used.tolist()

    def run(self, wanted_PS: Bool[Tensor, "problem slab"]) -> None:
        """Score the codes in slabs that have not been scored yet."""
        for problem, slab in wanted_PS.nonzero().tolist():
            used = self._used[problem]
            blocks = slice(slab * _SLAB, min((slab + 1) * _SLAB, -(-used // BLOCK)))
            slots = slice(blocks.start * BLOCK, blocks.stop * BLOCK)
            keys_ND = self._keys_RND[self._pairs[problem], slots]
            scores_BS = self.scores_PBS[problem, blocks]
            multiply_codes(self._codes_P1D[problem], keys_ND, scores_BS.view(1, -1))
            if used < slots.stop:
                # what these slots held before must not stand for the block
                scores_BS.view(-1)[used - slots.stop :] = torch.iinfo(torch.int32).min
            torch.amax(scores_BS, dim=1, out=self.best_PB[problem, blocks])
            self.done_PB[problem, blocks] = True

    def cut(self, bounds: _Bounds, top_k: int) -> Float[Tensor, " problem"]:
        """Return a score that at least `top_k` scored entries reach."""
        if bounds.low.shape[1] < top_k:
            return torch.full((len(self.done_PB),), -math.inf)
        lower_PB = (self.best_PB * bounds.factors).add_(bounds.low)
        lower_PB.masked_fill_(~self.done_PB, -math.inf)
        return lower_PB.topk(top_k, dim=1, sorted=False).values.amin(1)


def _bounds(
    codes: KeyCodes, problems: _Problems, bias: tuple[Tensor, Tensor] | None, scan: _Scan
) -> _Bounds:
    queries_PD = problems.queries
    scales, lengths, norms, errors, centers = (
        side.flatten(0, 1)[problems.pair_ids] for side in codes[1:]
    )
    meant_PD = scan.rounded_PD * scan.scales_P1
    length_P1, rest_P1, meant_P1 = map(_lengths, (queries_PD, queries_PD - meant_PD, meant_PD))
    shift_P1 = (queries_PD * centers).sum(1, keepdim=True)
    # Cauchy and Schwarz on q.k - q'.k' = (q - q').k + q'.(k - k')
    errors_PB = (rest_P1 * norms).addcmul_(meant_P1, errors)
    # float32 sums, here and in the scores they are compared with: each wrong by at most head_dim *
    # 2**-24 times the product of the lengths
    size_P1 = length_P1 * (norms.amax(1, keepdim=True) + _lengths(centers))
    low_PB = high_PB = torch.zeros(())
    if bias is not None:
        low_PB, high_PB = (side[problems.row_ids] for side in bias)
        size_P1 = size_P1 + torch.maximum(low_PB.abs(), high_PB.abs()).amax(1, keepdim=True)
    slack_P1 = size_P1 * (queries_PD.shape[1] + 8) * 2.0**-22
    errors_PB += slack_P1
    most_PB = torch.minimum(shift_P1 + length_P1 * norms, length_P1 * lengths) + slack_P1 + high_PB
    most_PB = torch.where(torch.isfinite(errors_PB), most_PB, math.inf)
    unused_PB = torch.arange(most_PB.shape[1]) * BLOCK >= problems.num_used[:, None]
    return _Bounds(
        factors=scales * scan.scales_P1,
        low=shift_P1 - errors_PB + low_PB,
        high=shift_P1 + errors_PB + high_PB,
        most=most_PB.masked_fill_(unused_PB, -math.inf),
    )


def _lengths(vectors_PD: Tensor) -> Float[Tensor, "problem 1"]:
    lengths: Tensor = torch.linalg.vector_norm(vectors_PD, dim=1, keepdim=True)
    return lengths + math.sqrt(vectors_PD.shape[1]) * UNDERFLOW


def _reached(scan: _Scan, bounds: _Bounds, cut_P: Tensor) -> Bool[Tensor, "problem block"]:
    # written so that a bound that is not a number discards nothing
    reached_PB = ~((scan.best_PB * bounds.factors).add_(bounds.high) < cut_P[:, None])
    return reached_PB.logical_and_(scan.done_PB)


def _members(
    scan: _Scan, bounds: _Bounds, problems: _Problems, cut_P: Tensor, blocks_PB: Tensor
) -> tuple[Tensor, Tensor]:
    """List the entries of some blocks that may be among the `top_k` largest.

    Returns:
        Their problems, ascending, and slots.
    """
    num_blocks = blocks_PB.shape[1]
    hits = blocks_PB.view(-1).nonzero().squeeze(1)
    problem_H = hits // num_blocks
    values_HS = scan.scores_PBS.flatten(0, 1)[hits].float()
    values_HS.mul_(bounds.factors.view(-1)[hits][:, None])
    values_HS += bounds.high.view(-1)[hits][:, None]
    members = (~(values_HS < cut_P[problem_H][:, None])).view(-1).nonzero().squeeze(1)
    parents = members // BLOCK
    problem_ids = problem_H[parents]
    slots = (hits[parents] - problem_ids * num_blocks) * BLOCK + members % BLOCK
    present = slots < problems.num_used[problem_ids]
    return problem_ids[present], slots[present]


def _estimate(
    scan: _Scan, bounds: _Bounds, problems: _Problems, cut_P: Tensor
) -> Float[Tensor, " problem"]:
    """Take a sample of the scored blocks.

    Returns:
        About how many of the scored entries may be among the `top_k` largest.
    """
    reached_PB = _reached(scan, bounds, cut_P)
    ranks_PB = reached_PB.cumsum(1)
    counts_P = ranks_PB[:, -1]
    steps_P = (counts_P // _SAMPLED_BLOCKS).clamp_(min=1)
    sample_PB = reached_PB & (ranks_PB % steps_P[:, None] == 0)
    problem_ids = _members(scan, bounds, problems, cut_P, sample_PB)[0]
    found_P = torch.bincount(problem_ids, minlength=len(cut_P))
    return found_P * counts_P / sample_PB.sum(1).clamp_(min=1)


def _scan_what_matters(
    scan: _Scan, bounds: _Bounds, problems: _Problems, top_k: int, limit_P: Tensor
) -> tuple[Float[Tensor, " problem"], Bool[Tensor, " problem"]]:
    """Score slabs, those with the largest bounds first, until no other can matter.

    Returns:
        A score that the `top_k` largest of each problem reach; and the problems with more than
        `limit_P` entries left, as far as a sample says, not all of whose slabs are scored.
    """
    num_problems, num_blocks = bounds.most.shape
    num_slabs = -(-num_blocks // _SLAB)
    padded = bounds.most.new_full((num_problems, num_slabs * _SLAB), -math.inf)
    padded[:, :num_blocks] = bounds.most
    slabs_PS = padded.view(num_problems, num_slabs, _SLAB).amax(2)
    used_PS, first_PS = slabs_PS > -math.inf, torch.zeros_like(slabs_PS, dtype=torch.bool)
    first_PS.scatter_(1, slabs_PS.topk(min(_FIRST_SLABS, num_slabs), dim=1).indices, True)
    scan.run(first_PS & used_PS)
    cut_P = scan.cut(bounds, top_k)
    hopeless_P = torch.zeros(num_problems, dtype=torch.bool)
    if num_slabs > _FIRST_SLABS:
        wanted_PS = used_PS & ~first_PS & ~(slabs_PS < cut_P[:, None])
        scored_P = scan.done_PB.sum(1).clamp_(min=1)
        share_P = _estimate(scan, bounds, problems, cut_P) / (scored_P * BLOCK)
        unread_P = (wanted_PS.sum(1) * (_SLAB * BLOCK)).clamp(max=problems.num_used)
        hopeless_P = share_P * unread_P > _EARLY * limit_P
        scan.run(wanted_PS & ~hopeless_P[:, None])
        cut_P = scan.cut(bounds, top_k)
    return cut_P, hopeless_P | (_estimate(scan, bounds, problems, cut_P) > limit_P)


def _survivors(
    scan: _Scan, bounds: _Bounds, problems: _Problems, top_k: int
) -> tuple[Tensor, Tensor, Tensor]:
    """List the entries that may be among the `top_k` largest.

    Returns:
        Their problems, ascending, their slots, and the problems with too many, which are left out.
    """
    limit_P = (problems.num_used // _MAX_SHARE).clamp_(min=_MAX_SURVIVORS * top_k)
    cut_P, hopeless_P = _scan_what_matters(scan, bounds, problems, top_k, limit_P)
    blocks_PB = _reached(scan, bounds, cut_P) & ~hopeless_P[:, None]
    problem_ids, slots = _members(scan, bounds, problems, cut_P, blocks_PB)
    # what the sample did not show
    hopeless_P |= torch.bincount(problem_ids, minlength=len(hopeless_P)) > limit_P
    kept = ~hopeless_P[problem_ids]
    return problem_ids[kept], slots[kept], hopeless_P


def _search_problems(
    problems: _Problems,
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
    scan = _Scan(codes, problems, buffers)
    ranges = None if bias is None else bias.of_blocks(BLOCK)
    bounds = _bounds(codes, problems, ranges, scan)
    problem_ids, slots, hopeless_P = _survivors(scan, bounds, problems, top_k)
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
    problems: _Problems,
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
        keys: All slots of the memory, used or not, of at least two numbers each.
        codes: Codes of these keys, at least in the blocks that are in use.
        num_used: Slots that hold an entry, the first so many of each row.
        top_k: Number of neighbours, at most the number of slots.
        bias: Added to the scores of each entry before the largest are chosen.

    Returns:
        Scores, slots and validity.
    """
    batch, heads, num_queries, head_dim = queries.shape
    assert head_dim > 1
    shape = (batch, heads, num_queries, top_k)
    num_problems = batch * heads * num_queries
    pair_ids = torch.arange(num_problems) // (num_problems // (batch * keys.shape[1]))
    row_ids = pair_ids // keys.shape[1]
    # query heads that share a key-value head become more queries of it
    everything = _Problems(
        queries.float().reshape(-1, head_dim), pair_ids, row_ids, num_used[row_ids]
    )
    scores, slots = torch.empty(num_problems, top_k), torch.empty(num_problems, top_k).long()
    step = max(1, _SCORE_BYTES // (4 * BLOCK * codes.scales.shape[2]))
    with torch.autocast("cpu", enabled=False), buffers_on(queries.device) as buffers:
        hopeless = []
        for start in range(0, num_problems, step):
            part = slice(start, start + step)
            problems = _Problems(*(side[part] for side in everything))
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
