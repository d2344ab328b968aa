"""Read tokens in pieces of any size: the cuts at segment ends are made here."""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from byheart.memory.state import MemoryState
from byheart.models.arguments import require_arguments
from byheart.models.decoder import require_columns
from byheart.models.segment_model import SegmentModel
from byheart.ops import known


class ReadResult(NamedTuple):
    """What reading a piece of each row's document gives."""

    state: MemoryState
    """The state after the tokens."""
    last_logits: Float[Tensor, "batch vocab"]
    """Scores of the token after each row's last one, float32; zeros for rows without a token."""
    logits: Float[Tensor, "batch query vocab"] | None
    """Scores after every token, if asked for; zeros in the columns behind `num_tokens`."""


@torch.no_grad()
def read_tokens(
    model: SegmentModel,
    input_ids: Int[Tensor, "batch query"],
    state: MemoryState,
    *,
    num_tokens: Int[Tensor, " batch"] | None = None,
    document_start: Bool[Tensor, " batch"] | None = None,
    return_logits: bool = False,
) -> ReadResult:
    """Read any number of tokens per row into memory, without a gradient.

    It does not matter how a document is cut into calls, or what the other rows do. A device is
    asked for values once in a call, and not at all for a single column, or where the state is known
    to have nothing pending and all columns are read.

    Args:
        model: A `Decoder`, or a pretrained model with memory.
        input_ids: The next tokens of each row.
        state: What the rows have read; it is used up.
        num_tokens: Real tokens of each row, the first so many columns; `None` for all.
        document_start: Rows that begin a new document with the first column; `None` for none, as in
            `forward` of the models.
        return_logits: Whether to return the scores after every token.

    Returns:
        The state after the tokens, and the scores.

    Raises:
        ValueError: If a document would be longer than the model can tell apart; nothing is read
            then. Of a single column on a device, the device checks it.
    """
    words = len(model.input_embedding().weight)
    require_arguments(
        input_ids, words, least=0, document_start=document_start, num_tokens=num_tokens
    )
    batch, width = input_ids.shape
    device = input_ids.device
    left = num_tokens if num_tokens is not None else torch.full((batch,), width, device=device)
    if num_tokens is not None:
        require_columns(left, width)
    vocab = model.vocab_size
    last_logits = torch.zeros(batch, vocab, device=device)
    # the last place takes the scores of columns that are no tokens
    logits = torch.zeros(batch * width + 1, vocab, device=device) if return_logits else None
    row_ids = torch.arange(batch, device=device)
    done = torch.zeros(batch, dtype=torch.long, device=device)
    if document_start is not None:
        state = state.start_documents(document_start)
    # a single column is one of many steps, which wait for nothing
    model.require_room(state, left, waits=width > 1)
    is_full = num_tokens is None and state.pending is None
    for size, starts_segment in _passes(model, state, left, width, is_full=is_full):
        if starts_segment:
            state = state.at_segment_start()
        room = model.memory_layout.segment_length - state.num_pending
        take = torch.minimum(left, room)
        columns = torch.arange(size, device=device)
        at = (done[:, None] + columns).clamp(max=width - 1)
        out = model(input_ids.gather(1, at), state=state, num_tokens=None if is_full else take)
        assert out.logits is not None
        scores = out.logits.float()
        if logits is not None:
            logits[
                torch.where(columns < take[:, None], row_ids[:, None] * width + at, batch * width)
            ] = scores
        reads = take > 0
        last = scores[row_ids, (take - 1).clamp(min=0)]
        last_logits = torch.where(reads[:, None], last, last_logits)
        state = state.commit(out.new_entries)
        done, left = done + take, left - take
    if logits is not None:
        logits = logits[:-1].view(batch, width, vocab)
    return ReadResult(state, last_logits, logits)


def _passes(
    model: SegmentModel, state: MemoryState, left: Tensor, width: int, *, is_full: bool
) -> list[tuple[int, bool]]:
    """Cut what is to be read at the ends of segments, asking a device for values at most once.

    Returns:
        Columns of each pass, and whether it is known that every row begins a segment with it.
    """
    length = model.memory_layout.segment_length
    if is_full:
        return [(min(length, width - start), True) for start in range(0, width, length)]
    if width == 1 and not known.values_are_known(left):
        # there is room for a token: complete segments are in memory already
        return [(1, False)]
    passes = []
    rows = torch.stack([left, length - state.num_pending]).tolist()
    counts, rooms = rows[0], rows[1]
    while max(counts) > 0:
        takes = [min(pair) for pair in zip(counts, rooms, strict=True)]
        passes.append((max(takes), all(room == length for room in rooms)))
        counts = [count - take for count, take in zip(counts, takes, strict=True)]
        rooms = [room - take or length for room, take in zip(rooms, takes, strict=True)]
    return passes
