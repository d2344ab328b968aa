"""Read tokens in pieces of any size: the cuts at segment ends are made here."""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from byheart.memory.state import MemoryState
from byheart.models.decoder import require_columns
from byheart.models.segment_model import SegmentModel


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

    It does not matter how a document is cut into calls, or what the other rows do.

    Args:
        model: A `Decoder`, or a pretrained model with memory.
        input_ids: The next tokens of each row.
        state: What the rows have read; it is used up.
        num_tokens: Real tokens of each row, the first so many columns; `None` for all.
        document_start: Rows that begin a new document with the first column.
        return_logits: Whether to return the scores after every token.

    Returns:
        The state after the tokens, and the scores.
    """
    batch, width = input_ids.shape
    device = input_ids.device
    left = num_tokens if num_tokens is not None else torch.full((batch,), width, device=device)
    require_columns(left, width)
    vocab = model.vocab_size
    last_logits = torch.zeros(batch, vocab, device=device)
    logits = torch.zeros(batch, width, vocab, device=device) if return_logits else None
    done = torch.zeros(batch, dtype=torch.long, device=device)
    if document_start is not None:
        state = state.start_documents(document_start)
    while bool((left > 0).any()):
        room = model.memory_layout.segment_length - state.num_pending
        take = torch.minimum(left, room)
        columns = torch.arange(int(take.max()), device=device)
        at = (done[:, None] + columns).clamp(max=width - 1)
        out = model(input_ids.gather(1, at), state=state, num_tokens=take)
        assert out.logits is not None
        scores = out.logits.float()
        rows, offsets = (columns < take[:, None]).nonzero(as_tuple=True)
        if logits is not None:
            logits[rows, at[rows, offsets]] = scores[rows, offsets]
        reads = take > 0
        last = scores[torch.arange(batch, device=device), (take - 1).clamp(min=0)]
        last_logits = torch.where(reads[:, None], last, last_logits)
        state = state.commit(out.new_entries)
        done, left = done + take, left - take
    return ReadResult(state, last_logits, logits)
