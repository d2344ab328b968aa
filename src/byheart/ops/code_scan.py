"""Scores of the codes of keys, slab by slab, and what they say of the true scores.

By Cauchy and Schwarz the lengths that each block of slots keeps bound how far the score of any
entry can be from that of its code.
"""

import math
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int, Num
from torch import Tensor

from byheart.ops.key_codes import (
    BLOCK,
    LARGEST_CODE,
    UNDERFLOW,
    CodeProduct,
    KeyCodes,
    multiply_codes,
)
from byheart.ops.search_select import Buffers

# blocks that are skipped together
SLAB = 512

# neighbouring slabs whose products share a call: the scores stay in the cache until they are
# reduced, and the work of a call does not show
_RUN = 4


class Problems(NamedTuple):
    """Queries against the keys of their own row and head, a range of all of them."""

    queries: Float[Tensor, "problem head_dim"]
    pair_ids: Int[Tensor, " problem"]
    """Row and key-value head as one number, ascending; as many queries for each."""
    row_ids: Int[Tensor, " problem"]
    num_used: Int[Tensor, " problem"]


class QueryCodes(NamedTuple):
    """Queries as the product of codes takes them."""

    codes: Num[Tensor, "problem width"]
    scales: Float[Tensor, "problem 1"]
    """What one unit of the codes is worth."""
    meant: Float[Tensor, "problem head_dim"]
    """What the codes stand for."""


class Bounds(NamedTuple):
    """What is known about the blocks of each problem before their codes are scored."""

    factors: Float[Tensor, "problem block"]
    """What one unit of the scores of codes is worth."""
    low: Float[Tensor, "problem block"]
    """Added to the worth of the largest of these scores: what at least one entry reaches."""
    high: Float[Tensor, "problem block"]
    """Added to the worth of such a score: what no entry that has it exceeds."""
    most: Float[Tensor, "problem slab"]
    """What no entry of the slab exceeds; minus infinity for a slab that is not in use."""


def round_queries(problems: Problems, product: CodeProduct, width: int) -> QueryCodes:
    """Encode queries.

    Args:
        problems: The queries.
        product: How they will be multiplied.
        width: Numbers per code, padding included.

    Returns:
        Codes of numbers up to `LARGEST_CODE`, whole ones if the product wants that.
    """
    scales_P1 = problems.queries.abs().amax(1, keepdim=True).div_(LARGEST_CODE)
    scales_P1.clamp_(min=UNDERFLOW)
    units_PD = problems.queries / scales_P1
    if product.query_dtype is torch.int8:
        units_PD.round_()
    codes_PD = units_PD.to(product.query_dtype)
    padded_PW = torch.nn.functional.pad(codes_PD, (0, width - codes_PD.shape[1]))
    return QueryCodes(padded_PW, scales_P1, codes_PD.float() * scales_P1)


def find_bounds(
    codes: KeyCodes,
    problems: Problems,
    rounded: QueryCodes,
    rounding: float,
    bias: tuple[Tensor, Tensor] | None,
) -> Bounds:
    """Bound the difference between true scores and those of codes.

    Args:
        codes: Codes of all keys.
        problems: The queries.
        rounded: Their codes.
        rounding: What the product of codes leaves out, in units of itself.
        bias: Bounds of the bias of each row and block, the lower and the upper.

    Returns:
        Bounds.
    """
    queries_PD = problems.queries
    scales, lengths, norms, errors, centers = (
        _of_problems(side.flatten(0, 1), problems.pair_ids) for side in codes[1:]
    )
    length_P1, rest_P1, meant_P1 = map(
        _lengths, (queries_PD, queries_PD - rounded.meant, rounded.meant)
    )
    shift_P1 = (queries_PD * centers).sum(1, keepdim=True)
    largest_PS, longest_PS, worst_PS = map(_of_slabs, (norms, lengths, errors))
    # float32 sums, here and in the scores they are compared with: each wrong by at most head_dim *
    # 2**-24 times the product of the lengths
    size_P1 = length_P1 * (largest_PS.amax(1, keepdim=True) + _lengths(centers))
    if bias is not None:
        low_PB, high_PB = (_of_problems(side, problems.row_ids) for side in bias)
        size_P1 = size_P1 + torch.maximum(low_PB.abs(), high_PB.abs()).amax(1, keepdim=True)
    slack_P1 = size_P1 * (queries_PD.shape[1] + 8) * 2.0**-22
    # Cauchy and Schwarz on q.k - q'.k' = (q - q').k + q'.(k - k'), and on the product of codes,
    # which are at most as long as key and error
    errors_PB = (norms * (rest_P1 + rounding * meant_P1)).addcmul_(
        errors, meant_P1 * (1 + rounding)
    )
    errors_PB += slack_P1
    low, high = shift_P1 - errors_PB, errors_PB.add_(shift_P1)
    most_PS = torch.minimum(shift_P1 + length_P1 * largest_PS, length_P1 * longest_PS) + slack_P1
    if bias is not None:
        low, high, most_PS = low.add_(low_PB), high.add_(high_PB), most_PS + _of_slabs(high_PB)
    most_PS = torch.where(torch.isfinite(worst_PS), most_PS, math.inf)
    unused_PS = torch.arange(most_PS.shape[1]) * (SLAB * BLOCK) >= problems.num_used[:, None]
    most_PS = most_PS.masked_fill_(unused_PS, -math.inf)
    return Bounds(scales * rounded.scales, low, high, most_PS)


