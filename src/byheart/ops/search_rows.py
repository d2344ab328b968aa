"""Exact search on the CPU: each row over its valid entries only, heads side by side.

Between its products the search of a head is many small operations, each on one core. Heads do not
depend on one another, so each is searched by a thread of its own, for whose operations there are as
many cores as are left for it.
"""

import os
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from byheart.ops.search_head import search_head
from byheart.ops.search_select import EXCLUDED, buffers_on

# each has scores of its own, which are to stay in the cache
_MOST_THREADS = 8

# seconds after which threads that did not start are done without
_PATIENCE = 30.0


class _Head(NamedTuple):
    """What one search needs."""

    place: tuple[int, int]
    """Row and key-value head."""
    queries: Float[Tensor, "query head_dim"]
    keys: Float[Tensor, "slot head_dim"]
    present: Int[Tensor, " entry"]
    """Slots that hold an entry."""
    bias: Float[Tensor, " entry"] | None


@lru_cache(maxsize=1)
def _threads(num_cores: int, process_id: int) -> ThreadPoolExecutor:
    """Start threads that share some cores. A forked process has its own.

    Returns:
        The threads, which stay until as many cores are no longer used.
    """
    del process_id
    num_threads = min(num_cores, _MOST_THREADS)
    all_here = threading.Barrier(num_threads, timeout=_PATIENCE)

    def start() -> None:
        # holds for the thread that calls it, and for those that have not asked when it is called
        torch.set_num_threads(num_cores // num_threads)
        torch.get_num_threads()

    pool = ThreadPoolExecutor(num_threads, "byheart-search", initializer=start)
    try:
        for waiting in [pool.submit(all_here.wait) for _ in range(num_threads)]:
            waiting.result()
    finally:
        torch.set_num_threads(num_cores)
    return pool


def _search(
    head: _Head, top_k: int, max_bytes: int, scan_dtype: torch.dtype | None
) -> tuple[Tensor, Tensor]:
    num_present = len(head.present)
    has_gaps = int(head.present[-1]) + 1 != num_present
    keys_ND = head.keys.index_select(0, head.present) if has_gaps else head.keys[:num_present]
    # threads do not inherit these from the one that asks
    with torch.no_grad(), buffers_on(head.keys.device) as buffers:
        scores, slots = search_head(
            head.queries, keys_ND, head.bias, top_k, max_bytes, scan_dtype, buffers
        )
        return scores, head.present[slots] if has_gaps else slots


def _heads(
    queries_BGQD: Tensor, keys_BGND: Tensor, valid_BN: Tensor, bias_BN: Tensor | None
) -> Iterator[_Head]:
    for row, (queries_GQD, keys_GND) in enumerate(zip(queries_BGQD, keys_BGND, strict=True)):
        present = valid_BN[row].nonzero().squeeze(1)
        bias = None if bias_BN is None else bias_BN[row].index_select(0, present)
        for group, (queries_QD, keys_ND) in enumerate(zip(queries_GQD, keys_GND, strict=True)):
            if len(present) > 0:
                yield _Head((row, group), queries_QD, keys_ND, present, bias)


def _side_by_side(heads: list[_Head], *arguments: list[Any]) -> Iterator[tuple[Tensor, Tensor]]:
    num_cores = torch.get_num_threads()
    # few heads leave cores idle, unless each has all of them
    if 2 * len(heads) > min(num_cores, _MOST_THREADS) > 1:
        # no thread starts once the main thread has ended
        with suppress(RuntimeError):
            return _threads(num_cores, os.getpid()).map(_search, heads, *arguments)
    return map(_search, heads, *arguments)


def search_rows(
    queries_BGQD: Float[Tensor, "batch kv_heads query head_dim"],
    keys_BGND: Float[Tensor, "batch kv_heads entry head_dim"],
    valid_BN: Bool[Tensor, "batch entry"],
    bias_BN: Float[Tensor, "batch entry"] | None,
    top_k: int,
    max_bytes: int,
    scan_dtype: torch.dtype | None,
) -> tuple[
    Float[Tensor, "batch kv_heads query top_k"],
    Int[Tensor, "batch kv_heads query top_k"],
    Bool[Tensor, "batch kv_heads query top_k"],
]:
    """Find the keys with the largest inner products.

    Args:
        queries_BGQD: Queries in float32, those of one key-value head together.
        keys_BGND: All slots, of any type.
        valid_BN: Slots that hold an entry.
        bias_BN: Added to the scores of each entry.
        top_k: Neighbours per query.
        max_bytes: Bytes of scores that a thread holds at a time.
        scan_dtype: Precision of the first pass; `None` for the faster one.

    Returns:
        Scores, slots and validity.
    """
    shape = (*queries_BGQD.shape[:3], top_k)
    scores = torch.full(shape, EXCLUDED)
    slots = torch.zeros(shape, dtype=torch.int64)
    is_valid = torch.zeros(shape, dtype=torch.bool)
    heads = list(_heads(queries_BGQD, keys_BGND, valid_BN, bias_BN))
    counts = [min(top_k, len(head.present)) for head in heads]
    arguments = (heads, counts, [max_bytes] * len(heads), [scan_dtype] * len(heads))
    for head, count, (best, where) in zip(heads, counts, _side_by_side(*arguments), strict=True):
        scores[head.place][:, :count], slots[head.place][:, :count] = best, where
        is_valid[head.place][:, :count] = True
    return scores, slots, is_valid
