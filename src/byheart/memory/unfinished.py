"""The unfinished segment of each row: which tokens may follow, and where they go."""

from collections.abc import Callable

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from byheart.errors import MemoryStateError
from byheart.memory.dense import overwrite, places
from byheart.memory.layout import MemoryLayout
from byheart.memory.ring import RingCursor
from byheart.memory.store import KeyValues
from byheart.ops import known

_SETTLED = torch.contiguous_format


def each(
    layers: tuple[KeyValues, ...], function: Callable[[Tensor], Tensor]
) -> tuple[KeyValues, ...]:
    """Apply a function to the keys and to the values of all layers.

    Returns:
        Its results.
    """
    return tuple(KeyValues(function(keys), function(values)) for keys, values in layers)


def require_shapes(layers: tuple[KeyValues, ...], layout: MemoryLayout, batch_size: int) -> None:
    """Refuse entries of another batch or model, or of which some are missing.

    Args:
        layers: New entries, per layer.
        layout: The layout of the state.
        batch_size: Rows of the state.

    Raises:
        MemoryStateError: If rows, layers, heads or their width differ, or tokens of the layers do.
    """
    shapes = {tuple(side.shape) for layer in layers for side in layer}
    tokens = max([0, *(shape[2] for shape in shapes)])
    expected = (batch_size, layout.num_kv_heads, tokens, layout.head_dim)
    if len(layers) != layout.num_layers or shapes != {expected}:
        msg = (
            f"New entries must be of {layout.num_layers} layers with (rows, heads, tokens, "
            f"head_dim) = {expected}, got {len(layers)} layers with {sorted(shapes)}. Commit "
            "to the state that was read."
        )
        raise MemoryStateError(msg)


def require_tokens(num_tokens: Int[Tensor, " batch"], width: int, *, is_full: bool) -> None:
    """Refuse counts of new tokens that their columns do not have.

    Args:
        num_tokens: New tokens of each row.
        width: Columns of the new entries.
        is_full: Whether all columns are said to be tokens.

    Raises:
        MemoryStateError: If they differ. Where values are not known, the device checks it.
    """
    least = width if is_full else 0

    def error() -> MemoryStateError:
        return MemoryStateError(
            f"New entries must have between {least} and {width} tokens per row, as many as their "
            f"columns, got {num_tokens.tolist()}. Give commit what the pass has returned."
        )

    fits = (num_tokens >= least) & (num_tokens <= width)
    known.require(fits, error, "new entries must have as many tokens as columns")


def require_continues(
    position: Int[Tensor, " batch"],
    new_position: Int[Tensor, " batch"],
    num_pending: Int[Tensor, " batch"],
    segment_length: int,
) -> None:
    """Refuse entries that do not continue what the rows have read.

    Where values are not known, the device checks it.

    Args:
        position: Tokens that each row has read.
        new_position: Tokens that it had read when the entries were made.
        num_pending: Tokens of its unfinished segment, the new ones included.
        segment_length: Most tokens of a segment.
    """
    continues = new_position == position

    def error() -> MemoryStateError:
        if not bool(continues.all()):
            msg = (
                f"New entries must continue rows that have read {position.tolist()} tokens, "
                f"got entries that follow {new_position.tolist()}. Commit each pass once, to the "
                "state that it read."
            )
        else:
            msg = (
                f"A pass must stay inside a segment of {segment_length} tokens, got rows "
                f"with {num_pending.tolist()}. Use byheart.read_tokens, which cuts at segment ends."
            )
        return MemoryStateError(msg)

    known.require(
        continues & (num_pending <= segment_length),
        error,
        "new entries must continue what the rows have read, inside a segment",
    )


def add_tokens(
    pending: tuple[KeyValues, ...] | None,
    num_pending: Int[Tensor, " batch"],
    new: tuple[KeyValues, ...],
    num_tokens: Int[Tensor, " batch"],
    segment_length: int,
    *,
    is_whole: bool,
) -> tuple[KeyValues, ...]:
    """Put new tokens behind the pending ones, in place where there are any.

    Args:
        pending: Per layer, the tokens of the unfinished segment; `None` if no row has one.
        num_pending: Tokens of each row's unfinished segment.
        new: Per layer, the new tokens.
        num_tokens: New tokens of each row, the first so many columns.
        segment_length: Tokens of a segment.
        is_whole: Whether the new tokens are known to be a whole segment of every row.

    Returns:
        Per layer, the unfinished segment, `segment_length` columns of which the rows use the first
        so many.
    """
    # what is wider than a segment is padding
    width = min(segment_length, new[0].keys.shape[2])
    if is_whole or (
        pending is None
        and width == segment_length
        and known.known_none(num_tokens != segment_length)
    ):
        return each(new, lambda side: side[:, :, :segment_length])
    keep = torch.arange(width, device=num_tokens.device) < num_tokens[:, None]
    if pending is None:

        def first(side: Tensor) -> Tensor:
            kept = torch.where(keep[:, None, :, None], side[:, :, :width], 0)
            return _settled(torch.nn.functional.pad(kept, (0, 0, 0, segment_length - width)))

        return each(new, first)
    # columns that are not kept go round to slots behind the kept ones and are written back
    slots = RingCursor(memory_size=segment_length, num_written=num_pending).claim(keep)
    index = places(slots, new[0].keys.shape[1])
    for target, source in zip(pending, new, strict=True):
        for storage, entries in zip(target, source, strict=True):
            overwrite(storage, entries[:, :, :width], index, keep)
    return pending


def move_into_cache(
    cache: tuple[KeyValues, ...],
    segment: tuple[KeyValues, ...],
    complete: Bool[Tensor, " batch"],
    *,
    is_whole: bool,
) -> tuple[KeyValues, ...]:
    """Move complete segments into the XL cache.

    Args:
        cache: Per layer, the XL cache.
        segment: Per layer, the segments.
        complete: Rows whose segment is complete.
        is_whole: Whether that is known of every row.

    Returns:
        The XL cache: the last columns of [cache ; segment] where complete, the old one elsewhere.
    """
    length = cache[0].keys.shape[2]
    if length == 0 or (not is_whole and known.known_none(complete)):
        return cache
    moves_all = is_whole or known.known_none(~complete)

    def move(old: Tensor, newest: Tensor) -> Tensor:
        newest = newest.to(old.dtype)
        if newest.shape[2] < length:
            newest = torch.cat([old, newest], dim=2)
        newest = newest[:, :, -length:]
        if not moves_all:
            return _settled(torch.where(complete[:, None, None, None], newest, old))
        # what a compiled pass returns may be overwritten by the next one
        return newest if known.values_are_known(newest) else newest.clone(memory_format=_SETTLED)

    return tuple(
        KeyValues(*(move(*sides) for sides in zip(old, newest, strict=True)))
        for old, newest in zip(cache, segment, strict=True)
    )


def _settled(kept: Tensor) -> Tensor:
    """Lay out what is kept as it is in every other step, so that a step is compiled once.

    Returns:
        The tensor; where values are known, as it is.
    """
    return kept if known.values_are_known(kept) else kept.contiguous(memory_format=_SETTLED)
