"""Top-k of rows of scores: the float32 product, group maxima and sorted packed words.

Two facts make selection cheap. The `top_k` largest scores lie in the `top_k` groups with the
largest maxima, so most scores are read once, by a maximum. And a float32 score can share a 64-bit
word with its slot, so that one vectorised integer sort orders both.
"""

import math
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

# lower than any real inner product, and finite: -inf would give NaN in the softmax of an empty row
EXCLUDED = torch.finfo(torch.float32).min

# entries per group, a power of two: with 8, reading the members of the chosen groups costs about as
# much as finding the groups (4 was no faster)
GROUP = 8

# NumPy sorts 64-bit rows up to this width within vector registers; beyond it a row costs 4 times
# as much per element (NumPy 2.4, AVX-512) and another level of groups is cheaper
_SORTED_WIDTH = 256

_LOW_WORD = 0xFFFFFFFF

# Float32 scores held at a time. On a CPU half of the last-level cache of a common group of cores:
# scores are selected from while they are still in it (8 and 32 MiB were up to a tenth slower, as
# were 8 and 32 MiB of bfloat16 scores). On a GPU enough to fill it, and small beside its memory.
_MAX_BYTES = {"cpu": 16 << 20, "cuda": 512 << 20}


# Buffers of up to this size outlive a search: twice what a search of ordinary size takes.
_KEPT_BYTES = 64 << 20


def default_max_bytes(device: torch.device) -> int:
    """Return how many bytes of scores a search holds at a time.

    Args:
        device: Where the keys are.

    Returns:
        Bytes.
    """
    return _MAX_BYTES.get(device.type, _MAX_BYTES["cuda"])


class Buffers:
    """Tensors that are reused from block to block, by name.

    Fresh memory of a few megabytes is returned to the system and faulted in again at every step,
    which costs more than the arithmetic.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._flat: dict[tuple[str, torch.dtype], Tensor] = {}

    @property
    def num_bytes(self) -> int:
        """Bytes held."""
        return sum(flat.nbytes for flat in self._flat.values())

    def take(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Return a tensor of this shape with undefined content.

        Args:
            name: Tensors taken under the same name and dtype share memory.
            shape: Its shape.
            dtype: Its type.

        Returns:
            A contiguous tensor, valid until the name is taken again.
        """
        size = math.prod(shape)
        flat = self._flat.get((name, dtype))
        if flat is None or flat.numel() < size:
            # a buffer made in inference mode could not be written to outside of it
            with torch.inference_mode(mode=False):
                flat = torch.empty(size, dtype=dtype, device=self._device)
            self._flat[name, dtype] = flat
        return flat[:size].view(shape)


_kept = threading.local()


@contextmanager
def buffers_on(device: torch.device) -> Iterator[Buffers]:
    """Lend buffers, on a CPU those of this thread's last search unless they were unusually large.

    Args:
        device: Where the buffers are to be.

    Yields:
        Buffers with undefined content.
    """
    # taken out while lent: a search within a search, or one that fails, starts with fresh ones
    buffers = _kept.__dict__.pop("buffers", None) if device.type == "cpu" else None
    buffers = buffers or Buffers(device)
    yield buffers
    if device.type == "cpu" and buffers.num_bytes <= _KEPT_BYTES:
        _kept.buffers = buffers


def ordered_bits(bits: Int[Tensor, "*shape"], out: Int[Tensor, "*shape"]) -> Int[Tensor, "*shape"]:
    """Map the bits of float32 numbers to integers of the same order, and back.

    Args:
        bits: In int32.
        out: Takes the result.

    Returns:
        `out`.
    """
    torch.bitwise_right_shift(bits, 31, out=out)
    return out.bitwise_and_(0x7FFFFFFF).bitwise_xor_(bits)


def sort_packed(
    scores_RN: Float[Tensor, "row entry"],
    slots_RN: Int[Tensor, "row entry"] | Int[Tensor, " entry"],
    top_k: int,
    buffers: Buffers,
    *,
    in_order: bool,
) -> Int[Tensor, "row top_k"]:
    """Select the largest scores of each row together with their slots.

    Args:
        scores_RN: Scores on the CPU.
        slots_RN: Slot of each score, below `2**32`.
        top_k: Scores to select.
        buffers: Reused memory; holds the result until the next call.
        in_order: Sort the selection, descending; otherwise its order is unspecified.

    Returns:
        The selection as 64-bit words: the ordered bits of the score, then the slot.
    """
    shape = (scores_RN.shape[0], scores_RN.shape[1])
    bits_RN = ordered_bits(
        scores_RN.view(torch.int32), buffers.take("pack.bits", shape, torch.int32)
    )
    packed_RN = buffers.take("pack.words", shape, torch.int64)
    packed_RN.copy_(bits_RN)
    packed_RN.bitwise_left_shift_(32).bitwise_or_(slots_RN)
    words = packed_RN.numpy()
    if in_order:
        words.sort(axis=1)
        return packed_RN[:, -top_k:].flip(1)
    if top_k < shape[1]:
        words.partition(shape[1] - top_k, axis=1)
    return packed_RN[:, -top_k:]


