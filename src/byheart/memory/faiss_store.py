"""A kNN memory with approximate search on the CPU."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from byheart.memory.age import AgeBias, find_by_weight
from byheart.memory.dense import DenseStore
from byheart.memory.faiss_index import build_index, import_faiss, search_index
from byheart.memory.store import KeyValues, MemoryRead
from byheart.ops.gather import gather_attend
from byheart.ops.search import (
    Neighbours,
    check_finite,
    check_shapes,
    check_top_k,
    top_k_inner_product,
)
from byheart.ops.search_select import EXCLUDED

# of a larger memory an eighth is a block: what is not indexed yet stays a small part of a search
_MIN_BLOCK_SIZE = 8192
_MAX_BLOCKS = 8


class IndexedBlock(NamedTuple):
    """An index over a run of slots that are all in use. It is never changed."""

    first_entry: int
    """Number of the entry in the first slot; tells whether the slots were written since."""
    indexes: tuple[Any, ...]
    """One faiss index per key-value head."""


@dataclass(frozen=True, kw_only=True, eq=False)
class FaissStore:
    """FIFO ring of key-value pairs in main memory, searched approximately.

    Entries live in the ring of a `DenseStore`; faiss only helps to search it. The ring is cut into
    blocks of slots. A block gets an inverted-file index when its last slot is written, and loses it
    when its first slot is overwritten; slots of blocks without an index are searched exactly. So an
    index never holds an evicted entry, needs no removal, and may be shared by copies of the store.
    Memories of up to 8192 entries have one block and are in effect searched exactly.

    Recall (share of the exact 32 nearest that are found) among 65,536 entries, mean over heads, as
    `python -m benchmarks.recall` measures it:

    ============================================================================== ======
    queries and keys                                                               recall
    ============================================================================== ======
    small byte-level decoder over Python's standard library, length 1              0.99
    the same without the normalisation of queries and keys                         0.96
    byte trigrams of that text                                                     0.97
    random directions: nothing in common, the hardest case                         0.68
    ============================================================================== ======

    The table is without an `age_slope`. With one, a block's best by weight are chosen from four
    times as many of its best by inner product; how many of the exact ones that finds is not
    measured.

    The ring and a second copy of the keys in float32 are in main memory whatever the model's
    device; tensors of any device are taken, and results are returned on the device of the queries.
    In the same benchmark, on one core with bfloat16 instructions, a search for 512 queries took 1.0
    to 2.1 of the time of the exact search of `DenseStore`. For one query it took 0.6 to 0.8 of that
    of a float32 product; where the processor multiplies 8-bit integers, `DenseStore` searches for
    few queries by other means (`byheart.ops.search_codes`). Measure before you choose this store.
    """

    ring: DenseStore
    """The entries and their order."""
    block_size: int
    """Slots per block."""
    blocks: Mapping[tuple[int, int], IndexedBlock] = field(default_factory=dict)
    """The indexes, by row and first slot."""

    @classmethod
    def empty(
        cls,
        batch_size: int,
        num_heads: int,
        memory_size: int,
        head_dim: int,
        *,
        dtype: torch.dtype = torch.float32,
        block_size: int | None = None,
    ) -> "FaissStore":
        """Allocate a memory without entries.

        Args:
            batch_size: Rows.
            num_heads: Key-value heads.
            memory_size: Slots per row and head.
            head_dim: Width of a head.
            dtype: Precision of the stored keys and values.
            block_size: Slots per block; `None` for an eighth of the memory, at least 8192.

        Returns:
            The empty store.

        Raises:
            ValueError: If `block_size` is below 1.
        """
        import_faiss()
        if block_size is None:
            block_size = max(_MIN_BLOCK_SIZE, -(-memory_size // _MAX_BLOCKS))
        if block_size < 1:
            msg = f"block_size must be at least 1, got {block_size}."
            raise ValueError(msg)
        ring = DenseStore.empty(batch_size, num_heads, memory_size, head_dim, dtype=dtype)
        return cls(ring=ring, block_size=block_size)

    @property
    def num_written(self) -> Int[Tensor, " batch"]:
        """Entries written to each row since its last reset, evicted ones too."""
        return self.ring.num_written

    @property
    def memory_size(self) -> int:
        """Slots per row and head."""
        return self.ring.memory_size

    def append(
        self,
        keys: Float[Tensor, "batch kv_heads entry head_dim"],
        values: Float[Tensor, "batch kv_heads entry head_dim"],
        keep: Bool[Tensor, "batch entry"],
    ) -> "FaissStore":
        """Write the kept entries over the oldest ones, and index the blocks that became complete.

        Returns:
            The store after the write; this one is used up.
        """
        ring = self.ring.append(keys.detach().cpu(), values.detach().cpu(), keep.cpu())
        return replace(self, ring=ring, blocks=self._index(ring))

    def reset(self, row_mask: Bool[Tensor, " batch"]) -> "FaissStore":
        """Forget all entries of the rows where `row_mask` is `True`.

        Returns:
            The store after the reset; this one stays as it was.
        """
        row_mask = row_mask.cpu()
        kept = {place: block for place, block in self.blocks.items() if not row_mask[place[0]]}
        return replace(self, ring=self.ring.reset(row_mask), blocks=kept)

    @torch.no_grad()
    def search(
        self, queries: Float[Tensor, "batch heads query head_dim"], top_k: int
    ) -> Neighbours:
        """Find most of the `top_k` entries with the largest inner product with each query.

        Returns:
            Scores, slots, and which of them hold an entry.
        """
        found = self._search(queries.detach().cpu().float(), top_k, None)
        return Neighbours(*(side.to(queries.device) for side in found))

    def gather(self, slots: Int[Tensor, "batch heads query top_k"]) -> KeyValues:
        """Return the content of slots.

        Returns:
            Keys and values, `[batch, heads, query * top_k, head_dim]` each.
        """
        gathered = self.ring.gather(slots.cpu())
        return KeyValues(*(side.to(slots.device) for side in gathered))

    def attend(
        self,
        queries: Float[Tensor, "batch heads query head_dim"],
        scale: Float[Tensor, " heads"],
        top_k: int,
        age_slope: float = 0.0,
    ) -> MemoryRead:
        """Search, then attend to what was found.

        The gradient reaches `queries` and `scale` only.

        Returns:
            Attention over the retrieved entries.
        """
        device, queries, scale = queries.device, queries.cpu(), scale.cpu()
        cursor = self.ring.cursor

        def search(queries: Tensor, bias: AgeBias | None) -> Neighbours:
            return self._search(queries.float(), top_k, None if bias is None else bias.dense())

        found, bias = find_by_weight(search, queries, scale, cursor, age_slope)
        attended = gather_attend(queries, scale, self.ring.keys, self.ring.values, found, bias=bias)
        assert attended.logsumexp is not None
        return MemoryRead(
            attended.output.to(device),
            attended.logsumexp.to(device),
            (cursor.num_written > 0).to(device),
            Neighbours(*(side.to(device) for side in found)),
        )

    def entry_numbers(self) -> Int[Tensor, "batch entry"]:
        """Number the entry in each slot since the row's last reset.

        Returns:
            Entry number, -1 where the slot is empty.
        """
        return self.ring.entry_numbers()

    def select_rows(self, row_ids: Int[Tensor, " rows"]) -> "FaissStore":
        """Copy the named rows, in that order; a row may be named more than once.

        Returns:
            A store with a ring of its own; the indexes, which never change, are shared.
        """
        row_ids = row_ids.cpu()
        blocks = {
            (new, start): block
            for new, old in enumerate(row_ids.tolist())
            for (row, start), block in self.blocks.items()
            if row == old % self.num_written.shape[0]
        }
        return replace(self, ring=self.ring.select_rows(row_ids), blocks=blocks)

    def fork(self) -> "FaissStore":
        """Copy the store.

        Returns:
            A store that answers every query the same, with a ring of its own.
        """
        return replace(self, ring=self.ring.fork())

    def to(self, device: torch.device) -> "FaissStore":
        """Stay in main memory: the search runs there, whatever device the model is on.

        Returns:
            This store.
        """
        self.ring.require_current()
        return self

    def state_dict(self) -> dict[str, Tensor]:
        """Return the used slots and the counters; the indexes are made again on loading.

        Returns:
            Tensors that `load_state_dict` takes, also that of `DenseStore`.
        """
        return self.ring.state_dict()

    def load_state_dict(self, state: Mapping[str, Tensor]) -> "FaissStore":
        """Fill a store with what `state_dict` returned, and index it.

        Args:
            state: Entries and counters of a store of the same shape.

        Returns:
            A store with those entries; this one is used up.
        """
        ring = self.ring.load_state_dict(state)
        return replace(self, ring=ring, blocks=replace(self, blocks={})._index(ring))

    def _index(self, ring: DenseStore) -> dict[tuple[int, int], IndexedBlock]:
        """Index the blocks of a ring whose slots are all in use and of one lap.

        Returns:
            The indexes: those of unchanged blocks, and new ones.
        """
        blocks = {}
        for row, num_written in enumerate(ring.num_written.tolist()):
            next_slot = num_written % ring.memory_size
            for start in range(0, ring.memory_size, self.block_size):
                stop = min(start + self.block_size, ring.memory_size)
                if num_written < stop or start < next_slot < stop:
                    continue
                newest = num_written - 1
                first_entry = newest - (newest - start) % ring.memory_size
                block = self.blocks.get((row, start))
                if block is None or block.first_entry != first_entry:
                    block = IndexedBlock(
                        first_entry,
                        tuple(build_index(keys) for keys in ring.keys[row, :, start:stop]),
                    )
                blocks[row, start] = block
        return blocks

    @torch.no_grad()
    def _search(self, queries: Tensor, top_k: int, bias: Tensor | None) -> Neighbours:
        self.ring.require_current()
        ring, valid = self.ring, self.ring.cursor.valid()
        check_shapes(queries, ring.keys, valid)
        check_finite(queries)
        check_top_k(top_k, self.memory_size)
        batch, heads, num_queries, _ = queries.shape
        shape = (batch, heads, num_queries, top_k)
        scores = torch.full(shape, EXCLUDED)
        slots = torch.zeros(shape, dtype=torch.long)
        for row in range(batch):
            bias_N = None if bias is None else bias[row]
            parts = [
                search_index(block.indexes, start, queries[row], top_k, bias_N)
                for (of_row, start), block in self.blocks.items()
                if of_row == row
            ]
            parts += self._scan(row, valid[row], queries[row], top_k, bias_N)
            if not parts:
                continue
            all_scores, all_slots = (torch.cat(side, dim=-1) for side in zip(*parts, strict=True))
            best = all_scores.topk(min(top_k, all_scores.shape[-1]))
            scores[row, ..., : best.values.shape[-1]] = best.values
            slots[row, ..., : best.values.shape[-1]] = all_slots.gather(-1, best.indices)
        is_valid = scores > EXCLUDED
        return Neighbours(scores, slots.masked_fill(~is_valid, 0), is_valid)

    def _scan(
        self,
        row: int,
        valid: Bool[Tensor, " entry"],
        queries: Tensor,
        top_k: int,
        bias_N: Tensor | None,
    ) -> list[tuple[Tensor, Tensor]]:
        """Search what has no index, exactly.

        Returns:
            Scores and slots `[heads, query, k]`; an empty list if everything has an index.
        """
        left = valid.clone()
        for of_row, start in self.blocks:
            if of_row == row:
                left[start : start + self.block_size] = False
        slots = left.nonzero().squeeze(1)
        if not len(slots):
            return []
        keys = self.ring.keys[row, :, slots]
        everything = torch.ones(1, len(slots), dtype=torch.bool)
        kept = min(top_k, len(slots))
        bias = None if bias_N is None else bias_N[None, slots]
        found = top_k_inner_product(queries[None], keys[None], everything, kept, bias=bias)
        return [(found.scores[0], slots[found.slots[0]])]
