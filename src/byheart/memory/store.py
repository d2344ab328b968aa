"""What every store of the kNN memory promises."""

from collections.abc import Mapping
from typing import NamedTuple, Protocol, TypeVar, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from byheart.ops.search import Neighbours

Self = TypeVar("Self", bound="MemoryStore")


class KeyValues(NamedTuple):
    """Keys and values of the same tokens."""

    keys: Float[Tensor, "batch kv_heads entry head_dim"]
    values: Float[Tensor, "batch kv_heads entry head_dim"]


class MemoryRead(NamedTuple):
    """Attention over the entries a memory found for each query."""

    output: Float[Tensor, "batch heads query head_dim"]
    """Weighted values; zero where the row holds no entry."""
    logsumexp: Float[Tensor, "batch heads query"]
    """Log of the softmax denominator, natural log, float32."""
    has_entries: Bool[Tensor, " batch"]
    """Rows that hold an entry."""
    found: Neighbours | None
    """What was retrieved, largest weight first: unscaled inner products, slots, and which of them
    hold an entry. `None` if every entry was read, without a search."""


@runtime_checkable
class MemoryStore(Protocol):
    """Key-value pairs of the past, searched by inner product. Rows are independent.

    Contract, tested by `byheart.testing.store_contract`:

    1. `append` then `search` sees the kept entries; the oldest leave first (FIFO), whatever the
       length of the write, also when it is longer than the memory.
    2. A row without a kept entry does not change.
    3. `valid` is `True` exactly for existing entries, and there are `min(top_k, entries)` of them;
       keys and values of one slot belong together.
    4. Results are sorted by score, descending; the order of equal scores is not specified.
    5. `fork` gives a store that answers every query the same and shares nothing.
    6. Stored tensors carry no gradient; `attend` passes one to the queries and the scale.
    7. `append` and `reset` return the store after the call. After `append` the store it was called
       on is used up; `reset` leaves it as it was.
    8. `attend` reads the entries with the largest weights: scaled inner product, less what their
       age takes.

    An approximate store keeps the contract with clauses 3 and 4 for what it finds, and a recall
    that is measured and reported.
    """

    @property
    def num_written(self) -> Int[Tensor, " batch"]:
        """Entries written to each row since its last reset, evicted ones too."""

    @property
    def memory_size(self) -> int:
        """Slots per row and head."""

    def append(
        self: Self,
        keys: Float[Tensor, "batch kv_heads entry head_dim"],
        values: Float[Tensor, "batch kv_heads entry head_dim"],
        keep: Bool[Tensor, "batch entry"],
    ) -> Self:
        """Write the kept entries over the oldest ones."""

    def reset(self: Self, row_mask: Bool[Tensor, " batch"]) -> Self:
        """Forget all entries of the rows where `row_mask` is `True`."""

    def search(
        self, queries: Float[Tensor, "batch heads query head_dim"], top_k: int
    ) -> Neighbours:
        """Find the `top_k` entries with the largest inner product with each query."""

    def gather(self, slots: Int[Tensor, "batch heads query top_k"]) -> KeyValues:
        """Return the content of slots: `[batch, heads, query * top_k, head_dim]` each."""

    def attend(
        self,
        queries: Float[Tensor, "batch heads query head_dim"],
        scale: Float[Tensor, " heads"],
        top_k: int,
        age_slope: float = 0.0,
    ) -> MemoryRead:
        """Search, then attend to what was found.

        `age_slope * log(age)` is taken from each score after the scale, where the age of the newest
        entry of a row is 1. The entries found are those with the largest differences.
        """

    def entry_numbers(self) -> Int[Tensor, "batch entry"]:
        """Number the entry in each slot since the row's last reset; -1 where empty."""

    def select_rows(self: Self, row_ids: Int[Tensor, " rows"]) -> Self:
        """Copy the named rows, in that order; a row may be named more than once."""

    def fork(self: Self) -> Self:
        """Copy the store; nothing is shared."""

    def to(self: Self, device: torch.device) -> Self:
        """Move the store."""

    def state_dict(self) -> dict[str, Tensor]:
        """Return the used slots and the counters."""

    def load_state_dict(self: Self, state: Mapping[str, Tensor]) -> Self:
        """Return this empty store filled with what `state_dict` returned."""
