"""The text of a batch, from what is pending and what is new."""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from byheart.memory.recurrent import NewMemory, RecurrentState
from byheart.models.segmentation import Step


@dataclass(frozen=True, kw_only=True, eq=False)
class RowText:
    """What each row reads in a pass: its pending tokens, then the new ones."""

    input_ids: Int[Tensor, "batch width"]
    """Tokens of each row, from its first column."""
    num_tokens: tuple[int, ...]
    """Tokens of each row; 0 for rows with nothing new."""
    num_pending: tuple[int, ...]
    """How many of them were pending."""
    first_column: tuple[int, ...]
    """Where the new tokens of each row begin in the input."""
    num_columns: int
    """Columns of the input."""

    @property
    def num_new(self) -> tuple[int, ...]:
        """New tokens of each row."""
        counts = zip(self.num_tokens, self.num_pending, strict=True)
        return tuple(max(0, count - pending) for count, pending in counts)

    def from_input(
        self, numbers: Int[Tensor, "batch columns"], fill: int
    ) -> Int[Tensor, "batch width"]:
        """Move one number per input column to where its token is.

        Args:
            numbers: One number for each column of the input.
            fill: For tokens that were pending, and columns without a token.

        Returns:
            One number for each token.
        """
        width = self.input_ids.shape[1]
        if self.is_input and width == numbers.shape[1]:
            return numbers
        device = numbers.device
        shift = torch.tensor(self.num_pending, device=device) - torch.tensor(
            self.first_column, device=device
        )
        tokens = torch.arange(width, device=device)
        source = (tokens - shift[:, None]).clamp(0, numbers.shape[1] - 1)
        is_new = (tokens >= torch.tensor(self.num_pending, device=device)[:, None]) & (
            tokens < torch.tensor(self.num_tokens, device=device)[:, None]
        )
        return torch.where(is_new, numbers.gather(1, source), fill)

    def column(self, row: int, token: int) -> int:
        """Return the input column of a token; negative if it was pending."""
        return token - self.num_pending[row] + self.first_column[row]

    @property
    def is_input(self) -> bool:
        """Whether tokens and columns of the input are the same."""
        return (
            not any(self.num_pending)
            and not any(self.first_column)
            and set(self.num_tokens) == {self.num_columns}
        )


def require_token_ids(input_ids: Tensor) -> None:
    """Refuse what is no batch of token ids.

    Raises:
        TypeError: If it is no tensor.
        ValueError: If the shape is not `[batch, tokens]`, or the numbers are not whole.
    """
    if not isinstance(input_ids, Tensor):
        msg = f"input_ids must be a tensor, got {type(input_ids).__name__}."
        raise TypeError(msg)
    no_numbers = input_ids.dtype.is_floating_point or input_ids.dtype == torch.bool
    if input_ids.ndim != 2 or no_numbers:
        msg = (
            f"input_ids must be whole numbers of the shape [batch, tokens], got "
            f"{list(input_ids.shape)} of {input_ids.dtype}. Give a single text as "
            "input_ids[None]."
        )
        raise ValueError(msg)


def gather_text(
    input_ids: Int[Tensor, "batch tokens"], attention_mask: Tensor | None, state: RecurrentState
) -> RowText:
    """Put the new tokens of each row behind its pending ones.

    Args:
        input_ids: New tokens.
        attention_mask: 1 for tokens, 0 for padding before or behind them; `None` for no padding.
        state: What is pending; rows that start a document are reset already.

    Returns:
        The text.
    """
    input_ids = input_ids.long()
    batch, num_columns = input_ids.shape
    first, new = text_extents(input_ids, attention_mask)
    pending = tuple(
        count if fresh else 0 for count, fresh in zip(state.num_pending.tolist(), new, strict=True)
    )
    totals = tuple(old + fresh if fresh else 0 for old, fresh in zip(pending, new, strict=True))
    text = RowText(
        input_ids=input_ids,
        num_tokens=totals,
        num_pending=pending,
        first_column=first,
        num_columns=num_columns,
    )
    if text.is_input:
        return text
    ids = input_ids.new_zeros(batch, max(1, *totals))
    for row in range(batch):
        old, fresh = pending[row], new[row]
        ids[row, :old] = state.pending[row, :old]
        ids[row, old : old + fresh] = input_ids[row, first[row] : first[row] + fresh]
    return RowText(
        input_ids=ids,
        num_tokens=totals,
        num_pending=pending,
        first_column=first,
        num_columns=num_columns,
    )


