"""Slot arithmetic of a first-in first-out ring, one cursor per batch row.

Nothing else in byheart computes a slot.
"""

from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Int
from torch import Tensor


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class RingCursor:
    """Says where the next entries go and which slots hold an entry.

    The cursor counts the entries ever written; a slot is that count modulo the memory size. Rows
    move independently. A cursor is a value: `advance` and `reset` return another one.
    """

    memory_size: int
    """Slots per row."""
    num_written: Int[Tensor, " batch"]
    """Entries written to each row since its last reset."""

    def __post_init__(self) -> None:
        if self.memory_size < 1:
            msg = f"memory_size must be at least 1 entry per row, got {self.memory_size}."
            raise ValueError(msg)

    def claim(self, keep: Bool[Tensor, "batch entry"]) -> Int[Tensor, "batch entry"]:
        """Find a slot for each entry of the next write, evicting the oldest.

        Kept entries take the next slots in order. The others get the slots behind those, so that
        all slots of a row differ and a caller may write "what was there before" into them.

        Args:
            keep: Which entries are written; at most `memory_size` columns.

        Returns:
            Slots in write order.

        Raises:
            ValueError: If there are more columns than slots.
        """
        num_entries = keep.shape[1]
        if num_entries > self.memory_size:
            msg = (
                f"At most memory_size ({self.memory_size}) entries can claim slots at once, got "
                f"{num_entries}. Write in pieces."
            )
            raise ValueError(msg)
        kept = keep.long()
        rank_of_kept = kept.cumsum(1) - 1
        rank_of_others = kept.sum(1, keepdim=True) + (1 - kept).cumsum(1) - 1
        rank = torch.where(keep, rank_of_kept, rank_of_others)
        return (self.num_written[:, None] + rank) % self.memory_size

    def ages(self) -> Int[Tensor, "batch entry"]:
        """Say how long ago the entry in each slot was written.

        Returns:
            1 for the newest entry of the row, 2 for the one before, and so on; empty slots come
            after the used ones.
        """
        slots = torch.arange(self.memory_size, device=self.num_written.device)
        return self._ages(self.num_written[:, None], slots)

    def ages_of(
        self, row_ids: Int[Tensor, "*#shape"], slots: Int[Tensor, "*#shape"]
    ) -> Int[Tensor, "*shape"]:
        """Say how long ago the entries in some slots were written.

        Args:
            row_ids: Their rows.
            slots: The slots.

        Returns:
            As `ages`.
        """
        return self._ages(self.num_written[row_ids], slots)

    def ages_of_blocks(
        self, block_size: int
    ) -> tuple[Int[Tensor, "batch block"], Int[Tensor, "batch block"]]:
        """Bound the ages in each block of slots, without looking at every slot.

        Args:
            block_size: Slots per block; the last block may have fewer.

        Returns:
            For each block, an age that none of its slots is below, and one that none is above.
        """
        first = torch.arange(0, self.memory_size, block_size, device=self.num_written.device)
        last = (first + block_size - 1).clamp(max=self.memory_size - 1)
        of_first, of_last = (self._ages(self.num_written[:, None], end) for end in (first, last))
        # ages fall by one from slot to slot, but for the step from the newest entry to the oldest
        has_step = of_first < of_last
        return (
            of_last.masked_fill(has_step, 1),
            of_first.masked_fill(has_step, self.memory_size),
        )

    def _ages(self, num_written: Tensor, slots: Tensor) -> Tensor:
        return 1 + (num_written - 1 - slots) % self.memory_size

    def advance(self, num_entries: Int[Tensor, " batch"]) -> "RingCursor":
        """Count entries as written.

        Returns:
            The cursor after the write.
        """
        return replace(self, num_written=self.num_written + num_entries)

    def reset(self, row_mask: Bool[Tensor, " batch"]) -> "RingCursor":
        """Forget the entries of the rows where `row_mask` is `True`.

        Returns:
            The cursor after the reset; the slots' content stays and is not valid any more.
        """
        return replace(self, num_written=self.num_written.masked_fill(row_mask, 0))

    def num_used(self) -> Int[Tensor, " batch"]:
        """Count the slots that hold an entry: the first so many of each row.

        Returns:
            Entries of each row.
        """
        return self.num_written.clamp(max=self.memory_size)

    def valid(self) -> Bool[Tensor, "batch entry"]:
        """Say which slots hold an entry.

        Returns:
            `True` where the slot is in use.
        """
        slots = torch.arange(self.memory_size, device=self.num_written.device)
        return slots < self.num_written[:, None]

    def entry_numbers(self) -> Int[Tensor, "batch entry"]:
        """Number the entry that each slot holds, counted from the row's last reset.

        Returns:
            Entry number, -1 for an empty slot. With one entry per token this is the position of
            the token in its document.
        """
        slots = torch.arange(self.memory_size, device=self.num_written.device)
        newest = self.num_written[:, None] - 1
        numbers = newest - (newest - slots) % self.memory_size
        return torch.where(self.valid(), numbers, -1)
