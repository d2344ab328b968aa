"""Put memory, special tokens and text of a segment into one window of the model."""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from byheart.models.recurrent_config import RecurrentMemoryConfig


@dataclass(frozen=True, kw_only=True, eq=False)
class Window:
    """The input of one segment step.

    Encoders see `[start ; memory ; separator ; text ; end]`, decoders `[memory ; text ; memory]`,
    of which the first is read and the output of the second is the next memory. What follows is
    padding: a row's window does not depend on the others.
    """

    embeddings: Float[Tensor, "rows window embed_dim"]
    """What the model reads."""
    mask: Bool[Tensor, "rows window"] | None
    """Real positions, the first so many; `None` if all are."""
    text_start: int
    """Column of the first text token."""
    write_columns: Int[Tensor, "rows memory"] | None
    """Columns of the write memory of decoders; `None` for `memory_start ... + memory`."""
    memory_start: int
    """Column of the first memory token that is read."""
    complete: Bool[Tensor, " rows"] | None = None
    """Rows whose segment is complete; `None` for all. The others are read again with what
    follows."""

    @property
    def num_tokens(self) -> Int[Tensor, " rows"] | None:
        """Real positions of each row; `None` if all are."""
        return None if self.mask is None else self.mask.sum(dim=1)


def build_window(
    config: RecurrentMemoryConfig,
    embed: nn.Module,
    memory: Float[Tensor, "rows memory embed_dim"],
    input_ids: Int[Tensor, "rows text"],
    num_tokens: Int[Tensor, " rows"] | None,
    *,
    writes: bool,
    complete: Bool[Tensor, " rows"] | None = None,
) -> Window:
    """Lay out a segment.

    Args:
        config: Memory and special tokens.
        embed: The model's input embedding.
        memory: Memory of each row.
        input_ids: Text of each row.
        num_tokens: Text tokens of each row, the first so many columns; `None` for all. A row
            without text is all padding.
        writes: Whether the memory stands behind the text again (decoders).
        complete: Rows whose segment is complete; `None` for all.

    Returns:
        The window.
    """
    text_length, device = input_ids.shape[1], input_ids.device
    start = len(config.start_ids) + config.num_memory_tokens + len(config.separator_ids)
    tail, mask = input_ids, None
    if config.end_ids:
        tail = _append(input_ids, num_tokens, config.end_ids)
    before = _special(config.start_ids, input_ids)
    between = _special(config.separator_ids, input_ids)
    embedded = embed(torch.cat([before, between, tail], dim=1))
    memory = memory.to(embedded.dtype)
    num_before = before.shape[1]
    parts = [embedded[:, :num_before], memory, embedded[:, num_before:]]
    write_columns = None
    if writes:
        parts.append(memory)
        columns = torch.arange(config.num_memory_tokens, device=device)
        ends = torch.full((len(input_ids),), text_length, device=device)
        write_columns = start + (ends if num_tokens is None else num_tokens)[:, None] + columns
    embeddings = torch.cat([part for part in parts if part.shape[1]], dim=1)
    if num_tokens is not None:
        extra = len(config.end_ids) + (config.num_memory_tokens if writes else 0)
        positions = torch.arange(embeddings.shape[1], device=device)
        used = torch.where(num_tokens > 0, start + num_tokens + extra, 0)
        mask = positions < used[:, None]
        if writes:
            embeddings = _move_behind_text(
                embeddings, start + text_length, start + num_tokens, positions
            )
    return Window(
        embeddings=embeddings,
        mask=mask,
        text_start=start,
        write_columns=write_columns,
        memory_start=num_before,
        complete=complete,
    )


def _special(ids: tuple[int, ...], like: Tensor) -> Int[Tensor, "rows ids"]:
    # filled in place: to copy them to a GPU would wait for all that it has to do
    special = like.new_empty(len(like), len(ids))
    for column, token in enumerate(ids):
        special[:, column] = token
    return special


def _append(
    input_ids: Tensor, num_tokens: Tensor | None, ids: tuple[int, ...]
) -> Int[Tensor, "rows text"]:
    """Put special tokens directly behind the text of each row.

    Returns:
        Text and special tokens.
    """
    extra = _special(ids, input_ids)
    if num_tokens is None:
        return torch.cat([input_ids, extra], dim=1)
    padded = torch.cat([input_ids, torch.zeros_like(extra)], dim=1)
    columns = num_tokens[:, None] + torch.arange(len(ids), device=input_ids.device)
    return padded.scatter(1, columns, extra)


def _move_behind_text(
    embeddings: Tensor, padded_end: int, ends: Tensor, positions: Tensor
) -> Tensor:
    """Move the write memory from behind the padding to behind the text of each row.

    Returns:
        The embeddings, padding last.
    """
    gap = padded_end - ends[:, None]
    source = torch.where(positions < ends[:, None], positions, positions + gap)
    source = source.clamp(max=embeddings.shape[1] - 1)
    return embeddings.gather(1, source[..., None].expand(-1, -1, embeddings.shape[2]))
