"""Cut documents into segments."""

from itertools import pairwise
from typing import Literal

Alignment = Literal["left", "right", "center"]
"""Which segment of a document is short: the last, the first, or (nearly equal lengths) none."""


def segment_bounds(
    num_tokens: int, segment_length: int, alignment: Alignment = "left"
) -> list[tuple[int, int]]:
    """Cut a document.

    Args:
        num_tokens: Tokens of the document.
        segment_length: Most tokens of a segment.
        alignment: `left`: whole segments from the start; `right`: whole segments from the end;
            `center`: as many segments, all of the length of the first except the last.

    Returns:
        First token and end of each segment, in order; together all tokens, none twice.

    Raises:
        ValueError: If a number is out of range or the alignment unknown.

    Source:
        Bulatov et al. 2023 (arXiv:2304.11062); the report aligns to the right.
    """
    if num_tokens < 0 or segment_length < 1:
        msg = (
            "num_tokens must be at least 0 and segment_length at least 1, got "
            f"{num_tokens} and {segment_length}."
        )
        raise ValueError(msg)
    count = -(-num_tokens // segment_length)
    if count == 0:
        return []
    if alignment == "right":
        inner = [num_tokens - segment_length * left for left in range(count - 1, 0, -1)]
    elif alignment == "left":
        inner = [segment_length * index for index in range(1, count)]
    elif alignment == "center":
        equal = -(-num_tokens // count)
        inner = list(range(equal, num_tokens, equal))
    else:
        msg = f"alignment must be 'left', 'right' or 'center', got {alignment!r}."
        raise ValueError(msg)
    edges = [0, *inner, num_tokens]
    return list(pairwise(edges))
