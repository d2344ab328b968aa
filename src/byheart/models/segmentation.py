"""Which tokens each row reads at which step."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor

from byheart.ops.segments import Alignment, segment_bounds


@dataclass(frozen=True, kw_only=True, slots=True)
class Step:
    """The next segment of all rows that have one."""

    rows: tuple[int, ...]
    """Rows of the batch."""
    spans: tuple[tuple[int, int], ...]
    """First token and end of the segment, for each of those rows; equal for rows that only keep
    the others company."""
    last: tuple[bool, ...]
    """Whether it is the last segment of the row."""

    def take(
        self, tokens: Int[Tensor, "batch width"]
    ) -> tuple[Int[Tensor, "rows text"], Int[Tensor, " rows"] | None]:
        """Cut the segments out of a batch.

        Args:
            tokens: One number per token, each row from its first column.

        Returns:
            The numbers of the segments, and how many each row has (`None`: all columns).
        """
        lengths = [stop - start for start, stop in self.spans]
        width = max(lengths)
        if len(set(self.spans)) == 1:
            start, stop = self.spans[0]
            cut = tokens[:, start:stop]
            return (cut if len(self.rows) == len(tokens) else cut[self.row_ids(tokens)]), None
        starts = torch.tensor([start for start, _ in self.spans], device=tokens.device)
        columns = starts[:, None] + torch.arange(width, device=tokens.device)
        # what lies behind a short segment is masked, whatever it is
        columns = columns.clamp(max=tokens.shape[1] - 1)
        cut = tokens[self.row_ids(tokens)[:, None], columns]
        if len(set(lengths)) == 1:
            return cut, None
        return cut, torch.tensor(lengths, device=tokens.device)

    def row_ids(self, like: Tensor) -> Int[Tensor, " rows"]:
        """Return `rows` as a tensor on the device of `like`."""
        return torch.tensor(self.rows, device=like.device)


def plan_steps(
    num_tokens: Sequence[int],
    segment_length: int,
    alignment: Alignment,
    *,
    every_row: bool = False,
) -> list[Step]:
    """Cut the documents of a batch into steps.

    With `right`, rows with fewer segments join late, so that all end together (the report);
    otherwise all begin together and end one after the other. Rows without tokens have no step.

    Args:
        num_tokens: Tokens of each row.
        segment_length: Most tokens of a segment.
        alignment: Which segment of a row is short.
        every_row: Whether rows without a segment take part in a step, without a token; for models
            whose own state has all rows.

    Returns:
        The steps, in order.
    """
    bounds = [segment_bounds(count, segment_length, alignment) for count in num_tokens]
    num_steps = max((len(cuts) for cuts in bounds), default=0)
    steps = []
    for index in range(num_steps):
        active = []
        for row, cuts in enumerate(bounds):
            place = index - (num_steps - len(cuts) if alignment == "right" else 0)
            if 0 <= place < len(cuts):
                active.append((row, cuts[place], place == len(cuts) - 1))
            elif every_row:
                active.append((row, (0, 0), False))
        rows, spans, last = zip(*active, strict=True)
        steps.append(Step(rows=rows, spans=spans, last=last))
    return steps