def _of_problems(side: Tensor, ids_P: Tensor) -> Tensor:
    """Return a view where there is one query for each: a copy would be read once more."""
    first, last = int(ids_P[0]), int(ids_P[-1])
    return side[first : last + 1] if last - first + 1 == len(ids_P) else side.index_select(0, ids_P)


def _of_slabs(side_PB: Tensor) -> Float[Tensor, "problem slab"]:
    missing = -side_PB.shape[1] % SLAB
    if missing > 0:
        side_PB = torch.nn.functional.pad(side_PB, (0, missing), value=-math.inf)
    return side_PB.view(len(side_PB), -1, SLAB).amax(2)


def _lengths(vectors_PD: Tensor) -> Float[Tensor, "problem 1"]:
    lengths: Tensor = torch.linalg.vector_norm(vectors_PD, dim=1, keepdim=True)
    return lengths + math.sqrt(vectors_PD.shape[1]) * UNDERFLOW


class CodeScan:
    """Scores of codes in the slabs that were wanted so far."""

    def __init__(
        self,
        codes: KeyCodes,
        problems: Problems,
        product: CodeProduct,
        bias: tuple[Tensor, Tensor] | None,
        buffers: Buffers,
    ) -> None:
        """Score nothing yet.

        Args:
            codes: Codes of all keys.
            problems: The queries.
            product: How codes are multiplied.
            bias: Bounds of the bias of each row and block, the lower and the upper.
            buffers: Reused memory.
        """
        num_problems, num_blocks = len(problems.queries), codes.scales.shape[2]
        rounded = round_queries(problems, product, codes.codes.shape[4])
        self.bounds = find_bounds(codes, problems, rounded, product.rounding, bias)
        self._scores_PBS = buffers.take(
            "codes.scores", (num_problems, num_blocks, BLOCK), product.score_dtype
        )
        # of the largest score of a block; nothing is known of those that were not scored
        self._worth_PB = torch.full((num_problems, num_blocks), -math.inf)
        self._scored_P = torch.zeros(num_problems, dtype=torch.int64)
        self._codes_PW, self._most_queries = rounded.codes, product.most_queries
        self._keys_RNW = codes.codes.flatten(0, 1).flatten(1, 2)
        self._pairs, self._used_P = problems.pair_ids.tolist(), problems.num_used
        limits = torch.finfo if product.score_dtype.is_floating_point else torch.iinfo
        self._least = limits(product.score_dtype).min

    def num_entries(self, slabs_PS: Bool[Tensor, "problem slab"]) -> Int[Tensor, " problem"]:
        """Count the entries in slabs, at most.

        Args:
            slabs_PS: The slabs.

        Returns:
            Entries of each problem.
        """
        return (slabs_PS.sum(1) * (SLAB * BLOCK)).clamp_(max=self._used_P)

    @property
    def num_scored(self) -> Int[Tensor, " problem"]:
        """Blocks of each problem that were scored."""
        return self._scored_P

    def run(self, wanted_PS: Bool[Tensor, "problem slab"]) -> None:
        """Score the codes in slabs that have not been scored yet.

        Args:
            wanted_PS: Which; they are in use.
        """
        runs: list[list[int]] = []
        for problem, slab in wanted_PS.nonzero().tolist():
            if runs and runs[-1][::2] == [problem, slab] and slab - runs[-1][1] < _RUN:
                runs[-1][2] = slab + 1
            else:
                runs.append([problem, slab, slab + 1])
        alike: dict[tuple[int, int, int], list[int]] = {}
        for problem, first, last in runs:
            alike.setdefault((self._pairs[problem], first, last), []).append(problem)
        for (pair, first, last), problems in alike.items():
            while problems:
                # side by side, so that their scores are one tensor
                count = sum(
                    problem == problems[0] + index
                    for index, problem in enumerate(problems[: self._most_queries])
                )
                self._score(slice(problems[0], problems[0] + count), pair, slice(first, last))
                del problems[:count]

    def _score(self, problems: slice, pair: int, slabs: slice) -> None:
        used = int(self._used_P[problems.start])
        blocks = slice(slabs.start * SLAB, min(slabs.stop * SLAB, -(-used // BLOCK)))
        slots = slice(blocks.start * BLOCK, blocks.stop * BLOCK)
        place = (problems, blocks)
        scores_QBS = self._scores_PBS[place]
        # a view, never a copy: what is written to it must stay
        scores_QN = scores_QBS.view(len(scores_QBS), -1)
        multiply_codes(self._codes_PW[problems], self._keys_RNW[pair, slots], scores_QN)
        if used < slots.stop:
            # what these slots held before must not stand for the block
            scores_QN[:, used - slots.stop :] = self._least
        torch.mul(scores_QBS.amax(2), self.bounds.factors[place], out=self._worth_PB[place])
        self._scored_P[problems] += scores_QBS.shape[1]

    def cut(self, top_k: int) -> Float[Tensor, " problem"]:
        """Return a score that at least `top_k` scored entries reach.

        Args:
            top_k: How many.

        Returns:
            Minus infinity where no such score is known.
        """
        if self._worth_PB.shape[1] < top_k:
            return torch.full((len(self._worth_PB),), -math.inf)
        lower_PB = self._worth_PB + self.bounds.low
        return lower_PB.topk(top_k, dim=1, sorted=False).values.amin(1)

    def reached(self, cut_P: Float[Tensor, " problem"]) -> Int[Tensor, " hit"]:
        """List the blocks that may hold an entry which reaches a score.

        Of those that were not scored, these are blocks with an infinite bound, if any.

        Args:
            cut_P: The score.

        Returns:
            Problem and block as one number, ascending.
        """
        # written so that a bound that is not a number discards nothing
        below_PB = (self._worth_PB + self.bounds.high) < cut_P[:, None]
        return below_PB.logical_not_().view(-1).nonzero().squeeze(1)

    def members(
        self, hits: Int[Tensor, " hit"], cut_P: Float[Tensor, " problem"]
    ) -> tuple[Int[Tensor, " entry"], Int[Tensor, " entry"]]:
        """List the entries of some blocks that may reach a score.

        Args:
            hits: The blocks, as `reached` lists them.
            cut_P: The score.

        Returns:
            Their problems, ascending, and slots.
        """
        num_blocks = self._worth_PB.shape[1]
        problem_H = hits // num_blocks
        values_HS = self._scores_PBS.flatten(0, 1).index_select(0, hits).float()
        values_HS.mul_(self.bounds.factors.view(-1).index_select(0, hits)[:, None])
        values_HS += self.bounds.high.view(-1).index_select(0, hits)[:, None]
        below_HS = values_HS < cut_P.index_select(0, problem_H)[:, None]
        members = below_HS.logical_not_().view(-1).nonzero().squeeze(1)
        parents = members // BLOCK
        problem_ids = problem_H.index_select(0, parents)
        blocks = hits.index_select(0, parents) - problem_ids * num_blocks
        slots = blocks * BLOCK + members % BLOCK
        present = slots < self._used_P.index_select(0, problem_ids)
        return problem_ids[present], slots[present]
