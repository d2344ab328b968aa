"""Slow twins: what each operation means, in loops a reader can check.

The fast paths must equal these, outputs and gradients; the tests say so. Each function works on
one vector at a time and follows the formula of its source, whatever that costs. The twins of the
searches are in `byheart.ops.reference_search` and named here too.
"""

import math
from itertools import product

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from byheart.ops.attention import EXCLUDED, Attended
from byheart.ops.losses import IGNORED
from byheart.ops.reference_search import recall, strided_bucket_top_k, top_k_inner_product
from byheart.ops.search import Neighbours

__all__ = [
    "attention",
    "cross_entropy",
    "gather_attend",
    "merge_by_gate",
    "merge_by_softmax",
    "recall",
    "rotate",
    "strided_bucket_top_k",
    "t5_bucket",
    "top_k_inner_product",
    "window_view",
]


def attention(
    queries: Float[Tensor, "batch heads query head_dim"],
    keys: Float[Tensor, "batch heads entry head_dim"],
    values: Float[Tensor, "batch heads entry head_dim"],
    bias: Float[Tensor, "batch heads query entry"],
    visible: Bool[Tensor, "batch query entry"],
) -> Attended:
    """Attend to what is visible; a query that sees nothing returns zero.

    The twin of `masked_attention`, and of `window_attention` with what `window_view` returns.

    Args:
        queries: Queries, already multiplied by the attention scale.
        keys: Keys.
        values: Their values.
        bias: Additive bias, already multiplied by the scale.
        visible: `True` where the query sees the key.

    Returns:
        Output and log of the softmax denominators.
    """
    batch, heads, num_queries, _ = queries.shape
    outputs, logsumexps = [], []
    for b, h, q in product(range(batch), range(heads), range(num_queries)):
        seen = [n for n in range(keys.shape[2]) if visible[b, q, n]]
        scores = [queries[b, h, q] @ keys[b, h, n] + bias[b, h, q, n] for n in seen]
        output, logsumexp = _softmax_average(
            scores, [values[b, h, n] for n in seen], queries[b, h, q]
        )
        outputs.append(output)
        logsumexps.append(logsumexp)
    return Attended(
        torch.stack(outputs).view(queries.shape),
        torch.stack(logsumexps).view(batch, heads, num_queries),
    )


def window_view(
    distance_bias: Float[Tensor, "heads distances"],
    cache_valid: Bool[Tensor, "batch cache"],
    num_queries: int,
    *,
    self_visible: bool,
) -> tuple[Float[Tensor, "batch heads query entry"], Bool[Tensor, "batch query entry"]]:
    """Spell out what a sliding window over [XL cache ; segment] shows each query.

    Args:
        distance_bias: Bias for the distances 0 ... `window`.
        cache_valid: Which slots of the XL cache hold a token of the row's document.
        num_queries: Tokens of the segment.
        self_visible: Whether a token sees itself.

    Returns:
        Bias and visibility of every key for every query.
    """
    batch, cache_length = cache_valid.shape
    heads, window = distance_bias.shape[0], distance_bias.shape[1] - 1
    shape = (batch, num_queries, cache_length + num_queries)
    visible = torch.zeros(shape, dtype=torch.bool)
    bias = torch.zeros(batch, heads, *shape[1:], dtype=distance_bias.dtype)
    for b, q, n in product(*map(range, shape)):
        distance = cache_length + q - n
        holds_a_token = n >= cache_length or bool(cache_valid[b, n])
        nearest = 0 if self_visible else 1
        if holds_a_token and nearest <= distance <= window:
            visible[b, q, n] = True
            bias[b, :, q, n] = distance_bias[:, distance]
    return bias, visible


def gather_attend(
    queries: Float[Tensor, "batch heads query head_dim"],
    scale: Float[Tensor, " heads"],
    keys: Float[Tensor, "batch kv_heads entry head_dim"],
    values: Float[Tensor, "batch kv_heads entry head_dim"],
    found: Neighbours,
    *,
    bias: Float[Tensor, "batch heads query top_k"] | None = None,
    empty_as_zero: bool = False,
) -> Attended:
    """Attend to the retrieved entries only: softmax over the neighbours, then their values.

    Args:
        queries: Queries before the scale.
        scale: Factor of the scores, per head.
        keys: All slots of the memory; no gradient.
        values: All slots of the memory; no gradient.
        found: Which slots to attend to.
        bias: Added to the scores of entries, after the scale.
        empty_as_zero: Whether a slot without an entry counts as a key and value of zeros.

    Returns:
        Output and log of the softmax denominators.
    """
    keys, values = keys.detach(), values.detach()
    batch, heads, num_queries, _ = queries.shape
    queries_per_kv_head = heads // keys.shape[1]
    nothing = queries.new_zeros(queries.shape[3])
    outputs, logsumexps = [], []
    for b, h, q in product(range(batch), range(heads), range(num_queries)):
        g = h // queries_per_kv_head
        scores, entries = [], []
        for k in range(found.slots.shape[3]):
            n = int(found.slots[b, h, q, k])
            if found.valid[b, h, q, k]:
                score = queries[b, h, q] @ keys[b, g, n].to(queries.dtype) * scale[h]
                scores.append(score if bias is None else score + bias[b, h, q, k])
                entries.append(values[b, g, n].to(queries.dtype))
            elif empty_as_zero:
                scores.append(queries[b, h, q] @ nothing * scale[h])
                entries.append(nothing)
        output, logsumexp = _softmax_average(scores, entries, queries[b, h, q])
        outputs.append(output)
        logsumexps.append(logsumexp)
    return Attended(
        torch.stack(outputs).view(queries.shape),
        torch.stack(logsumexps).view(batch, heads, num_queries),
    )


