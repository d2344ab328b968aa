"""Kernels of the exact search on a GPU. Imports Triton, so `byheart.ops.search_triton` imports it.

Entries are cut into tiles, and a tile into groups of every `PER_TILE`-th of its entries: group `j`
of tile `t` holds the entries `t * PER_TILE * GROUP + j + i * PER_TILE`. With at least 8 groups in a
tile, the members of a group lie in the registers of one thread, and their maximum costs no exchange
between threads.

A problem is a batch row and a key-value head; its queries are those of all heads that share it.
"""

from typing import no_type_check

import triton
import triton.language as tl
from triton.runtime.errors import OutOfResources

__all__ = [
    "OutOfResources",
    "coarse_maxima",
    "group_maxima",
    "order_chosen",
    "score_members",
    "select_largest",
    "widened",
]

# must be `byheart.ops.search_select.EXCLUDED`; kernels can only read constants of their own module
EXCLUDED = tl.constexpr(-3.4028234663852886e38)

# Triton's interpreter multiplies the bits of bfloat16 numbers as if they were integers
_IS_INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
@no_type_check
def _ordered_integers(scores):
    """Map float32 numbers to integers of the same order, so that NaN has a place, too.

    Done twice, it gives the bits of the numbers back.
    """
    bits = scores.to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
@no_type_check
def _ordered_words(scores):
    """Map float32 numbers to unsigned integers of the same order."""
    words = _ordered_integers(scores).to(tl.uint32, bitcast=True)
    return words ^ tl.full([], 0x80000000, tl.uint32)


