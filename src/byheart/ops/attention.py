"""Local attention over [XL cache ; segment]: sliding window, relative bias, safe softmax.

Two paths compute the same thing. `window_attention` is for whole segments, where every row starts
at the same place: queries are cut into blocks that only meet the keys their window can reach.
`masked_attention` is for everything else (decoding, rows at different places): one mask says which
key each query sees. Both equal `byheart.ops.reference.attention`.
"""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from byheart.ops import known

# Lower than any real score and finite: -inf would give NaN in the softmax of a query that sees
# nothing. Half of the float32 minimum leaves room to add a score without overflowing.
EXCLUDED = torch.finfo(torch.float32).min / 2

# Queries per block of `window_attention`. Smaller blocks waste fewer scores outside the window,
# larger ones make better matrix products; 128 was the fastest of 64, 128, 256, 512 on 2 CPU cores.
BLOCK_LENGTH = 128


class Attended(NamedTuple):
    """What an attention returns."""

    output: Float[Tensor, "batch heads query head_dim"]
    """Weighted values; zero for a query that sees no key."""
    logsumexp: Float[Tensor, "batch heads query"] | None
    """Log of the softmax denominator (natural log, in `wide_dtype`), if asked for; `EXCLUDED` for a
    query that sees no key."""


def wide_dtype(x: Tensor) -> torch.dtype:
    """Name the dtype in which scores and sums are held.

    Returns:
        float32, or float64 for float64 inputs.
    """
    return torch.promote_types(x.dtype, torch.float32)


def window_bias(
    distance_bias: Float[Tensor, "heads distances"], block_length: int, *, self_visible: bool
) -> Float[Tensor, "heads query entry"]:
    """Lay a bias per distance out over a block of queries and the keys its window can reach.

    Entry `(i, j)` belongs to query `i` and key `j` of `block_length + window` keys of which the
    last `block_length` are the block itself, so the distance is `window + i - j`.

    Args:
        distance_bias: Additive bias for the distances 0, 1, ... `window`.
        block_length: Queries per block.
        self_visible: Whether distance 0 may be attended to.

    Returns:
        The bias where the key is visible, a value below any score elsewhere.
    """
    heads, num_distances = distance_bias.shape
    num_keys = block_length + num_distances - 1
    nearest_last_HN = distance_bias.flip(-1)
    if not self_visible:
        nearest_last_HN = torch.cat(
            [nearest_last_HN[:, :-1], nearest_last_HN.new_full((heads, 1), EXCLUDED)], dim=1
        )
    # Rows of a Toeplitz matrix are one vector, shifted: repeating a vector of length n + 1 and
    # cutting the result into rows of length n shifts each row by one. Its gradient is a plain sum,
    # where indexing with a distance matrix would scatter every score back one by one.
    row_HN = torch.cat(
        [nearest_last_HN, nearest_last_HN.new_full((heads, block_length), EXCLUDED)], dim=1
    )
    flat = row_HN.repeat(1, block_length)[:, : block_length * num_keys]
    return flat.view(heads, block_length, num_keys)


