"""Which store a layout asks for."""

from collections.abc import Callable
from typing import TypeAlias

import torch

from byheart.memory.config import KnnMemoryConfig
from byheart.memory.dense import DenseStore
from byheart.memory.layout import MemoryLayout
from byheart.memory.store import MemoryStore

MakeStore: TypeAlias = Callable[[int, int, int, int], MemoryStore]
"""Makes an empty store of so many rows, key-value heads, slots, and numbers per head."""


def empty_stores(
    layout: MemoryLayout,
    batch_size: int,
    memory_size: int | None,
    device: torch.device | None,
    make_store: MakeStore | None = None,
) -> dict[int, MemoryStore]:
    """Make the empty store of each memory layer.

    Args:
        layout: The model's layout.
        batch_size: Rows.
        memory_size: Entries per row and head if not the layout's; 0 for no store.
        device: Where dense stores live.
        make_store: Makes the stores instead.

    Returns:
        Stores by layer; empty without a memory.

    Raises:
        ValueError: If the size is negative or below the number of buckets, or the layout has no
            memory to give it to.
    """
    knn = layout.knn_memory
    size = memory_size if memory_size is not None or knn is None else knn.memory_size
    if size is not None and size < 0:
        msg = f"memory_size must be 0 (no memory) or more, got {size}."
        raise ValueError(msg)
    if knn is None and size:
        msg = f"The model has no kNN memory, got memory_size={size}. Pass memory_size=None."
        raise ValueError(msg)
    if knn is None or not size:
        return {}
    num_buckets = _num_buckets(knn) or 1
    if make_store is None and size < num_buckets:
        msg = (
            f"memory_size must be 0 or at least the {num_buckets} buckets of the strided search, "
            f"got {size}. Raise it, or use search='exact'."
        )
        raise ValueError(msg)
    make = make_store or _maker(layout, device)
    shape = (batch_size, layout.num_kv_heads, size, layout.head_dim)
    return {layer: make(*shape) for layer in knn.layers}


def _num_buckets(knn: KnnMemoryConfig) -> int | None:
    return (knn.num_buckets or knn.top_k) if knn.search == "strided_bucket" else None


def _maker(layout: MemoryLayout, device: torch.device | None) -> MakeStore:
    knn = layout.knn_memory
    assert knn is not None
    if knn.store == "faiss":
        from byheart.memory.faiss_store import FaissStore

        return lambda *shape: FaissStore.empty(*shape, dtype=knn.torch_dtype)
    num_buckets = _num_buckets(knn)
    return lambda *shape: DenseStore.empty(
        *shape,
        dtype=knn.torch_dtype,
        device=device,
        num_buckets=num_buckets,
        empty_as_zero=layout.empty_slots == "zeros",
    )
