"""How a kNN memory is kept and read."""

from dataclasses import dataclass
from typing import Literal

import torch

from byheart.choices import require_choices, require_finite, require_whole


@dataclass(frozen=True, kw_only=True, slots=True)
class KnnMemoryConfig:
    """Retrieval over the keys and values of earlier segments."""

    layers: tuple[int, ...]
    """Decoder layers that read the memory, counted from 0 (the paper: 8 of 12)."""
    memory_size: int = 8192
    """Entries kept per row and head; the oldest leave first."""
    top_k: int = 32
    """Entries retrieved per query (the paper: 32)."""
    combine: Literal["gate", "joint", "content_gate"] = "gate"
    """How memory and local attention are mixed: one learned gate per head (the paper), one softmax
    over both, or a gate per head that depends on the token."""
    age_slope: float = 0.0
    """How much recent entries are preferred: an entry's weight in the softmax is divided by its age
    to this power, and the entries with the largest weights are retrieved (the paper: 0). Keys have
    no position, so without it the old entries of a larger memory count as much as the new ones;
    try 0.5."""
    write: Literal["segment", "evicted"] = "segment"
    """What enters memory when a segment is complete: the segment (the paper; the XL cache then
    shows it a second time), or the tokens that leave the XL cache."""
    search: Literal["exact", "strided_bucket"] = "exact"
    """Exact top-k, or the best entry of each of `num_buckets` strided buckets (authors' code)."""
    num_buckets: int | None = None
    """Buckets of the strided search; `None` means `top_k` (recall about 0.65, see benchmarks)."""
    store: Literal["dense", "faiss"] = "dense"
    """Exact search in torch, or a faiss inverted-file index: approximate, CPU, `byheart[faiss]`."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Precision of the stored keys and values."""

    def __post_init__(self) -> None:
        require_choices(self)
        require_finite(self)
        require_whole(self)
        if not self.layers:
            msg = "knn_memory.layers must name at least one layer. Pass knn_memory=None for none."
            raise ValueError(msg)
        if self.memory_size < 1:
            msg = f"memory_size must be at least 1, got {self.memory_size}."
            raise ValueError(msg)
        if not 1 <= self.top_k <= self.memory_size:
            msg = (
                f"top_k must be between 1 and memory_size ({self.memory_size}), got {self.top_k}. "
                "Lower top_k or raise memory_size."
            )
            raise ValueError(msg)
        if self.age_slope < 0:
            msg = f"age_slope must be at least 0, got {self.age_slope}."
            raise ValueError(msg)
        if self.num_buckets is not None and self.search == "exact":
            msg = "num_buckets has no effect with search='exact'. Use search='strided_bucket'."
            raise ValueError(msg)
        if self.search == "strided_bucket":
            self._check_buckets()

    def _check_buckets(self) -> None:
        buckets = self.num_buckets or self.top_k
        if self.store != "dense":
            msg = f"search='strided_bucket' needs store='dense', got store={self.store!r}."
            raise ValueError(msg)
        if self.memory_size % buckets or buckets < self.top_k:
            msg = (
                f"num_buckets must divide memory_size ({self.memory_size}) and be at least top_k "
                f"({self.top_k}), got {buckets}."
            )
            raise ValueError(msg)

    @property
    def torch_dtype(self) -> torch.dtype:
        """The torch dtype of the stored keys and values."""
        return {"float32": torch.float32, "bfloat16": torch.bfloat16}[self.dtype]