@triton.jit
@no_type_check
def _slots(groups, members, PER_TILE: tl.constexpr, GROUP: tl.constexpr):
    tile_starts = (groups // PER_TILE) * (PER_TILE * GROUP)
    return tile_starts + groups % PER_TILE + members * PER_TILE


@triton.jit
@no_type_check
def widened(keys, KEY_DTYPE: tl.constexpr):
    """Undo the view of 8-bit numbers as integers, which alone can be loaded with a default."""
    if KEY_DTYPE.primitive_bitwidth == 8:
        return keys.to(KEY_DTYPE, bitcast=True).to(tl.float32)
    else:  # noqa: RET505 (the compiler reads code after a return)
        return keys


@triton.jit
@no_type_check
def _dot(parts_QD, keys_DN, sums_QN, PRECISION: tl.constexpr):
    if _IS_INTERPRETED:
        parts_QD = parts_QD.to(tl.float32)
        keys_DN = keys_DN.to(tl.float32)
    return tl.dot(parts_QD, keys_DN, sums_QN, input_precision=PRECISION)


@triton.jit
@no_type_check
def _parts(queries_QD, PART_DTYPE: tl.constexpr):
    """Write float32 queries as a sum of numbers that tensor cores multiply exactly."""
    high = queries_QD.to(PART_DTYPE)
    rest = queries_QD.to(tl.float32) - high.to(tl.float32)
    middle = rest.to(PART_DTYPE)
    return high, middle, (rest - middle.to(tl.float32)).to(PART_DTYPE)


@triton.jit
@no_type_check
def _products(high, middle, low, keys_DN, PARTS: tl.constexpr, PRECISION: tl.constexpr):
    """Multiply queries in `PARTS` parts, the smallest first."""
    sums_QN = tl.zeros([high.shape[0], keys_DN.shape[1]], tl.float32)
    if PARTS > 2:
        sums_QN = _dot(low, keys_DN, sums_QN, PRECISION)
    if PARTS > 1:
        sums_QN = _dot(middle, keys_DN, sums_QN, PRECISION)
    return _dot(high, keys_DN, sums_QN, PRECISION)


@triton.jit
@no_type_check
def _load_columns(
    ptrs, inside, HEAD_DIM: tl.constexpr, DIM_PAD: tl.constexpr, KEY_DTYPE: tl.constexpr
):
    dims = tl.arange(0, DIM_PAD)[:, None]
    mask = inside[None, :]
    # a mask over the width of a head would keep the compiler from copying whole lines
    if HEAD_DIM != DIM_PAD:
        mask &= dims < HEAD_DIM
    return widened(tl.load(ptrs + dims, mask=mask, other=0), KEY_DTYPE)


@triton.jit(do_not_specialize=["first_problem"])
@no_type_check
def group_maxima(
    queries_ptr,
    keys_ptr,
    valid_ptr,
    bias_ptr,
    is_full_ptr,
    maxima_ptr,
    first_problem,
    num_queries,
    num_entries,
    num_tiles,
    kv_heads,
    row_stride,
    head_stride,
    entry_stride,
    HEAD_DIM: tl.constexpr,
    DIM_PAD: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    GROUP: tl.constexpr,
    PER_TILE: tl.constexpr,
    TILES: tl.constexpr,
    PARTS: tl.constexpr,
    PRECISION: tl.constexpr,
    PART_DTYPE: tl.constexpr,
    KEY_DTYPE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
):
    """Score a block of queries against `TILES` tiles of entries and keep the group maxima."""
    split, first_tile = tl.program_id(1), tl.program_id(1) * TILES
    local_problem = tl.program_id(2).to(tl.int64)
    problem = first_problem + local_problem
    row = problem // kv_heads
    keys_ptr += row * row_stride + (problem % kv_heads) * head_stride
    valid_ptr += row * num_entries
    bias_ptr += row * num_entries
    queries = tl.program_id(0) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    is_query = (queries < num_queries)[:, None]
    dims = tl.arange(0, DIM_PAD)[None, :]
    places = (local_problem * num_queries + queries)[:, None]
    query_ptrs = queries_ptr + places * HEAD_DIM + dims
    queries_QD = tl.load(query_ptrs, mask=is_query & (dims < HEAD_DIM), other=0)
    high, middle, low = _parts(queries_QD, PART_DTYPE)
    TILE: tl.constexpr = PER_TILE * GROUP
    maxima_ptrs = maxima_ptr + places * (num_tiles * PER_TILE) + tl.arange(0, PER_TILE)[None, :]
    is_full = tl.load(is_full_ptr + row * tl.num_programs(1) + split) != 0
    for tile in range(first_tile, tl.minimum(first_tile + TILES, num_tiles)):
        entries = tile * TILE + tl.arange(0, TILE)
        inside = entries < num_entries
        key_ptrs = keys_ptr + entries.to(tl.int64)[None, :] * entry_stride
        keys_DN = _load_columns(key_ptrs, inside, HEAD_DIM, DIM_PAD, KEY_DTYPE).to(PART_DTYPE)
        scores_QN = _products(high, middle, low, keys_DN, PARTS, PRECISION)
        if HAS_BIAS:
            scores_QN += tl.load(bias_ptr + entries, mask=inside, other=0.0)[None, :]
        # masking costs about as much as the maxima, and a memory in use is mostly full
        if not is_full:
            valid = tl.load(valid_ptr + entries, mask=inside, other=0) != 0
            # a choice and no sum: what slots without an entry hold may be NaN
            scores_QN = tl.where(valid[None, :], scores_QN, EXCLUDED)
        scores_QGJ = tl.reshape(scores_QN, [BLOCK_Q, GROUP, PER_TILE])
        tl.store(maxima_ptrs + tile * PER_TILE, tl.max(scores_QGJ, axis=1), mask=is_query)


@triton.jit
@no_type_check
def coarse_maxima(values_ptr, maxima_ptr, num_maxima, COARSE: tl.constexpr, BLOCK: tl.constexpr):
    """Keep the largest of every `COARSE` values that follow each other, NaN in its place."""
    first = tl.program_id(0).to(tl.int64) * BLOCK
    at = first * COARSE + tl.arange(0, BLOCK * COARSE)
    values = tl.load(values_ptr + at, mask=at < num_maxima.to(tl.int64) * COARSE, other=0.0)
    # integers of the same order, for which a maximum knows no NaN
    words = _ordered_integers(values)
    largest = tl.max(tl.reshape(words, [BLOCK, COARSE]), axis=1)
    places = first + tl.arange(0, BLOCK)
    found = _ordered_integers(largest.to(tl.float32, bitcast=True)).to(tl.float32, bitcast=True)
    tl.store(maxima_ptr + places, found, mask=places < num_maxima)


@triton.jit
@no_type_check
def select_largest(
    values_ptr,
    within_ptr,
    columns_ptr,
    num_rows,
    width,
    value_width,
    TOP_K: tl.constexpr,
    WIDTH_PAD: tl.constexpr,
    ROWS: tl.constexpr,
    COARSE: tl.constexpr,
):
    """List the columns of the `TOP_K` largest values of each row, in the order they are read in.

    With `COARSE` above 1 only what lies within the groups of so many columns is read that each row
    names in `within_ptr`; `width` counts these columns, `value_width` all that a row has.

    A threshold that `TOP_K` values reach is found bit by bit, without a sort. A row is held by few
    warps, so that counting needs few exchanges, or none that all have to wait for.
    """
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    places = tl.arange(0, WIDTH_PAD)[None, :]
    inside = (rows < num_rows) & (places < width)
    columns = places + tl.zeros([ROWS, WIDTH_PAD], tl.int32)
    if COARSE > 1:
        groups_ptr = within_ptr + rows * (width // COARSE) + places // COARSE
        columns = tl.load(groups_ptr, mask=inside, other=0) * COARSE + places % COARSE
    values = tl.load(values_ptr + rows * value_width + columns, mask=inside, other=0.0)
    words = tl.where(inside, _ordered_words(values), tl.full([], 0, tl.uint32))
    threshold = tl.zeros([ROWS], tl.uint32)
    # how many reach the threshold; once it is `TOP_K` in all rows, more bits change nothing
    reached = tl.zeros([ROWS], tl.int32) + WIDTH_PAD
    bit = tl.full([], 0x80000000, tl.uint32)
    one = tl.full([], 1, tl.uint32)
    while (bit > 0) & (tl.max(reached, axis=0) > TOP_K):
        raised = threshold | bit
        count = tl.sum((words >= raised[:, None]).to(tl.int32), axis=1)
        threshold = tl.where(count >= TOP_K, raised, threshold)
        reached = tl.where(count >= TOP_K, count, reached)
        bit = bit >> one
    above = words > threshold[:, None]
    level = (words == threshold[:, None]) & inside
    num_missing = TOP_K - tl.sum(above.to(tl.int32), axis=1)
    is_chosen = above | (level & (tl.cumsum(level.to(tl.int32), axis=1) <= num_missing[:, None]))
    place = tl.cumsum(is_chosen.to(tl.int32), axis=1) - 1
    tl.store(columns_ptr + rows * TOP_K + place, columns, mask=is_chosen)


@triton.jit(do_not_specialize=["first_problem"])
@no_type_check
def score_members(
    queries_ptr,
    keys_ptr,
    valid_ptr,
    bias_ptr,
    groups_ptr,
    scores_ptr,
    first_problem,
    num_queries,
    num_entries,
    kv_heads,
    row_stride,
    head_stride,
    entry_stride,
    HEAD_DIM: tl.constexpr,
    GROUP: tl.constexpr,
    PER_TILE: tl.constexpr,
    NUM_GROUPS: tl.constexpr,
    MEMBERS_PAD: tl.constexpr,
    BLOCK_D: tl.constexpr,
    KEY_DTYPE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
):
    """Score the members of the chosen groups of one query in float32."""
    local_problem = tl.program_id(1).to(tl.int64)
    problem = first_problem + local_problem
    row = problem // kv_heads
    keys_ptr += row * row_stride + (problem % kv_heads) * head_stride
    place = local_problem * num_queries + tl.program_id(0)
    members = tl.arange(0, MEMBERS_PAD)
    is_member = members < NUM_GROUPS * GROUP
    groups = tl.load(groups_ptr + place * NUM_GROUPS + members // GROUP, mask=is_member, other=0)
    slots = _slots(groups, members % GROUP, PER_TILE, GROUP)
    present = is_member & (slots < num_entries)
    present &= tl.load(valid_ptr + row * num_entries + slots, mask=present, other=0) != 0
    key_ptrs = keys_ptr + slots.to(tl.int64)[:, None] * entry_stride
    scores = tl.zeros([MEMBERS_PAD], tl.float32)
    for start in range(0, HEAD_DIM, BLOCK_D):
        dims = start + tl.arange(0, BLOCK_D)
        query = tl.load(queries_ptr + place * HEAD_DIM + dims, mask=dims < HEAD_DIM, other=0)
        keys = tl.load(
            key_ptrs + dims[None, :], mask=present[:, None] & (dims < HEAD_DIM)[None, :], other=0
        )
        scores += tl.sum(
            widened(keys, KEY_DTYPE).to(tl.float32) * query.to(tl.float32)[None, :], axis=1
        )
    if HAS_BIAS:
        scores += tl.load(bias_ptr + row * num_entries + slots, mask=present, other=0.0)
    scores = tl.where(present, scores, EXCLUDED)
    tl.store(scores_ptr + place * (NUM_GROUPS * GROUP) + members, scores, mask=is_member)


@triton.jit
@no_type_check
def order_chosen(
    scores_ptr,
    groups_ptr,
    chosen_ptr,
    found_scores_ptr,
    found_slots_ptr,
    found_valid_ptr,
    TOP_K: tl.constexpr,
    TOP_K_PAD: tl.constexpr,
    GROUP: tl.constexpr,
    PER_TILE: tl.constexpr,
    NUM_GROUPS: tl.constexpr,
):
    """Write the chosen members of one query in the order of their scores, descending."""
    place = tl.program_id(0).to(tl.int64)
    ranks = tl.arange(0, TOP_K_PAD)
    inside = ranks < TOP_K
    members = tl.load(chosen_ptr + place * TOP_K + ranks, mask=inside, other=0)
    scores = tl.load(scores_ptr + place * (NUM_GROUPS * GROUP) + members, mask=inside, other=0.0)
    groups = tl.load(groups_ptr + place * NUM_GROUPS + members // GROUP, mask=inside, other=0)
    slots = _slots(groups, members % GROUP, PER_TILE, GROUP)
    words = _ordered_words(scores)
    # the rank of a score is how many come before it; comparing all pairs needs no sort
    is_before = words[None, :] > words[:, None]
    is_before |= (words[None, :] == words[:, None]) & (ranks[None, :] < ranks[:, None])
    rank = tl.sum((is_before & inside[None, :]).to(tl.int32), axis=1)
    is_valid = scores > EXCLUDED
    at = place * TOP_K + rank
    tl.store(found_scores_ptr + at, tl.where(is_valid, scores, EXCLUDED), mask=inside)
    tl.store(found_slots_ptr + at, tl.where(is_valid, slots, 0).to(tl.int64), mask=inside)
    tl.store(found_valid_ptr + at, is_valid.to(tl.uint8), mask=inside)
