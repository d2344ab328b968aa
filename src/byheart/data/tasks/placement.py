"""Where facts stand in a document, in the clean form and in the report's.

The report's token arithmetic, for `N` segments of `S` usable tokens (499 in its BERT):

- A document is made `S * N` tokens long *with* `[CLS]`, `[SEP]` and the question's padding, which
  are dropped again. So `S * N - 2 - padding` tokens are left.
- Segments are cut from the end: the first has `S - 2 - padding` tokens, the others `S`.
- Facts are written at index `k * S + 1` of the tensor, `[CLS]` counted: at offset `k * S` of the
  content. For `k = 0` that is the start of segment 0, for `k > 0` the offset `2 + padding` in
  segment `k`: a random segment, but always the same place in it, and never across a boundary.
"""

from collections.abc import Sequence
from typing import Literal

import numpy as np

__all__ = ["REPORT_SPECIALS", "place_anywhere", "place_like_report"]

REPORT_SPECIALS = 2
"""`[CLS]` and `[SEP]`, which the report counts into the length of a document and drops again."""


def place_anywhere(
    rng: np.random.Generator,
    lengths: Sequence[int],
    num_background: int,
    num_gaps: int,
    others: Sequence[tuple[int, int]] = (),
    *,
    in_order: bool = False,
) -> list[int]:
    """Draw places for facts between the tokens of the background.

    Args:
        rng: Source of the draw.
        lengths: Tokens of each fact.
        num_background: Tokens of background, facts and question not counted.
        num_gaps: Facts stand only before the first `num_gaps` tokens of the background, or at its
            end if there are fewer tokens.
        others: What else stands between the tokens of the background, as pairs of a gap, which is
            the number of background tokens before it, and a length in tokens.
        in_order: Whether the facts keep their order.

    Returns:
        The offset in the document of each fact, then of each of the others. For facts all gaps are
        equally likely, and so are all orders; facts in the same gap follow each other.
    """
    gaps = np.sort(rng.integers(min(num_gaps, num_background + 1), size=len(lengths))).tolist()
    order = list(range(len(lengths))) if in_order else rng.permutation(len(lengths)).tolist()
    items = [(gap, fact, lengths[fact]) for gap, fact in zip(gaps, order, strict=True)]
    items += [(gap, len(lengths) + i, length) for i, (gap, length) in enumerate(others)]
    positions = [0] * len(items)
    shift = 0
    for gap, item, length in sorted(items, key=lambda item: item[0]):
        positions[item] = gap + shift
        shift += length
    return positions


def place_like_report(
    rng: np.random.Generator,
    name: Literal["memorize", "detect", "reason"],
    lengths: Sequence[int],
    *,
    segment_length: int,
    num_segments: int,
) -> list[int]:
    """Draw places for facts by the report's rules.

    Args:
        rng: Source of the draw.
        name: `memorize` puts its fact first. `detect` and `reason` put each fact into a random
            segment, the second directly behind the first if it is the same.
        lengths: Tokens of each fact.
        segment_length: Usable text tokens of a segment.
        num_segments: Segments of the document.

    Returns:
        The offset of each fact in the content. The second fact may stand before the first.

    Source:
        Bulatov et al. 2023, Scaling Transformer to 1M tokens and beyond with RMT, "Memorization
        Tasks" (arXiv:2304.11062); the offsets are those of its code.
    """
    if name == "memorize":
        return [0]
    first, *rest = (rng.integers(num_segments, size=len(lengths)) * segment_length).tolist()
    return [first, *(first + lengths[0] if place == first else place for place in rest)]
