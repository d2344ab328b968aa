"""The age of retrieved entries."""

from jaxtyping import Float, Int
from torch import Tensor

from byheart.memory.ring import RingCursor


def age_bias(
    cursor: RingCursor,
    slots: Int[Tensor, "batch heads query top_k"],
    slope: float,
) -> Float[Tensor, "batch heads query top_k"] | None:
    """Weigh entries by their age.

    Keys have no position, so of two entries that match alike, without this the old one counts as
    much as the new one, and the more entries there are, the more of them are old.

    Args:
        cursor: The ring that holds them.
        slots: Where the entries are.
        slope: How much age counts; 0 for not at all.

    Returns:
        `-slope * log(age)`, where the age of the newest entry of a row is 1; `None` for a slope of
        0.
    """
    if slope == 0:
        return None
    return -slope * cursor.ages(slots).float().log()
