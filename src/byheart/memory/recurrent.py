"""Recurrent memory as a value: what a row has read, in a few vectors."""

from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from byheart.config import from_dict
from byheart.errors import MemoryStateError
from byheart.memory.files import load_directory, require_format, save_directory
from byheart.memory.layout import MemoryLayout
from byheart.memory.persistence import state_from_tensors, state_tensors
from byheart.memory.state import MemoryState, NewEntries, shown

FORMAT = "byheart-recurrent-state"
FORMAT_VERSION = 1
_INNER = "inner."


@dataclass(frozen=True, kw_only=True, slots=True)
class RecurrentLayout:
    """What a `RecurrentState` is made for; derived from model and config."""

    num_memory_tokens: int
    """Vectors that are passed on."""
    embed_dim: int
    """Numbers of a vector."""
    segment_length: int
    """Text tokens after which a segment is complete."""
    inner: MemoryLayout | None = None
    """The model's own memory: XL cache and kNN memory; `None` for models without one."""

    def require_same(self, other: "RecurrentLayout", what: str) -> None:
        """Refuse a state that was made for another model.

        Args:
            other: The layout that was met.
            what: What `other` describes, for the message.

        Raises:
            MemoryStateError: If a number differs.
        """
        mine, theirs = self._numbers(), other._numbers()
        differing = [name for name in mine if mine[name] != theirs[name]]
        if differing:
            listed = ", ".join(f"{name} {theirs[name]} (not {mine[name]})" for name in differing)
            msg = (
                f"{what} was made for another model: it has {listed}. "
                "Start with new_state() of this model, or load the model that made it."
            )
            raise MemoryStateError(msg)
        if self.inner is not None and other.inner is not None:
            self.inner.require_same(other.inner, what)

    def _numbers(self) -> dict[str, object]:
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {**values, "inner": "none" if self.inner is None else "XL cache or kNN memory"}