def unpack(
    packed_RK: Int[Tensor, "row top_k"],
) -> tuple[Float[Tensor, "row top_k"], Int[Tensor, "row top_k"]]:
    """Split the words of `sort_packed`.

    Args:
        packed_RK: Words.

    Returns:
        Scores and slots.
    """
    bits_RK = (packed_RK >> 32).to(torch.int32)
    scores_RK = ordered_bits(bits_RK, torch.empty_like(bits_RK)).view(torch.float32)
    return scores_RK, packed_RK & _LOW_WORD


def _members_of_best_groups(
    scores_RN: Tensor, top_k: int, buffers: Buffers, depth: int
) -> Int[Tensor, "row member"]:
    """Return the columns of the `top_k` groups with the largest maxima, and the ungrouped tail.

    Group `j` holds the columns `j`, `j + groups`, `j + 2 * groups`, ...: neighbours in time fall
    into different groups, and the maximum runs over contiguous rows.
    """
    num_rows, num_columns = scores_RN.shape
    groups = num_columns // GROUP
    maxima_RG = buffers.take(f"select.maxima{depth}", (num_rows, groups), torch.float32)
    torch.amax(scores_RN[:, : GROUP * groups].view(num_rows, GROUP, groups), dim=1, out=maxima_RG)
    best_RK = _best_columns(maxima_RG, top_k, buffers, depth + 1)
    tail = num_columns - GROUP * groups
    width = GROUP * top_k
    members_RM = buffers.take(f"select.members{depth}", (num_rows, width + tail), torch.int64)
    offsets = torch.arange(0, GROUP * groups, groups, device=scores_RN.device)
    torch.add(best_RK.unsqueeze(2), offsets, out=members_RM[:, :width].view(num_rows, top_k, GROUP))
    if tail:
        members_RM[:, width:] = torch.arange(num_columns - tail, num_columns, device=offsets.device)
    return members_RM


def _shortlist(
    scores_RN: Tensor, top_k: int, buffers: Buffers, depth: int
) -> tuple[Float[Tensor, "row member"], Int[Tensor, "row member"] | None]:
    """Leave out scores that cannot be among the largest, if that is cheaper than sorting them.

    Returns:
        Scores that hold the largest, and their columns; `None` for all columns in order.
    """
    num_columns = scores_RN.shape[1]
    if num_columns <= _SORTED_WIDTH or num_columns < 2 * GROUP * top_k:
        return scores_RN, None
    members_RM = _members_of_best_groups(scores_RN, top_k, buffers, depth)
    picked_RM = buffers.take(f"select.picked{depth}", tuple(members_RM.shape), torch.float32)
    return torch.gather(scores_RN, 1, members_RM, out=picked_RM), members_RM


def _best_columns(
    scores_RN: Tensor, top_k: int, buffers: Buffers, depth: int
) -> Int[Tensor, "row top_k"]:
    """Return the columns of the largest scores, in no order."""
    picked_RM, members_RM = _shortlist(scores_RN, top_k, buffers, depth)
    if _sorts_packed(picked_RM):
        columns = torch.arange(picked_RM.shape[1]) if members_RM is None else members_RM
        return sort_packed(picked_RM, columns, top_k, buffers, in_order=False) & _LOW_WORD
    columns_RK = picked_RM.topk(top_k, dim=1, sorted=False).indices
    return columns_RK if members_RM is None else members_RM.gather(1, columns_RK)


def _sorts_packed(scores_RN: Tensor) -> bool:
    return scores_RN.is_cpu and scores_RN.shape[1] <= 2 * _SORTED_WIDTH


