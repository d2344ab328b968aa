"""Codes of the keys in a ring, for fast searches with few queries on the CPU."""

import torch
from jaxtyping import Int
from torch import Tensor

from byheart.ops.key_codes import BLOCK, KeyCodes, encode_blocks, multiplies_codes, new_codes

# below this the float32 product of one query is as fast: the fixed work of the search by codes
_MIN_ENTRIES = 16_384

# narrower keys are read so fast that the fixed work shows
_MIN_HEAD_DIM = 16

# every query of a head reads its codes again, where a product reads the keys once for all
_MAX_QUERIES = 4

# keys from which the center of a head is taken
_SAMPLE = 4096


class CodedKeys:
    """What values that share a ring of keys share beside it: codes of these keys.

    They say nothing that the keys do not say. They are made when a search first wants them, changed
    with every write to the ring, and neither saved nor counted as part of a store's value. Whether
    a slot is in use does not matter to them, so a reset changes nothing. They take an eighth of the
    bytes of a float32 ring.
    """

    def __init__(self, codes: KeyCodes | None = None) -> None:
        self._codes = codes

    def of(self, keys: Tensor, num_used: Int[Tensor, " batch"]) -> KeyCodes:
        """Return the codes, made now if there are none.

        Args:
            keys: All slots of the ring.
            num_used: Slots of each row that hold an entry, the first so many.

        Returns:
            Codes of at least the slots in use.
        """
        if self._codes is None:
            most = int(num_used.max())
            # rows with fewer entries lend the others' slots a center, which need not be their own
            step = max(1, most // _SAMPLE)
            centers = keys[:, :, :most:step].float().mean(2).nan_to_num_(0.0, 0.0, 0.0)
            codes = new_codes(keys, centers)
            for row, used in enumerate(num_used.tolist()):
                encode_blocks(codes, keys, row, range(-(-used // BLOCK)))
            self._codes = codes
        return self._codes

    def rewrite(self, keys: Tensor, slots: Int[Tensor, "batch entry"]) -> None:
        """Encode the blocks that were written to.

        Args:
            keys: All slots of the ring, after the write.
            slots: The slots that were written, in the order of the ring.
        """
        if self._codes is None or slots.shape[1] == 0:
            return
        for row, (first, last) in enumerate(slots[:, [0, -1]].tolist()):
            # the slots of a write follow each other round the ring
            runs = [(first, last)] if first <= last else [(first, keys.shape[2] - 1), (0, last)]
            for start, end in runs:
                encode_blocks(self._codes, keys, row, range(start // BLOCK, end // BLOCK + 1))

    def select_rows(self, row_ids: Int[Tensor, " rows"]) -> "CodedKeys":
        """Copy the codes of the named rows.

        Returns:
            Codes of a ring in which these rows were copied.
        """
        return CodedKeys(self._codes and KeyCodes(*(side[row_ids] for side in self._codes)))

    def forget(self) -> None:
        """Drop the codes, after the ring was filled otherwise."""
        self._codes = None


def are_worth_it(queries: Tensor, keys: Tensor, num_used: Int[Tensor, " batch"]) -> bool:
    """Say whether a search by codes is faster than `top_k_inner_product`.

    Args:
        queries: Queries.
        keys: All slots of the ring.
        num_used: Slots of each row that hold an entry.

    Returns:
        Whether there are many entries, few queries, and a processor that multiplies 8-bit integers.
    """
    if not keys.is_cpu or not queries.is_cpu or torch.compiler.is_compiling():
        return False
    if keys.shape[3] < _MIN_HEAD_DIM:
        return False
    if queries.shape[1] * queries.shape[2] > _MAX_QUERIES * keys.shape[1]:
        return False
    return multiplies_codes() and bool((num_used >= _MIN_ENTRIES).any())
