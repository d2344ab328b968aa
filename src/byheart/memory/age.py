"""Entries weighed by their age: which are found, and with what weight."""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from byheart.memory.ring import RingCursor
from byheart.ops.search import Neighbours


def age_bias(cursor: RingCursor, slope: float) -> Float[Tensor, "batch entry"]:
    """Weigh entries by their age.

    Keys have no position, so of two entries that match alike, without this the old one counts as
    much as the new one, and the more entries there are, the more of them are old.

    Args:
        cursor: The ring that holds them.
        slope: How much age counts.

    Returns:
        `-slope * log(age)` of the entry in each slot, where the age of the newest entry of a row is
        1. What it says of an empty slot means nothing.
    """
    return -slope * cursor.ages().float().log()


@torch.no_grad()
def find_by_weight(
    search: Callable[[Tensor, Tensor | None], Neighbours],
    queries: Float[Tensor, "batch heads query head_dim"],
    scale: Float[Tensor, " heads"],
    cursor: RingCursor,
    slope: float,
) -> tuple[Neighbours, Float[Tensor, "batch heads query top_k"] | None]:
    """Find the entries with the largest weights: scaled inner product, less what age takes.

    Args:
        search: Finds the entries with the largest inner products with queries, plus a bias of each
            slot if there is one.
        queries: Queries before the scale.
        scale: Factor of the inner products, per head.
        cursor: The ring that holds the entries.
        slope: How much age counts; 0 for not at all.

    Returns:
        What was found, by weight, descending, with inner products with `queries` as scores; and the
        `age_bias` of what was found, `None` for a slope of 0.
    """
    if slope == 0:
        return search(queries, None), None
    bias, scale_H11 = age_bias(cursor, slope), scale.float()[:, None, None]
    found = search(queries.float() * scale_H11, bias)
    batch, heads, num_queries, _ = found.slots.shape
    bias_BHQM = bias[:, None, None].expand(batch, heads, num_queries, -1)
    bias_BHQK = bias_BHQM.gather(3, found.slots)
    products = (found.scores - bias_BHQK) / scale_H11
    return found._replace(scores=torch.where(found.valid, products, found.scores)), bias_BHQK