def largest(
    scores_RN: Float[Tensor, "row entry"], top_k: int, buffers: Buffers
) -> tuple[Float[Tensor, "row top_k"], Int[Tensor, "row top_k"]]:
    """Return the largest scores of each row and their columns, descending.

    The shapes of all steps are known beforehand, so on CUDA nothing waits for the device.

    Args:
        scores_RN: Scores.
        top_k: Scores to return, at most `entry`.
        buffers: Reused memory.

    Returns:
        Scores and columns. The order of equal scores is not specified.
    """
    picked_RM, members_RM = _shortlist(scores_RN, top_k, buffers, 0)
    if _sorts_packed(picked_RM):
        columns = torch.arange(picked_RM.shape[1]) if members_RM is None else members_RM
        return unpack(sort_packed(picked_RM, columns, top_k, buffers, in_order=True))
    best_RK, columns_RK = picked_RM.topk(top_k, dim=1)
    return best_RK, columns_RK if members_RM is None else members_RM.gather(1, columns_RK)


def _chunks(
    num_problems: int, num_queries: int, num_entries: int, top_k: int, max_bytes: int
) -> tuple[int, int, int]:
    """Return how many problems, queries and entries share one buffer of float32 scores."""
    num_scores = max(1, max_bytes // 4)
    num_queries = max(1, num_queries)
    # fewer than 64 queries at once waste the matrix product; fewer than 8 top_k entries, the merge
    entries = min(num_entries, max(8 * top_k, num_scores // min(num_queries, 64)))
    queries = min(num_queries, max(1, num_scores // entries))
    problems = min(num_problems, max(1, num_scores // (entries * num_queries)))
    return problems, queries, entries


def product_top_k(
    queries_PQD: Float[Tensor, "problem query head_dim"],
    keys_PND: Float[Tensor, "problem entry head_dim"],
    excluded_PN: Bool[Tensor, "problem entry"] | None,
    top_k: int,
    max_bytes: int,
    buffers: Buffers,
    bias_PN: Float[Tensor, "problem entry"] | None = None,
) -> tuple[Float[Tensor, "problem query top_k"], Int[Tensor, "problem query top_k"]]:
    """Find the largest inner products of independent problems by float32 matrix products.

    Args:
        queries_PQD: Queries in float32.
        keys_PND: Keys of any floating type.
        excluded_PN: Entries that take no part; `None` if all do.
        top_k: Neighbours per query, at most `entry`.
        max_bytes: Size of the buffer of scores.
        buffers: Reused memory.
        bias_PN: Added to the scores of each entry.

    Returns:
        Scores, descending, and slots. Excluded entries have the score `EXCLUDED`.
    """
    num_problems, num_queries, _ = queries_PQD.shape
    num_entries = keys_PND.shape[1]
    scores_PQK = queries_PQD.new_empty(num_problems, num_queries, top_k)
    slots_PQK = torch.empty(scores_PQK.shape, dtype=torch.int64, device=queries_PQD.device)
    chunk_P, chunk_Q, chunk_N = _chunks(num_problems, num_queries, num_entries, top_k, max_bytes)
    for p in range(0, num_problems, chunk_P):
        for n in range(0, num_entries, chunk_N):
            keys = keys_PND[p : p + chunk_P, n : n + chunk_N]
            if keys.dtype is not torch.float32:
                wide = buffers.take("product.keys", tuple(keys.shape), torch.float32)
                keys = wide.copy_(keys)
            for q in range(0, num_queries, chunk_Q):
                block = (slice(p, p + chunk_P), slice(q, q + chunk_Q))
                queries = queries_PQD[block]
                shape = (queries.shape[0], queries.shape[1], keys.shape[1])
                scores = buffers.take("product.scores", shape, torch.float32)
                if bias_PN is None:
                    torch.bmm(queries, keys.transpose(1, 2), out=scores)
                else:
                    bias = bias_PN[block[0], None, n : n + chunk_N].expand(shape)
                    torch.baddbmm(bias, queries, keys.transpose(1, 2), out=scores)
                if excluded_PN is not None:
                    scores.masked_fill_(excluded_PN[block[0], None, n : n + chunk_N], EXCLUDED)
                kept = min(top_k, shape[2])
                found, columns = largest(scores.flatten(0, 1), kept, buffers)
                found, columns = found.view(*shape[:2], kept), columns.view(*shape[:2], kept) + n
                if n > 0:
                    found = torch.cat([scores_PQK[block], found], dim=2)
                    columns = torch.cat([slots_PQK[block], columns], dim=2)
                    found, best = found.topk(top_k, dim=2)
                    columns = columns.gather(2, best)
                scores_PQK[block], slots_PQK[block] = found, columns
    return scores_PQK, slots_PQK