def text_extents(
    input_ids: Int[Tensor, "batch tokens"], attention_mask: Tensor | None
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Find the text of each row.

    Args:
        input_ids: Text and padding.
        attention_mask: 1 for tokens, 0 for padding before or behind them; `None` for no padding.

    Returns:
        The first column and the number of tokens of each row.

    Raises:
        TypeError: If the mask is no tensor.
        ValueError: If the mask has another shape, or holes.
    """
    batch, num_columns = input_ids.shape
    if attention_mask is None:
        return (0,) * batch, (num_columns,) * batch
    if not isinstance(attention_mask, Tensor):
        msg = f"attention_mask must be a tensor, got {type(attention_mask).__name__}."
        raise TypeError(msg)
    if attention_mask.shape != input_ids.shape:
        msg = (
            f"attention_mask must have the shape of input_ids, {list(input_ids.shape)}, got "
            f"{list(attention_mask.shape)}."
        )
        raise ValueError(msg)
    real = attention_mask.bool()
    counts = real.sum(dim=1)
    first = real.long().argmax(dim=1) if num_columns else torch.zeros_like(counts)
    columns = torch.arange(num_columns, device=real.device)
    expected = (columns >= first[:, None]) & (columns < (first + counts)[:, None])
    if not torch.equal(real, expected):
        row = int((real != expected).any(dim=1).long().argmax())
        msg = (
            "attention_mask must be 1 for one run of tokens in each row, with padding before or "
            f"behind it; row {row} has holes. Remove the padding inside of the text."
        )
        raise ValueError(msg)
    return tuple(first.tolist()), tuple(counts.tolist())


def new_memory(
    text: RowText,
    before: RecurrentState,
    memory: Float[Tensor, "batch memory embed_dim"],
    document_start: Bool[Tensor, " batch"],
    *,
    keep_unfinished: bool,
) -> NewMemory:
    """Describe what a pass has made of the memory.

    Args:
        text: What it has read.
        before: The state it has read; rows that start a document are reset already.
        memory: Memory after the last complete segment of each row.
        document_start: Rows that began a document.
        keep_unfinished: Whether a last segment that is not full is kept as pending, to be read
            again with what follows; otherwise it counts as complete.

    Returns:
        What to commit.
    """
    length, device = before.layout.segment_length, memory.device
    pending, num_pending = before.pending.clone(), before.num_pending.tolist()
    complete = []
    for row, total in enumerate(text.num_tokens):
        whole, rest = divmod(total, length) if keep_unfinished else (-(-total // length), 0)
        complete.append(whole)
        if total:
            pending[row, :rest] = text.input_ids[row, total - rest : total]
            num_pending[row] = rest
    return NewMemory(
        memory=memory.detach(),
        num_segments=before.num_segments + torch.tensor(complete, device=device),
        pending=pending,
        num_pending=torch.tensor(num_pending, device=device),
        position=before.position + torch.tensor(text.num_new, device=device),
        position_before=before.position,
        document_start=document_start,
    )


def new_columns(
    text: RowText, step: Step, count: int
) -> tuple[Bool[Tensor, "rows kept"], Int[Tensor, "rows kept"]]:
    """Find the input columns of the last tokens of a step.

    Args:
        text: The text of the pass.
        step: The step.
        count: How many places of each segment; a shorter segment has fewer.

    Returns:
        Which places hold a token that is new, and the input column of each; on the CPU, because
        to ask a GPU is to wait for it.
    """
    lengths = torch.tensor([stop - start for start, stop in step.spans])
    starts = torch.tensor([start for start, _ in step.spans])
    pending = torch.tensor([text.num_pending[row] for row in step.rows])
    first = torch.tensor([text.first_column[row] for row in step.rows])
    places = _last_places(step, count)
    tokens = starts[:, None] + places
    is_new = (places < lengths[:, None]) & (tokens >= pending[:, None])
    # a shorter segment says its first place more than once
    is_new[:, 1:] &= places[:, 1:] > places[:, :-1]
    return is_new, tokens - pending[:, None] + first[:, None]


def kept_columns(text: RowText, step: Step, first_kept: int) -> Int[Tensor, "rows kept"] | None:
    """Name the places of a step that come into the kept columns of the input.

    Args:
        text: The text of the pass.
        step: The step.
        first_kept: First input column that is kept.

    Returns:
        The last places of each segment, as many as the segment with most kept columns has; on the
        CPU. `None` if they are all.
    """
    count = 0
    for row, (start, stop) in zip(step.rows, step.spans, strict=True):
        first_token = first_kept + text.num_pending[row] - text.first_column[row]
        count = max(count, stop - max(start, first_token))
    width = max(stop - start for start, stop in step.spans)
    return _last_places(step, count) if count < width else None


def _last_places(step: Step, count: int) -> Int[Tensor, "rows kept"]:
    """Count the last places of each segment; all from 0 if `count` is the longest's length.

    Returns:
        The places, where a segment with fewer begins with its first more than once.
    """
    lengths = torch.tensor([stop - start for start, stop in step.spans])
    if count == int(lengths.max()):
        return torch.arange(count).expand(len(lengths), -1)
    return (lengths[:, None] - count + torch.arange(count)).clamp(min=0)