def merge_by_gate(
    local: Float[Tensor, "batch heads query head_dim"],
    memory: Float[Tensor, "batch heads query head_dim"],
    gate: Float[Tensor, "#batch heads #query"],
) -> Float[Tensor, "batch heads query head_dim"]:
    """Mix two attention outputs with a gate between 0 and 1.

    Returns:
        `gate * memory + (1 - gate) * local`.
    """
    gate_BHQ = gate.expand(local.shape[:3])
    mixed = [
        gate_BHQ[at] * memory[at] + (1 - gate_BHQ[at]) * local[at]
        for at in product(*map(range, local.shape[:3]))
    ]
    return torch.stack(mixed).view(local.shape)


def merge_by_softmax(
    outputs: list[Float[Tensor, "batch heads query head_dim"]],
    logsumexps: list[Float[Tensor, "batch heads query"]],
) -> Float[Tensor, "batch heads query head_dim"]:
    """Mix attention outputs over disjoint sets of keys as if one softmax had run over all.

    Returns:
        Each output weighted with its share of the common denominator.
    """
    merged = []
    for at in product(*map(range, outputs[0].shape[:3])):
        average, _ = _softmax_average(
            [logsumexp[at] for logsumexp in logsumexps],
            [output[at] for output in outputs],
            outputs[0][at],
        )
        merged.append(average)
    return torch.stack(merged).view(outputs[0].shape)


def t5_bucket(distance: int, num_buckets: int = 32, max_distance: int = 128) -> int:
    """Number the bucket of one distance: exact up to half the buckets, then logarithmic.

    Returns:
        The bucket.
    """
    num_exact = num_buckets // 2
    if distance < num_exact:
        return distance
    share = math.log(distance / num_exact) / math.log(max_distance / num_exact)
    # a distance on a boundary belongs to the upper bucket, whichever way its logarithm was rounded
    step = math.floor(share * (num_buckets - num_exact) + 1e-6)
    return min(num_exact + step, num_buckets - 1)


def rotate(
    x: Float[Tensor, " head_dim"], position: int, theta: float = 10_000.0
) -> Float[Tensor, " head_dim"]:
    """Turn one query or key to its position: component i and i + half are a point in a plane.

    Args:
        x: The vector.
        position: Its position; may be negative.
        theta: Base of the wavelengths.

    Returns:
        The rotated vector.
    """
    half = x.shape[0] // 2
    turned = [x[0]] * (2 * half)
    for i in range(half):
        angle = position * theta ** (-2 * i / (2 * half))
        turned[i] = math.cos(angle) * x[i] - math.sin(angle) * x[half + i]
        turned[half + i] = math.sin(angle) * x[i] + math.cos(angle) * x[half + i]
    return torch.stack(turned)


def cross_entropy(
    hidden: Float[Tensor, "tokens embed_dim"],
    weight: Float[Tensor, "vocab embed_dim"],
    labels: Int[Tensor, " tokens"],
) -> Float[Tensor, " tokens"]:
    """Compute the loss of each position.

    Returns:
        Negative log likelihood in nats; 0 where the label is `IGNORED`.
    """
    losses = []
    for state, label in zip(hidden, labels.tolist(), strict=True):
        logits = [state @ row for row in weight]
        if label == IGNORED:
            losses.append(0.0 * logits[0])
        else:
            losses.append(_logsumexp(logits) - logits[label])
    return torch.stack(losses)


def _softmax_average(
    scores: list[Tensor], values: list[Tensor], like: Tensor
) -> tuple[Tensor, Tensor]:
    """Average values with the softmax of their scores.

    Returns:
        The average and the log of the denominator; zeros and `EXCLUDED` for an empty list.
    """
    if not scores:
        return torch.zeros_like(like), like.new_tensor(EXCLUDED)
    logsumexp = _logsumexp(scores)
    average = torch.zeros_like(values[0])
    for score, value in zip(scores, values, strict=True):
        average = average + torch.exp(score - logsumexp) * value
    return average, logsumexp


def _logsumexp(scores: list[Tensor]) -> Tensor:
    largest = max(score.item() for score in scores)
    denominator = torch.zeros_like(scores[0])
    for score in scores:
        denominator = denominator + torch.exp(score - largest)
    return largest + torch.log(denominator)
