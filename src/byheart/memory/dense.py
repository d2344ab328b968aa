"""Exact FIFO memory held in one tensor for keys and one for values."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from byheart.errors import MemoryStateError
from byheart.memory.age import AgeBias, find_by_weight
from byheart.memory.coded_keys import CodedKeys, are_worth_it
from byheart.memory.ring import RingCursor
from byheart.memory.store import KeyValues, MemoryRead
from byheart.ops.attention import Attended
from byheart.ops.bucket_search import strided_bucket_top_k
from byheart.ops.gather import gather_attend
from byheart.ops.search import (
    Neighbours,
    check_finite,
    check_shapes,
    check_top_k,
    top_k_inner_product,
)
from byheart.ops.search_codes import codes_top_k
from byheart.ops.whole import attend_to_all


class Lease:
    """The right to write to shared storage: the newest value has it, and it ends with a write.

    Values that share storage, and were made since the same write, share a lease. A write ends it
    and gives the value after it one of its own, so an older value notices that the storage has
    moved on. A compiled step asks for nothing but whether the lease has ended, which is the same
    in every step: a number that counts writes would have it compiled again.
    """

    def __init__(self) -> None:
        self.has_ended = False

    def require(self) -> None:
        """Refuse values from before the last write.

        Raises:
            MemoryStateError: If the storage was written since.
        """
        if self.has_ended:
            msg = (
                "A memory must not be used after it was committed into a newer one: its entries "
                "are overwritten. Use the state that commit returned, or fork() before commit."
            )
            raise MemoryStateError(msg)

    def pass_on(self) -> "Lease":
        """Let the current value write, once.

        Returns:
            The lease of the value after the write.
        """
        self.require()
        self.has_ended = True
        return Lease()


@dataclass(frozen=True, kw_only=True, eq=False)
class DenseStore:
    """FIFO ring of key-value pairs with exact search, on any device, in any float dtype.

    A store is a value that shares its storage with the values made from it: `reset` only changes
    the counters, `append` writes in place and uses up the store it was called on.
    """

    keys: Float[Tensor, "batch kv_heads entry head_dim"]
    values: Float[Tensor, "batch kv_heads entry head_dim"]
    cursor: RingCursor
    num_buckets: int | None = None
    """Search the best of this many strided buckets, as the authors' code does; `None` is exact."""
    empty_as_zero: bool = False
    """Let empty slots take part in the softmax as zeros, as the authors' code does."""
    _coded: CodedKeys = field(default_factory=CodedKeys, repr=False)
    _lease: Lease = field(default_factory=Lease)

    @classmethod
    def empty(
        cls,
        batch_size: int,
        num_heads: int,
        memory_size: int,
        head_dim: int,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | None = None,
        **options: int | bool | None,
    ) -> "DenseStore":
        """Allocate a memory without entries.

        Args:
            batch_size: Rows.
            num_heads: Key-value heads.
            memory_size: Slots per row and head.
            head_dim: Width of a head.
            dtype: Precision of the stored keys and values.
            device: Where they live.
            options: `num_buckets` and `empty_as_zero`, see the fields.

        Returns:
            The empty store; `2 * batch_size * num_heads * memory_size * head_dim` numbers.
        """
        shape = (batch_size, num_heads, memory_size, head_dim)
        return cls(
            keys=torch.zeros(shape, dtype=dtype, device=device),
            values=torch.zeros(shape, dtype=dtype, device=device),
            cursor=RingCursor(
                memory_size=memory_size,
                num_written=torch.zeros(batch_size, dtype=torch.long, device=device),
            ),
            **options,  # type: ignore[arg-type]
        )

    @property
    def num_written(self) -> Int[Tensor, " batch"]:
        """Entries written to each row since its last reset, evicted ones too."""
        return self.cursor.num_written

    @property
    def memory_size(self) -> int:
        """Slots per row and head."""
        return self.cursor.memory_size

    def require_current(self) -> None:
        """Refuse to be read after a newer store was made by `append`.

        Raises:
            MemoryStateError: If this store is used up.
        """
        self._lease.require()

    def append(
        self,
        keys: Float[Tensor, "batch kv_heads entry head_dim"],
        values: Float[Tensor, "batch kv_heads entry head_dim"],
        keep: Bool[Tensor, "batch entry"],
    ) -> "DenseStore":
        """Write the kept entries over the oldest ones, in place.

        Returns:
            The store after the write; this one is used up.
        """
        lease, cursor = self._lease.pass_on(), self.cursor
        # no decorator: Dynamo cannot call decorated methods of stores that a step has made
        with torch.no_grad():
            self._coded.check(self.keys)
            # entries of one write must not share a slot, so longer writes go round the ring in laps
            for start in range(0, keys.shape[2], self.memory_size):
                lap = slice(start, start + self.memory_size)
                slots_BN = cursor.claim(keep[:, lap])
                index = places(slots_BN, keys.shape[1])
                for storage, entries in ((self.keys, keys), (self.values, values)):
                    overwrite(storage, entries[:, :, lap], index, keep[:, lap])
                self._coded.mark(self.keys, slots_BN, keep[:, lap])
                cursor = cursor.advance(keep[:, lap].sum(1))
        return replace(self, cursor=cursor, _lease=lease)

    def reset(self, row_mask: Bool[Tensor, " batch"]) -> "DenseStore":
        """Forget all entries of the rows where `row_mask` is `True`.

        Returns:
            The store after the reset; this one stays as it was.
        """
        return replace(self, cursor=self.cursor.reset(row_mask))

    @torch.no_grad()
    def search(
        self, queries: Float[Tensor, "batch heads query head_dim"], top_k: int
    ) -> Neighbours:
        """Find the `top_k` entries with the largest inner product with each query.

        Returns:
            Scores, slots, and which of them hold an entry.
        """
        return self._search(queries, top_k, None)

    def gather(self, slots: Int[Tensor, "batch heads query top_k"]) -> KeyValues:
        """Return the content of slots.

        Returns:
            Keys and values, `[batch, heads, query * top_k, head_dim]` each.
        """
        self.require_current()
        batch, heads = slots.shape[:2]
        # heads that share a key-value head are neighbours
        index_BGN1 = slots.reshape(batch, self.keys.shape[1], -1, 1)
        gathered = [
            side.gather(2, index_BGN1.expand(-1, -1, -1, side.shape[3])).reshape(
                batch, heads, -1, side.shape[3]
            )
            for side in (self.keys, self.values)
        ]
        return KeyValues(*gathered)

    def attend(
        self,
        queries: Float[Tensor, "batch heads query head_dim"],
        scale: Float[Tensor, " heads"],
        top_k: int,
        age_slope: float = 0.0,
    ) -> MemoryRead:
        """Search, then attend to what was found; a memory of `top_k` slots is read whole.

        The gradient reaches `queries` and `scale` only.

        Returns:
            Attention over the retrieved entries.
        """
        has_entries = self.cursor.num_written > 0
        if top_k == self.memory_size and self.num_buckets is None and not self.empty_as_zero:
            attended = self._attend_to_all(queries, scale, age_slope)
            assert attended.logsumexp is not None
            return MemoryRead(attended.output, attended.logsumexp, has_entries, None)

        def search(queries: Tensor, bias: AgeBias | None) -> Neighbours:
            return self._search(queries, top_k, bias)

        found, bias = find_by_weight(search, queries, scale, self.cursor, age_slope)
        attended = gather_attend(
            queries,
            scale,
            self.keys,
            self.values,
            found,
            bias=bias,
            empty_as_zero=self.empty_as_zero,
        )
        assert attended.logsumexp is not None
        return MemoryRead(attended.output, attended.logsumexp, has_entries, found)

    def entry_numbers(self) -> Int[Tensor, "batch entry"]:
        """Number the entry in each slot since the row's last reset.

        Returns:
            Entry number, -1 where the slot is empty.
        """
        return self.cursor.entry_numbers()

    def select_rows(self, row_ids: Int[Tensor, " rows"]) -> "DenseStore":
        """Copy the named rows, in that order; a row may be named more than once.

        Returns:
            A store of its own.
        """
        self.require_current()
        keys = self.keys[row_ids]
        return replace(
            self,
            keys=keys,
            values=self.values[row_ids],
            cursor=replace(self.cursor, num_written=self.num_written[row_ids]),
            _coded=self._coded.select_rows(row_ids, self.keys, keys),
            _lease=Lease(),
        )

    def fork(self) -> "DenseStore":
        """Copy the store; nothing is shared.

        Returns:
            A store of its own that answers every query the same.
        """
        return self.select_rows(torch.arange(self.keys.shape[0], device=self.keys.device))

    def to(self, device: torch.device) -> "DenseStore":
        """Move the store.

        Returns:
            The store on `device`; this one if it is there already.
        """
        self.require_current()
        keys = self.keys.to(device)
        # "cuda" and "cuda:0" differ, yet may name the same device
        if keys is self.keys:
            return self
        return replace(
            self,
            keys=keys,
            values=self.values.to(device),
            cursor=replace(self.cursor, num_written=self.num_written.to(device)),
            _coded=CodedKeys(),
            _lease=Lease(),
        )

    def state_dict(self) -> dict[str, Tensor]:
        """Return the used slots and the counters.

        Returns:
            Copies in main memory, which `load_state_dict` takes.
        """
        self.require_current()
        num_used = self._num_used(self.num_written)
        return {
            "keys": self.keys[:, :, :num_used].to("cpu", copy=True).contiguous(),
            "values": self.values[:, :, :num_used].to("cpu", copy=True).contiguous(),
            "num_written": self.num_written.to("cpu", copy=True),
        }

    def load_state_dict(self, state: Mapping[str, Tensor]) -> "DenseStore":
        """Fill a store with what `state_dict` returned.

        Args:
            state: Entries and counters of a store of the same shape.

        Returns:
            A store with those entries and this one's options; this one is used up.

        Raises:
            MemoryStateError: If the entries do not fit this store's shape.
        """
        num_written = state["num_written"].to(self.num_written.device, copy=True)
        num_used = self._num_used(num_written)
        batch, kv_heads, _, head_dim = self.keys.shape
        shape = (batch, kv_heads, num_used, head_dim)
        if num_written.shape != (batch,) or any(
            state[name].shape != shape for name in ("keys", "values")
        ):
            msg = (
                f"A saved memory must have keys and values of the shape {list(shape)}, got "
                f"{list(state['keys'].shape)} and {list(state['values'].shape)}. Load it into a "
                "store of the shape it was saved from."
            )
            raise MemoryStateError(msg)
        lease = self._lease.pass_on()
        self.keys[:, :, :num_used].copy_(state["keys"])
        self.values[:, :, :num_used].copy_(state["values"])
        cursor = replace(self.cursor, num_written=num_written)
        return replace(self, cursor=cursor, _coded=CodedKeys(), _lease=lease)

    def _attend_to_all(
        self,
        queries: Float[Tensor, "batch heads query head_dim"],
        scale: Float[Tensor, " heads"],
        age_slope: float,
    ) -> Attended:
        self.require_current()
        check_shapes(queries, self.keys)
        check_finite(queries)
        valid = self.cursor.valid()
        bias = AgeBias(self.cursor, age_slope).dense() if age_slope else None
        return attend_to_all(queries, scale, self.keys, self.values, valid, bias=bias)

    # without a gradient already: `search` and `find_by_weight` see to it
    def _search(self, queries: Tensor, top_k: int, bias: AgeBias | None) -> Neighbours:
        self.require_current()
        num_used = self.cursor.num_used()
        if self.num_buckets is None and are_worth_it(queries, self.keys, num_used):
            check_shapes(queries, self.keys)
            check_finite(queries)
            check_top_k(top_k, self.memory_size)
            codes = self._coded.of(self.keys, num_used)
            return codes_top_k(queries, self.keys, codes, num_used, top_k, bias)
        valid, dense_bias = self.cursor.valid(), None if bias is None else bias.dense()
        if self.num_buckets is not None:
            return strided_bucket_top_k(
                queries, self.keys, valid, self.num_buckets, top_k, dense_bias
            )
        return top_k_inner_product(queries, self.keys, valid, top_k, bias=dense_bias)

    def _num_used(self, num_written: Int[Tensor, " rows"]) -> int:
        return min(self.memory_size, int(num_written.max()))


def places(slots_BN: Tensor, num_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """Index slots of rows, in all of their heads, for `overwrite`.

    Returns:
        Rows, heads and slots.
    """
    rows_B11 = torch.arange(len(slots_BN), device=slots_BN.device)[:, None, None]
    heads_G1 = torch.arange(num_heads, device=slots_BN.device)[:, None]
    return rows_B11, heads_G1, slots_BN[:, None]


def overwrite(
    storage: Tensor, entries: Tensor, index: tuple[Tensor, Tensor, Tensor], keep: Tensor
) -> None:
    """Write the kept entries; the others write back what their slot held, so shapes are fixed."""
    kept = entries.detach().to(storage.dtype)
    after = torch.where(keep[:, None, :, None], kept, storage[index])
    # `scatter_` converts all of a storage of half precision on a CPU, and compiled by torch 2.13
    # it copies the storage
    storage.index_put_(index, after)
