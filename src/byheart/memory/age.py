"""Entries weighed by their age: which are found, and with what weight."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from byheart.memory.ring import RingCursor
from byheart.ops.search import Neighbours


@dataclass(frozen=True, slots=True)
class AgeBias:
    """Weighs entries by their age: `-slope * log(age)`, where the newest entry of a row has age 1.

    Keys have no position, so of two entries that match alike, without this the old one counts as
    much as the new one, and the more entries there are, the more of them are old.

    It is worked out for the slots that are asked for: to do so for all takes as long as a search.
    What it says of an empty slot means nothing.
    """

    cursor: RingCursor
    """The ring that holds the entries."""
    slope: float
    """How much age counts; above 0."""

    def at(
        self, row_ids: Int[Tensor, "*#shape"], slots: Int[Tensor, "*#shape"]
    ) -> Float[Tensor, "*shape"]:
        """Return the bias of the entries in slots of rows."""
        return self._of(self.cursor.ages_of(row_ids, slots))

    def of_blocks(
        self, block_size: int
    ) -> tuple[Float[Tensor, "batch block"], Float[Tensor, "batch block"]]:
        """Return bounds of the bias in each block of slots: no entry has less, none more."""
        youngest, oldest = self.cursor.ages_of_blocks(block_size)
        return self._of(oldest), self._of(youngest)

    def dense(self) -> Float[Tensor, "batch entry"]:
        """Return the bias of every slot."""
        return self._of(self.cursor.ages())

    def _of(self, ages: Int[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        return -self.slope * ages.float().log()


@torch.no_grad()
def find_by_weight(
    search: Callable[[Tensor, AgeBias | None], Neighbours],
    queries: Float[Tensor, "batch heads query head_dim"],
    scale: Float[Tensor, " heads"],
    cursor: RingCursor,
    slope: float,
) -> tuple[Neighbours, Float[Tensor, "batch heads query top_k"] | None]:
    """Find the entries with the largest weights: scaled inner product, less what age takes.

    Args:
        search: Finds the entries with the largest inner products with queries, plus a bias if there
            is one.
        queries: Queries before the scale.
        scale: Factor of the inner products, per head.
        cursor: The ring that holds the entries.
        slope: How much age counts; 0 for not at all.

    Returns:
        What was found, by weight, descending, with inner products with `queries` as scores; and the
        bias of what was found, `None` for a slope of 0.
    """
    if slope == 0:
        return search(queries, None), None
    bias, scale_H11 = AgeBias(cursor, slope), scale.float()[:, None, None]
    found = search(queries.float() * scale_H11, bias)
    row_ids = torch.arange(len(queries), device=queries.device)
    bias_BHQK = bias.at(row_ids[:, None, None, None], found.slots)
    products = (found.scores - bias_BHQK) / scale_H11
    return found._replace(scores=torch.where(found.valid, products, found.scores)), bias_BHQK
