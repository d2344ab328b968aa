"""All memory of a model as one value: XL caches, unfinished segments, kNN rings, positions."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from byheart.errors import MemoryStateError
from byheart.memory.dense import Lease, overwrite
from byheart.memory.layout import MemoryLayout
from byheart.memory.ring import RingCursor, known_none
from byheart.memory.store import KeyValues, MemoryStore
from byheart.memory.stores import MakeStore, empty_stores
from byheart.ops.norms import unit_length


@dataclass(frozen=True, kw_only=True, eq=False)
class NewEntries:
    """What one forward pass adds to memory; given to `MemoryState.commit`."""

    layers: tuple[KeyValues, ...]
    """Keys and values of the pass, per layer, detached."""
    num_tokens: Int[Tensor, " batch"]
    """Real tokens of each row: the first so many columns."""
    document_start: Bool[Tensor, " batch"]
    """Rows that began a document with this pass."""
    position: Int[Tensor, " batch"]
    """Tokens of its document that each row had read before the pass."""


@dataclass(frozen=True, kw_only=True, eq=False)
class MemoryState:
    """Everything a model remembers, per row.

    A row's document is cut into segments of `layout.segment_length` tokens. The tokens of the
    unfinished segment are *pending*; when it is complete it becomes the XL cache and enters the
    kNN memory. So it does not matter in which pieces a document is given.

    A state is a value. `commit` returns the next one and uses up the one it was called on, because
    large rings are written in place; `fork` makes an independent copy.
    """

    layout: MemoryLayout
    xl_cache: tuple[KeyValues, ...]
    """Per layer, the tokens before the unfinished segment: `[batch, kv_heads, xl_cache_length,
    head_dim]`, newest last."""
    num_cached: Int[Tensor, " batch"]
    """Tokens in the XL cache; they are its last columns."""
    pending: tuple[KeyValues, ...] | None
    """Per layer, the tokens of the unfinished segment, oldest first; `None` if there are none."""
    num_pending: Int[Tensor, " batch"]
    """Tokens of the unfinished segment."""
    stores: Mapping[int, MemoryStore]
    """The kNN memory of each memory layer; empty for a memory size of 0."""
    position: Int[Tensor, " batch"]
    """Tokens of its document that each row has read."""
    _lease: Lease = field(default_factory=Lease)
    _turn: int = 0

    @classmethod
    def empty(
        cls,
        layout: MemoryLayout,
        batch_size: int,
        *,
        memory_size: int | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | None = None,
        make_store: MakeStore | None = None,
    ) -> "MemoryState":
        """Make a state in which no row has read anything.

        Args:
            layout: The model's layout.
            batch_size: Rows.
            memory_size: Entries per row and head if not the layout's; 0 switches the kNN memory
                off.
            dtype: Precision of the XL caches; the kNN memory's is part of the layout.
            device: Where the state lives.
            make_store: Builds the store of a memory layer, for stores of your own; `None` for the
                store that the layout names.

        Returns:
            The empty state.

        Raises:
            ValueError: If `batch_size` or `memory_size` is out of range.
        """
        if batch_size < 1:
            msg = f"batch_size must be at least 1, got {batch_size}."
            raise ValueError(msg)
        zeros = torch.zeros(batch_size, dtype=torch.long, device=device)
        shape = (batch_size, layout.num_kv_heads, layout.xl_cache_length, layout.head_dim)
        return cls(
            layout=layout,
            xl_cache=tuple(
                KeyValues(*(torch.zeros(shape, dtype=dtype, device=device) for _ in range(2)))
                for _ in range(layout.num_layers)
            ),
            num_cached=zeros,
            pending=None,
            num_pending=zeros,
            stores=empty_stores(layout, batch_size, memory_size, device, make_store),
            position=zeros,
        )

    @property
    def batch_size(self) -> int:
        """Rows."""
        return self.position.shape[0]

    @property
    def memory_size(self) -> int:
        """Entries per row and head that the kNN memory holds; 0 without one."""
        return next((store.memory_size for store in self.stores.values()), 0)

    def require_current(self) -> None:
        """Refuse to be read after a newer state was committed.

        Raises:
            MemoryStateError: If this state was used up by `commit`.
        """
        self._lease.require(self._turn)

    def start_documents(self, row_mask: Bool[Tensor, " batch"]) -> "MemoryState":
        """Forget everything about the rows that start a document.

        Only counters change, so this state stays usable.

        Returns:
            The state in which those rows have read nothing.
        """
        return replace(
            self,
            num_cached=self.num_cached.masked_fill(row_mask, 0),
            num_pending=self.num_pending.masked_fill(row_mask, 0),
            position=self.position.masked_fill(row_mask, 0),
            stores={layer: store.reset(row_mask) for layer, store in self.stores.items()},
        )

    def without_xl_cache(self) -> "MemoryState":
        """Hide the tokens of the XL cache from a forward pass.

        To measure what the XL cache is worth, give the result to the forward pass and commit to
        this state: what enters the kNN memory, and when, stays as it was. With `write="evicted"`
        the hidden tokens are then seen nowhere, because they have not entered the memory yet.

        Only counters change, so this state stays usable.

        Returns:
            The state in which the XL cache of every row is empty.
        """
        return replace(self, num_cached=torch.zeros_like(self.num_cached))

    @torch.no_grad()
    def commit(self, new: NewEntries) -> "MemoryState":
        """Add what a forward pass has read. Call it after backward.

        Args:
            new: `out.new_entries` of the pass that read this state.

        Returns:
            The next state; this one is used up.

        Raises:
            MemoryStateError: If the entries are of another shape, were made from another state, or
                cross the end of a segment. The state is then as it was.
        """
        state, num_pending = self._continued_by(new)
        turn = self._lease.take_turn(self._turn)
        segment = _add_to_segment(state.pending, state, new)
        complete = num_pending == self.layout.segment_length
        stores = state.stores if known_none(complete) else state._write_stores(segment, complete)
        return replace(state._moved_on(segment, num_pending), stores=stores, _turn=turn)

    @torch.no_grad()
    def read_on(self, new: NewEntries) -> "MemoryState":
        """Move on to what follows, with the kNN memory as it is.

        For a pass over several segments, whose entries are committed when it is over.

        Args:
            new: `out.new_entries` of the pass that read this state.

        Returns:
            The state after it, without its entries in the kNN memory. This one stays usable; a
            commit to either uses up both.
        """
        state, num_pending = self._continued_by(new)
        # tokens are put behind the pending ones in place
        pending = state.pending and _each(state.pending, torch.clone)
        return state._moved_on(_add_to_segment(pending, state, new), num_pending)

    def _continued_by(self, new: NewEntries) -> tuple["MemoryState", Int[Tensor, " batch"]]:
        """Return the state that a pass has read, and the tokens of each unfinished segment now."""
        self.require_current()
        _check_shapes(self, new)
        state = self.start_documents(new.document_start)
        num_pending = state.num_pending + new.num_tokens
        _check_continues(state, new, num_pending)
        return state, num_pending

    def _moved_on(
        self, segment: tuple[KeyValues, ...], num_pending: Int[Tensor, " batch"]
    ) -> "MemoryState":
        """Return the state with complete segments in its XL cache, and its stores as they are."""
        segment_length = self.layout.segment_length
        complete = num_pending == segment_length
        any_pending = bool((num_pending * ~complete).any())
        cached = (self.num_cached + segment_length).clamp(max=self.layout.xl_cache_length)
        return replace(
            self,
            xl_cache=tuple(
                _shift(*sides, complete) for sides in zip(self.xl_cache, segment, strict=True)
            ),
            num_cached=torch.where(complete, cached, self.num_cached),
            pending=segment if any_pending else None,
            num_pending=torch.where(complete, 0, num_pending),
            position=self.position + num_pending - self.num_pending,
        )

    def _write_stores(
        self, segment: tuple[KeyValues, ...], complete: Bool[Tensor, " batch"]
    ) -> dict[int, MemoryStore]:
        """Write the complete segments, or what they push out of the XL cache; none costs as much.

        Returns:
            The stores after the write.
        """
        knn = self.layout.knn_memory
        written = {}
        for layer, store in self.stores.items():
            entries, keep = segment[layer], complete[:, None]
            if knn is not None and knn.write == "evicted":
                old = self.xl_cache[layer]
                length = self.layout.segment_length
                # of [cache ; segment] the last xl_cache_length stay: the first segment_length leave
                entries = KeyValues(
                    *(
                        torch.cat(sides, dim=2)[:, :, :length]
                        for sides in zip(old, entries, strict=True)
                    )
                )
                columns = torch.arange(length, device=complete.device)
                keep = keep & (columns >= self.layout.xl_cache_length - self.num_cached[:, None])
            if self.layout.unit_keys:
                entries = entries._replace(keys=unit_length(entries.keys))
            keep = keep.expand(-1, entries.keys.shape[2])
            written[layer] = store.append(entries.keys, entries.values, keep)
        return written

    def select_rows(self, row_ids: Int[Tensor, " rows"]) -> "MemoryState":
        """Copy the named rows, in that order; a row may be named more than once (beams, samples).

        Returns:
            A state of its own.
        """
        self.require_current()
        return replace(
            self,
            xl_cache=_each(self.xl_cache, lambda side: side[row_ids]),
            pending=self.pending and _each(self.pending, lambda side: side[row_ids]),
            num_cached=self.num_cached[row_ids],
            num_pending=self.num_pending[row_ids],
            position=self.position[row_ids],
            stores={layer: store.select_rows(row_ids) for layer, store in self.stores.items()},
            _lease=Lease(),
            _turn=0,
        )

    def fork(self) -> "MemoryState":
        """Copy the state; nothing is shared.

        Returns:
            A state that can go its own way.
        """
        return self.select_rows(torch.arange(self.batch_size, device=self.position.device))

    def to(self, device: torch.device | str) -> "MemoryState":
        """Move the state.

        Returns:
            A state of its own on `device`; this one if it is there already.
        """
        self.require_current()
        device = torch.empty(0, device=device).device
        if device == self.position.device:
            return self
        return replace(
            self,
            xl_cache=_each(self.xl_cache, lambda side: side.to(device)),
            pending=self.pending and _each(self.pending, lambda side: side.to(device)),
            num_cached=self.num_cached.to(device),
            num_pending=self.num_pending.to(device),
            position=self.position.to(device),
            stores={layer: store.to(device) for layer, store in self.stores.items()},
            _lease=Lease(),
            _turn=0,
        )


def _each(
    layers: tuple[KeyValues, ...], function: Callable[[Tensor], Tensor]
) -> tuple[KeyValues, ...]:
    return tuple(KeyValues(function(keys), function(values)) for keys, values in layers)


def _check_shapes(state: MemoryState, new: NewEntries) -> None:
    """Refuse entries of another batch or model, or of which some are missing.

    Raises:
        MemoryStateError: If rows, layers, heads or their width differ, or tokens of the layers do.
    """
    layout, shapes = state.layout, {tuple(side.shape) for layer in new.layers for side in layer}
    tokens = max((shape[2] for shape in shapes), default=0)
    expected = (state.batch_size, layout.num_kv_heads, tokens, layout.head_dim)
    if len(new.layers) != layout.num_layers or shapes != {expected}:
        msg = (
            f"New entries must be of {layout.num_layers} layers with (rows, heads, tokens, "
            f"head_dim) = {expected}, got {len(new.layers)} layers with {sorted(shapes)}. Commit "
            "to the state that was read."
        )
        raise MemoryStateError(msg)


def _check_continues(state: MemoryState, new: NewEntries, num_pending: Tensor) -> None:
    """Refuse entries that do not continue what the rows have read.

    Raises:
        MemoryStateError: If they follow something else, or cross the end of a segment.
    """
    layout = state.layout
    continues = new.position == state.position
    if not bool((continues & (num_pending <= layout.segment_length)).all()):
        if not bool(continues.all()):
            msg = (
                f"New entries must continue rows that have read {state.position.tolist()} tokens, "
                f"got entries that follow {new.position.tolist()}. Commit each pass once, to the "
                "state that it read."
            )
        else:
            msg = (
                f"A pass must stay inside a segment of {layout.segment_length} tokens, got rows "
                f"with {num_pending.tolist()}. Use byheart.read_tokens, which cuts at segment ends."
            )
        raise MemoryStateError(msg)


def _add_to_segment(
    old: tuple[KeyValues, ...] | None, state: MemoryState, new: NewEntries
) -> tuple[KeyValues, ...]:
    """Put new tokens behind the pending ones, in place where there are any.

    Returns:
        Per layer, the unfinished segment, `segment_length` columns of which the rows use the first
        so many.
    """
    length = state.layout.segment_length
    width = min(length, new.layers[0].keys.shape[2])
    if old is None and width == length and bool((new.num_tokens == length).all()):
        return _each(new.layers, lambda side: side[:, :, :length])
    columns = torch.arange(width, device=new.num_tokens.device)
    keep = columns < new.num_tokens[:, None]
    # columns that are not kept go round to slots behind the kept ones and are written back
    slots = RingCursor(memory_size=length, num_written=state.num_pending).claim(keep)
    if old is None:
        old = _each(
            new.layers, lambda side: side.new_zeros((*side.shape[:2], length, side.shape[3]))
        )
    for target, source in zip(old, new.layers, strict=True):
        for storage, entries in zip(target, source, strict=True):
            # what is wider than a segment is padding
            overwrite(storage, entries[:, :, :width], slots, keep)
    return old


def _shift(old: KeyValues, segment: KeyValues, complete: Bool[Tensor, " batch"]) -> KeyValues:
    """Move the complete segments of a layer into its XL cache.

    Returns:
        The XL cache: the last columns of [cache ; segment] where complete, the old one elsewhere.
    """
    length = old.keys.shape[2]
    if length == 0 or not bool(complete.any()):
        return old

    def shift(cache: Tensor, newest: Tensor) -> Tensor:
        newest = newest.to(cache.dtype)
        if newest.shape[2] < length:
            newest = torch.cat([cache, newest], dim=2)
        newest = newest[:, :, -length:]
        return (
            newest
            if bool(complete.all())
            else torch.where(complete[:, None, None, None], newest, cache)
        )

    return KeyValues(*(shift(*sides) for sides in zip(old, segment, strict=True)))
