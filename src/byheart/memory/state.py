"""All memory of a model as one value: XL caches, unfinished segments, kNN rings, positions."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from byheart.memory.dense import Lease
from byheart.memory.layout import MemoryLayout
from byheart.memory.store import KeyValues, MemoryStore
from byheart.memory.stores import MakeStore, empty_stores
from byheart.memory.unfinished import (
    add_tokens,
    each,
    move_into_cache,
    require_continues,
    require_shapes,
    require_tokens,
)
from byheart.ops import known
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
    starts_segment: bool = False
    """Whether every row is known to have begun a segment with the pass."""
    is_full: bool = False
    """Whether every column is known to be a real token of every row."""


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
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
    """Per layer, the tokens of the unfinished segment, oldest first; `None` if it is known that
    there are none."""
    num_pending: Int[Tensor, " batch"]
    """Tokens of the unfinished segment."""
    stores: Mapping[int, MemoryStore]
    """The kNN memory of each memory layer; empty for a memory size of 0."""
    position: Int[Tensor, " batch"]
    """Tokens of its document that each row has read."""
    _lease: Lease = field(default_factory=Lease)

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
        # a tensor each, as later: a compiled step would be made anew for those that are one
        num_cached, num_pending, position = (
            torch.zeros(batch_size, dtype=torch.long, device=device) for _ in range(3)
        )
        shape = (batch_size, layout.num_kv_heads, layout.xl_cache_length, layout.head_dim)
        return cls(
            layout=layout,
            xl_cache=tuple(
                KeyValues(*(torch.zeros(shape, dtype=dtype, device=device) for _ in range(2)))
                for _ in range(layout.num_layers)
            ),
            num_cached=num_cached,
            pending=None,
            num_pending=num_pending,
            position=position,
            stores=empty_stores(layout, batch_size, memory_size, device, make_store),
        )

    @property
    def batch_size(self) -> int:
        """Rows."""
        return self.position.shape[0]

    @property
    def memory_size(self) -> int:
        """Entries per row and head that the kNN memory holds; 0 without one."""
        return next((store.memory_size for store in self.stores.values()), 0)

    def __repr__(self) -> str:
        # not the tensors: they are the whole memory
        parts = [
            f"position={shown(self.position)}",
            f"num_pending={shown(self.num_pending)}",
            f"num_cached={shown(self.num_cached)}",
        ]
        for layer, store in self.stores.items():
            size = f"memory_size={store.memory_size}"
            parts.append(f"layer {layer}: {size}, num_written={shown(store.num_written)}")
        return f"MemoryState({'; '.join(parts)}; {self.position.device})"

    def require_current(self) -> None:
        """Refuse to be read after a newer state was committed.

        Raises:
            MemoryStateError: If this state was used up by `commit`.
        """
        self._lease.require()

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

    def at_segment_start(
        self, document_start: Bool[Tensor, " batch"] | None = None
    ) -> "MemoryState":
        """Take all rows to begin a segment, as those do that always read a whole one.

        The rest of a document is one, too, for a row that then begins another document. A pass
        need not find out then: attention runs in blocks also where values are not known, and shapes
        are the same in every step. Give the result to the pass, and commit to it.

        Args:
            document_start: Rows that begin a new document; `None` for none.

        Returns:
            The state, known to have nothing pending. This one stays usable.

        Raises:
            ValueError: If a row stands inside a segment. Where values are not known, the device
                checks it.
        """
        state = self if document_start is None else self.start_documents(document_start)
        if state.pending is None:
            return state

        def error() -> ValueError:
            return ValueError(
                "Every row must stand at the start of a segment or begin a document, got rows with "
                f"{state.num_pending.tolist()} tokens of an unfinished one. Use the state as it is."
            )

        known.require(state.num_pending == 0, error, "every row must begin a segment")
        return replace(state, pending=None)

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
            ValueError: If they were made from a state whose rows were taken to begin a segment, and
                this one's do not.
            TypeError: If they are not what a pass has made.
        """
        if not isinstance(new, NewEntries):
            msg = f"commit takes out.new_entries of a pass, got {type(new).__name__}."
            raise TypeError(msg)
        state, num_pending = self._continued_by(new)
        lease = self._lease.pass_on()
        after, segment = state._moved_on(state.pending, new, num_pending)
        complete = num_pending == self.layout.segment_length
        writes = state._is_whole(new) or not known.known_none(complete)
        stores = state._write_stores(segment, complete) if writes else state.stores
        return replace(after, stores=stores, _lease=lease)

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
        pending = state.pending and each(state.pending, torch.clone)
        return state._moved_on(pending, new, num_pending)[0]

    def _continued_by(self, new: NewEntries) -> tuple["MemoryState", Int[Tensor, " batch"]]:
        """Return the state that a pass has read, and the tokens of each unfinished segment now."""
        self.require_current()
        require_shapes(new.layers, self.layout, self.batch_size)
        state = self.start_documents(new.document_start)
        num_pending = state.num_pending + new.num_tokens
        require_tokens(new.num_tokens, new.layers[0].keys.shape[2], is_full=new.is_full)
        require_continues(state.position, new.position, num_pending, self.layout.segment_length)
        return state.at_segment_start() if new.starts_segment else state, num_pending

    def _is_whole(self, new: NewEntries) -> bool:
        """Tell whether a pass is known, without asking, to have read a segment of every row.

        Returns:
            `False` also where it is not known.
        """
        width, length = new.layers[0].keys.shape[2], self.layout.segment_length
        return self.pending is None and new.is_full and width == length

    def _moved_on(
        self,
        pending: tuple[KeyValues, ...] | None,
        new: NewEntries,
        num_pending: Int[Tensor, " batch"],
    ) -> tuple["MemoryState", tuple[KeyValues, ...]]:
        """Add new tokens, in place of the pending ones given, and cache what is complete.

        Returns:
            The state after them, its stores as they are, and the segments.
        """
        length, is_whole = self.layout.segment_length, self._is_whole(new)
        segment = add_tokens(
            pending, self.num_pending, new.layers, new.num_tokens, length, is_whole=is_whole
        )
        complete = num_pending == length
        leaves_none = is_whole or known.known_none((num_pending > 0) & ~complete)
        cached = (self.num_cached + length).clamp(max=self.layout.xl_cache_length)
        after = replace(
            self,
            xl_cache=move_into_cache(self.xl_cache, segment, complete, is_whole=is_whole),
            num_cached=torch.where(complete, cached, self.num_cached),
            pending=None if leaves_none else segment,
            num_pending=torch.where(complete, 0, num_pending),
            position=self.position + num_pending - self.num_pending,
        )
        return after, segment

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
            xl_cache=each(self.xl_cache, lambda side: side[row_ids]),
            pending=self.pending and each(self.pending, lambda side: side[row_ids]),
            num_cached=self.num_cached[row_ids],
            num_pending=self.num_pending[row_ids],
            position=self.position[row_ids],
            stores={layer: store.select_rows(row_ids) for layer, store in self.stores.items()},
            _lease=Lease(),
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
            xl_cache=each(self.xl_cache, lambda side: side.to(device)),
            pending=self.pending and each(self.pending, lambda side: side.to(device)),
            num_cached=self.num_cached.to(device),
            num_pending=self.num_pending.to(device),
            position=self.position.to(device),
            stores={layer: store.to(device) for layer, store in self.stores.items()},
            _lease=Lease(),
        )


_SHOWN_ROWS = 8


def shown(numbers: Int[Tensor, " batch"]) -> str:
    """Write one number per row, of the first few rows.

    Returns:
        Such as "[3, 0]".
    """
    if numbers.is_meta:
        return f"[{len(numbers)} rows without values]"
    first = ", ".join(map(str, numbers[:_SHOWN_ROWS].tolist()))
    return f"[{first}{', ...' if len(numbers) > _SHOWN_ROWS else ''}]"
