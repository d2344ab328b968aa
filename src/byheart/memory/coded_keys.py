"""Codes of the keys in a ring, for fast searches with few queries on the CPU."""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from byheart.ops.key_codes import BLOCK, KeyCodes, code_product, encode_blocks, new_codes

# below this the float32 product of one query is about as fast: codes have more fixed work
_MIN_ENTRIES = 32_768

# narrower keys are read so fast that the fixed work shows
_MIN_HEAD_DIM = 16

# every query of a head reads its codes again, where a product reads the keys once for all
_MAX_QUERIES = 4

# keys from which the center of a head is taken
_SAMPLE = 4096


class _Made(NamedTuple):
    codes: KeyCodes
    is_stale: Bool[Tensor, "batch block"]
    """Blocks whose codes are not those of their keys."""
    keys: Tensor
    version: int | None
    """How often the keys had been written to when `is_stale` was right."""

    def are_of(self, keys: Tensor) -> bool:
        return self.keys is keys and self.version == _version(keys)


def _version(keys: Tensor) -> int | None:
    return None if keys.is_inference() else keys._version


class CodedKeys:
    """What values that share a ring of keys share beside it: codes of these keys.

    They say nothing that the keys do not say, and are neither saved nor part of a store's value. A
    search makes them; a write only marks what it has changed, and the next search that reads those
    slots encodes them. Keys that anything else has written to are encoded anew. Whether a slot is
    in use does not matter, so a reset changes nothing. Codes take an eighth of the bytes of keys
    and values in float32.
    """

    def __init__(self, made: _Made | None = None) -> None:
        self._made = made

    def of(self, keys: Tensor, num_used: Int[Tensor, " batch"]) -> KeyCodes:
        """Return the codes, made now where there are none.

        Args:
            keys: All slots of the ring.
            num_used: Slots of each row that hold an entry, the first so many.

        Returns:
            Codes of at least the slots in use.
        """
        made = self._made
        # what is made in inference mode could not be changed outside of it
        with torch.inference_mode(mode=False), torch.no_grad():
            if made is None or not made.are_of(keys):
                made = self._made = _make(keys, int(num_used.max()))
            blocks = torch.arange(made.is_stale.shape[1])
            wanted_BT = made.is_stale & (blocks * BLOCK < num_used[:, None])
            if wanted_BT.any():
                # runs of blocks begin and end where the difference is 1 and -1
                edges_BT = torch.nn.functional.pad(wanted_BT.byte(), (1, 1)).char().diff(dim=1)
                begins, ends = ((edges_BT == sign).nonzero().tolist() for sign in (1, -1))
                for (row, begin), (_, end) in zip(begins, ends, strict=True):
                    encode_blocks(made.codes, keys, row, range(begin, end))
                # only then: another thread may read the same store
                made.is_stale.logical_and_(~wanted_BT)
        return made.codes

    def check(self, keys: Tensor) -> None:
        """Drop the codes if anything but `mark` has followed the keys. Call it before a write.

        A compiled write drops them, too: which blocks it changes would be asked of the tensors.

        Args:
            keys: All slots of the ring.
        """
        if self._made is None:
            return
        if torch.compiler.is_compiling() or not self._made.are_of(keys):
            self._made = None

    def mark(
        self, keys: Tensor, slots: Int[Tensor, "batch entry"], keep: Bool[Tensor, "batch entry"]
    ) -> None:
        """Remember what a write has changed.

        Args:
            keys: All slots of the ring, after the write.
            slots: Slots of the write.
            keep: Which of them were written.
        """
        if self._made is not None:
            row_ids, columns = keep.nonzero(as_tuple=True)
            self._made.is_stale[row_ids, slots[row_ids, columns] // BLOCK] = True
            self._made = self._made._replace(version=_version(keys))

    def select_rows(self, row_ids: Int[Tensor, " rows"], keys: Tensor, copy: Tensor) -> "CodedKeys":
        """Copy the codes of the named rows.

        Args:
            row_ids: The rows.
            keys: All slots of the ring.
            copy: The same rows of it.

        Returns:
            Codes of the copy.
        """
        self.check(keys)
        if self._made is None:
            return CodedKeys()
        with torch.inference_mode(mode=False), torch.no_grad():
            codes = KeyCodes(*(side[row_ids] for side in self._made.codes))
            return CodedKeys(_Made(codes, self._made.is_stale[row_ids], copy, _version(copy)))


def _make(keys: Tensor, most_used: int) -> _Made:
    """Allocate codes.

    Returns:
        Codes of nothing so far: all are stale.
    """
    # rows with fewer entries lend the others' slots a center, which need not be their own
    step = max(1, most_used // _SAMPLE)
    centers = keys[:, :, :most_used:step].float().mean(2).nan_to_num_(0.0, 0.0, 0.0)
    codes = new_codes(keys, centers)
    is_stale = torch.ones(keys.shape[0], codes.scales.shape[2], dtype=torch.bool)
    return _Made(codes, is_stale, keys, _version(keys))


def are_worth_it(queries: Tensor, keys: Tensor, num_used: Int[Tensor, " batch"]) -> bool:
    """Say whether a search by codes is faster than `top_k_inner_product`.

    Args:
        queries: Queries.
        keys: All slots of the ring.
        num_used: Slots of each row that hold an entry.

    Returns:
        Whether there are many entries, few queries, and a processor that multiplies codes fast.
    """
    if not keys.is_cpu or not queries.is_cpu or torch.compiler.is_compiling():
        return False
    if keys.shape[3] < _MIN_HEAD_DIM:
        return False
    if queries.shape[1] * queries.shape[2] > _MAX_QUERIES * keys.shape[1]:
        return False
    return code_product() is not None and bool((num_used >= _MIN_ENTRIES).any())