def window_attention(
    queries: Float[Tensor, "batch heads query head_dim"],
    keys: Float[Tensor, "batch heads entry head_dim"],
    values: Float[Tensor, "batch heads entry head_dim"],
    distance_bias: Float[Tensor, "heads distances"],
    cache_valid: Bool[Tensor, "batch cache"],
    *,
    self_visible: bool,
    need_logsumexp: bool = False,
    block_length: int = BLOCK_LENGTH,
) -> Attended:
    """Attend to exactly the previous `window` tokens, for rows that all start at the same place.

    Args:
        queries: Queries of the segment, already multiplied by the attention scale.
        keys: Keys of the XL cache, then of the segment (`entry = cache + query`).
        values: Their values.
        distance_bias: Bias for the distances 0 ... `window`, already multiplied by the scale.
        cache_valid: Which slots of the XL cache hold a token of the row's document.
        self_visible: Whether a token sees itself.
        need_logsumexp: Whether to return the log of the denominators.
        block_length: Queries per block.

    Returns:
        Output and, if asked for, log of the softmax denominators. Gradients reach every float
        input.

    Source:
        Dai et al. 2019, Transformer-XL; Raffel et al. 2020 (T5) for the bias; safe softmax as in
        Wu et al. 2022, Memorizing Transformers: a query that sees nothing returns zero.
    """
    batch, heads, num_queries, head_dim = queries.shape
    window = distance_bias.shape[1] - 1
    block_length = min(block_length, num_queries)
    num_blocks = -(-num_queries // block_length)
    tail = num_blocks * block_length - num_queries
    # every block reaches `window` slots back: pad or cut the cache to exactly that
    front = window - cache_valid.shape[1]
    pad = (0, 0, front, tail)
    keys_BHNDU = torch.nn.functional.pad(keys, pad).unfold(2, block_length + window, block_length)
    values_BHNDU = torch.nn.functional.pad(values, pad).unfold(
        2, block_length + window, block_length
    )
    queries_BHNQD = torch.nn.functional.pad(queries, (0, 0, 0, tail)).view(
        batch, heads, num_blocks, block_length, head_dim
    )
    scores_BHNQU = _scores(queries_BHNQD, keys_BHNDU)
    bias_HQU = window_bias(
        distance_bias.to(scores_BHNQU.dtype), block_length, self_visible=self_visible
    )
    # the tail's keys come after all real queries, which do not see them for that reason already
    visible_BN = torch.nn.functional.pad(
        torch.nn.functional.pad(cache_valid, (0, num_queries + tail), value=True), (front, 0)
    )
    hidden_BNU = ~visible_BN.unfold(1, block_length + window, block_length)
    # in place: the backward of a matrix product does not need its result
    scores_BHNQU += bias_HQU[:, None]
    # a pass over all scores, saved where rows have full caches; only on a CPU is asking free
    if not known.known_none(hidden_BNU):
        scores_BHNQU.masked_fill_(hidden_BNU[:, None, :, None], EXCLUDED)
    weights_BHNQU = torch.softmax(scores_BHNQU, dim=-1).to(values.dtype)
    output_BHNQD = weights_BHNQU @ values_BHNDU.transpose(-1, -2)
    output = output_BHNQD.reshape(batch, heads, -1, head_dim)[:, :, :num_queries]
    logsumexp = None
    if need_logsumexp:
        logsumexp = torch.logsumexp(scores_BHNQU, dim=-1)
        logsumexp = logsumexp.reshape(batch, heads, -1)[:, :, :num_queries]
    sees_BQ = _sees_something(cache_valid, num_queries, window, self_visible=self_visible)
    return _silence(Attended(output, logsumexp), sees_BQ)


def masked_attention(
    queries: Float[Tensor, "batch heads query head_dim"],
    keys: Float[Tensor, "batch heads entry head_dim"],
    values: Float[Tensor, "batch heads entry head_dim"],
    bias: Float[Tensor, "batch heads query entry"],
    visible: Bool[Tensor, "batch query entry"],
    *,
    need_logsumexp: bool = False,
) -> Attended:
    """Attend wherever a mask allows it.

    Args:
        queries: Queries, already multiplied by the attention scale.
        keys: All keys a query of the row might see.
        values: Their values.
        bias: Additive bias, already multiplied by the scale.
        visible: `True` where the query sees the key.
        need_logsumexp: Whether to return the log of the denominators.

    Returns:
        Output and, if asked for, log of the softmax denominators.
    """
    scores_BHQN = _scores(queries, keys.transpose(-1, -2)) + bias
    scores_BHQN = scores_BHQN.masked_fill(~visible[:, None], EXCLUDED)
    output = torch.softmax(scores_BHQN, dim=-1).to(values.dtype) @ values
    logsumexp = torch.logsumexp(scores_BHQN, dim=-1) if need_logsumexp else None
    return _silence(Attended(output, logsumexp), visible.any(-1))


def _scores(queries: Tensor, transposed_keys: Tensor) -> Tensor:
    """Multiply in `wide_dtype`, also under autocast.

    Scores of 10 would be off by 0.02 in bfloat16, and the joint softmax compares them with exact
    scores of the memory.

    Returns:
        The scores, unmasked.
    """
    wide = wide_dtype(queries)
    with torch.autocast(queries.device.type, enabled=False):
        return queries.to(wide) @ transposed_keys.to(wide)


def _sees_something(
    cache_valid: Bool[Tensor, "batch cache"], num_queries: int, window: int, *, self_visible: bool
) -> Bool[Tensor, "batch query"]:
    """Say which queries have at least one key: all but the first token of a row without a cache.

    Returns:
        `True` where the query sees a key.
    """
    # a window of 0 reaches nothing but the token itself
    first_to_see = 0 if self_visible else 1 if window else num_queries
    in_segment_Q = torch.arange(num_queries, device=cache_valid.device) >= first_to_see
    # the first query of the segment reaches the last `window` cache slots
    reachable_BW = cache_valid[:, max(0, cache_valid.shape[1] - window) :]
    return in_segment_Q[None] | reachable_BW.any(-1, keepdim=True)


def _silence(attended: Attended, sees_BQ: Bool[Tensor, "batch query"]) -> Attended:
    """Give queries that see no key the output of an empty sum.

    Returns:
        Zero output and `EXCLUDED` denominators where `sees_BQ` is false.
    """
    sees_B1Q = sees_BQ[:, None]
    output = attended.output * sees_B1Q[..., None]
    if attended.logsumexp is None:
        return Attended(output, None)
    return Attended(output, attended.logsumexp.masked_fill(~sees_B1Q, EXCLUDED))