@dataclass(frozen=True, kw_only=True, eq=False)
class NewMemory:
    """What one forward pass makes of the memory; given to `RecurrentState.commit`."""

    memory: Float[Tensor, "batch memory embed_dim"]
    """Memory after the last complete segment of each row, detached."""
    num_segments: Int[Tensor, " batch"]
    """Complete segments of its document that each row has read after the pass."""
    pending: Int[Tensor, "batch segment"]
    """Tokens of the unfinished segment, the first `num_pending` columns."""
    num_pending: Int[Tensor, " batch"]
    """Tokens of the unfinished segment."""
    position: Int[Tensor, " batch"]
    """Tokens of its document that each row has read after the pass."""
    position_before: Int[Tensor, " batch"]
    """Tokens of its document that each row had read before the pass."""
    document_start: Bool[Tensor, " batch"]
    """Rows that began a document with this pass."""
    inner: MemoryState | None = None
    """The model's own memory after the pass, with the kNN memory as it was before."""
    inner_entries: tuple[NewEntries, ...] = ()
    """What enters the kNN memory, one for each complete segment; empty without one."""


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class RecurrentState:
    """Everything a model with recurrent memory remembers, per row.

    Only complete segments change the memory. The tokens of the unfinished one are *pending* and
    read again with those that follow, so it does not matter in which pieces a document is given.

    A state is a value: nothing changes it, and it may be read any number of times. Only with a kNN
    memory inside does `commit` use up the one it was called on, see `MemoryState`.
    """

    layout: RecurrentLayout
    memory: Float[Tensor, "batch memory embed_dim"]
    """Memory of each row, float32; of no meaning for rows with `num_segments` 0, which start from
    the model's learned vectors."""
    num_segments: Int[Tensor, " batch"]
    """Complete segments of its document that each row has read."""
    pending: Int[Tensor, "batch segment"]
    """Tokens of the unfinished segment, the first `num_pending` columns."""
    num_pending: Int[Tensor, " batch"]
    """Tokens of the unfinished segment."""
    position: Int[Tensor, " batch"]
    """Tokens of its document that each row has read."""
    inner: MemoryState | None = None
    """The model's own memory of the complete segments, memory tokens included; `None` for models
    without one."""

    @classmethod
    def empty(
        cls,
        layout: RecurrentLayout,
        batch_size: int,
        *,
        device: torch.device | None = None,
        cache_dtype: torch.dtype = torch.float32,
    ) -> "RecurrentState":
        """Make a state in which no row has read anything.

        Args:
            layout: The model's layout.
            batch_size: Rows.
            device: Where the state lives.
            cache_dtype: Precision of the model's XL caches.

        Returns:
            The empty state.

        Raises:
            ValueError: If `batch_size` is below 1.
        """
        if batch_size < 1:
            msg = f"batch_size must be at least 1, got {batch_size}."
            raise ValueError(msg)
        zeros = torch.zeros(batch_size, dtype=torch.long, device=device)
        inner = None
        if layout.inner is not None:
            inner = MemoryState.empty(layout.inner, batch_size, dtype=cache_dtype, device=device)
        return cls(
            layout=layout,
            memory=torch.zeros(
                batch_size, layout.num_memory_tokens, layout.embed_dim, device=device
            ),
            num_segments=zeros,
            pending=torch.zeros(batch_size, layout.segment_length, dtype=torch.long, device=device),
            num_pending=zeros,
            position=zeros,
            inner=inner,
        )

    @property
    def batch_size(self) -> int:
        """Rows."""
        return self.position.shape[0]

    def __repr__(self) -> str:
        parts = [
            f"position={shown(self.position)}",
            f"num_segments={shown(self.num_segments)}",
            f"num_pending={shown(self.num_pending)}",
        ]
        if self.inner is not None:
            parts.append(f"inner={self.inner!r}")
        return f"RecurrentState({'; '.join(parts)}; {self.position.device})"

    def start_documents(self, row_mask: Bool[Tensor, " batch"]) -> "RecurrentState":
        """Forget everything about the rows that start a document.

        Args:
            row_mask: Those rows.

        Returns:
            The state in which those rows have read nothing.

        Raises:
            TypeError: If the mask is no tensor.
            ValueError: If the mask is not about the rows of the state.
        """
        if not isinstance(row_mask, Tensor):
            msg = f"document_start must be a tensor of booleans, got {type(row_mask).__name__}."
            raise TypeError(msg)
        if row_mask.shape != self.position.shape or row_mask.dtype != torch.bool:
            msg = (
                f"document_start must have one boolean per row, {list(self.position.shape)}, got "
                f"{list(row_mask.shape)} of {row_mask.dtype}."
            )
            raise ValueError(msg)
        return replace(
            self,
            num_segments=self.num_segments.masked_fill(row_mask, 0),
            num_pending=self.num_pending.masked_fill(row_mask, 0),
            position=self.position.masked_fill(row_mask, 0),
            inner=self.inner and self.inner.start_documents(row_mask),
        )

    def commit(self, new: NewMemory) -> "RecurrentState":
        """Take over what a forward pass has made of the memory.

        Args:
            new: `out.new_entries` of the pass that read this state.

        Returns:
            The next state; with a kNN memory inside, this one is used up.

        Raises:
            MemoryStateError: If the pass has read another state.
            TypeError: If it is not what a pass has made.
        """
        if not isinstance(new, NewMemory):
            msg = f"commit takes out.new_entries of a pass, got {type(new).__name__}."
            raise TypeError(msg)
        fits = new.memory.shape == self.memory.shape and new.pending.shape == self.pending.shape
        before = self.start_documents(new.document_start) if fits else self
        if not fits or not torch.equal(new.position_before, before.position):
            msg = (
                f"A new memory must continue rows of {list(self.memory.shape)} numbers that have "
                f"read {before.position.tolist()} tokens, got {list(new.memory.shape)} and "
                f"{new.position_before.tolist()}. Commit each pass once, to the state that it read."
            )
            raise MemoryStateError(msg)
        inner = before._inner_after(new)
        return replace(
            self,
            memory=new.memory,
            num_segments=new.num_segments,
            pending=new.pending,
            num_pending=new.num_pending,
            position=new.position,
            inner=inner,
        )

    def _inner_after(self, new: NewMemory) -> MemoryState | None:
        """Return the model's own memory after a pass, the kNN memory written."""
        made = replace(self.layout, inner=None if new.inner is None else new.inner.layout)
        self.layout.require_same(made, "The new memory")
        if self.inner is None or not new.inner_entries:
            return new.inner
        inner = self.inner
        for entries in new.inner_entries:
            inner = inner.commit(entries)
        return inner

    def select_rows(self, row_ids: Int[Tensor, " rows"]) -> "RecurrentState":
        """Copy the named rows, in that order; a row may be named more than once.

        Returns:
            A state of its own.
        """
        tensors = {name: tensor[row_ids] for name, tensor in _tensors(self).items()}
        return replace(self, **tensors, inner=self.inner and self.inner.select_rows(row_ids))

    def fork(self) -> "RecurrentState":
        """Copy the state; nothing is shared.

        Returns:
            A state that can go its own way.
        """
        tensors = {name: tensor.clone() for name, tensor in _tensors(self).items()}
        return replace(self, **tensors, inner=self.inner and self.inner.fork())

    def to(self, device: torch.device | str) -> "RecurrentState":
        """Move the state.

        Returns:
            The state on `device`.
        """
        tensors = {name: tensor.to(device) for name, tensor in _tensors(self).items()}
        return replace(self, **tensors, inner=self.inner and self.inner.to(device))

    def save(self, directory: str | Path, *, fingerprint: str) -> None:
        """Write the state to a directory (safetensors and a JSON manifest).

        The directory is replaced only when the new one is complete; a crash loses nothing.

        Args:
            directory: Where to.
            fingerprint: Identifies the weights that made the state.
        """
        content = {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "layout": asdict(self.layout),
            "model_fingerprint": fingerprint,
        }
        tensors = {name: tensor.clone() for name, tensor in _tensors(self).items()}
        if self.inner is not None:
            self.inner.require_current()
            content["inner_memory_size"] = self.inner.memory_size
            inner = state_tensors(self.inner)
            tensors |= {f"{_INNER}{name}": tensor for name, tensor in inner.items()}
        save_directory(Path(directory), tensors, content)

    @classmethod
    def load(
        cls,
        directory: str | Path,
        layout: RecurrentLayout,
        *,
        fingerprint: str,
        device: torch.device | None = None,
    ) -> "RecurrentState":
        """Read a state that `save` wrote.

        Args:
            directory: Where it is.
            layout: The layout of the model that will use it.
            fingerprint: Identifies the weights that will use the state: those that made it.
            device: Where the state shall live.

        Returns:
            The state.

        Raises:
            CheckpointError: If the directory is incomplete, damaged, or of another format.
            MemoryStateError: If the state was made by another model.
        """
        tensors, manifest = load_directory(Path(directory))
        require_format(manifest, directory, FORMAT, FORMAT_VERSION)
        what = f"The memory state {directory}"
        layout.require_same(from_dict(RecurrentLayout, manifest["layout"]), what)
        saved = manifest["model_fingerprint"]
        if fingerprint != saved:
            msg = (
                f"{what} was made by a model with fingerprint {saved[:12]}, this one has "
                f"{fingerprint[:12]}. Load that model, or read the documents again."
            )
            raise MemoryStateError(msg)
        own = {name: tensor for name, tensor in tensors.items() if not name.startswith(_INNER)}
        inner = None
        if layout.inner is not None:
            inner = state_from_tensors(
                layout.inner,
                {name.removeprefix(_INNER): tensors[name] for name in tensors.keys() - own.keys()},
                memory_size=manifest["inner_memory_size"],
            )
        return cls(layout=layout, **own, inner=inner).to(device or torch.device("cpu"))


def _tensors(state: RecurrentState) -> dict[str, Any]:
    names = ("memory", "num_segments", "pending", "num_pending", "position")
    return {name: getattr(state, name) for name in names}
