"""Read documents in rows and add up the losses."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float64, Int64, UInt
from torch import nn

from byheart.data.corpus import TokenizedCorpus
from byheart.data.rows import RowPosition, SegmentDataset, collate
from byheart.evaluation.result import POSITION_EDGES, PositionBucket
from byheart.memory.state import MemoryState
from byheart.models.eval_mode import eval_mode
from byheart.models.segment_model import SegmentModel
from byheart.ops.losses import IGNORED


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put a model into eval mode without gradients, and restore each module's mode afterwards.

    Args:
        model: The model.
    """
    with eval_mode(model), torch.inference_mode():
        yield


class Setting(NamedTuple):
    """What a measurement varies."""

    memory_size: int
    """Entries per row and head of the kNN memory; 0 for none."""
    xl_cache_length: int
    """Previous tokens in the XL cache; 0 hides them."""


class FirstDocuments:
    """The first documents of a corpus, as a corpus.

    Args:
        corpus: The whole corpus.
        max_documents: How many at most; `None` for all.
    """

    def __init__(self, corpus: TokenizedCorpus, max_documents: int | None) -> None:
        self.whole = corpus
        self.lengths = corpus.lengths[:max_documents]
        """Tokens of each document, the start token included."""
        self.document_ids = corpus.document_ids[:max_documents]
        """Identifier of each document."""

    @property
    def fingerprint(self) -> str:
        """Hash of the whole corpus."""
        return self.whole.fingerprint

    def document(self, index: int) -> UInt[np.ndarray, " token"]:
        """Look at the tokens of one document.

        Args:
            index: Which document, counted from 0.

        Returns:
            All its tokens, the start token first.
        """
        return self.whole.document(index)


class CorpusReader:
    """Reads the segments of a one-pass plan step by step and sums the losses in float64.

    It holds one segment of each row and the memory, whatever the documents' length. To be used
    inside `evaluating`.

    Args:
        model: The model.
        dataset: The segments.
        setting: Memory size and XL cache.
    """

    def __init__(self, model: SegmentModel, dataset: SegmentDataset, setting: Setting) -> None:
        self._model = model
        self._dataset = dataset
        self._hides_cache = setting.xl_cache_length == 0
        self._rows = list(range(dataset.plan.num_rows))
        self._state = model.new_state(len(self._rows), memory_size=setting.memory_size)
        num_documents = len(dataset.plan.document_tokens)
        self.nats_per_document = np.zeros(num_documents)
        """Summed loss of each document of the corpus so far."""
        self.tokens_per_document = np.zeros(num_documents, dtype=np.int64)
        """Tokens predicted of each document of the corpus so far."""
        self.peak_state_bytes = num_state_bytes(self._state)
        """Largest size of the memory state so far."""
        self._nats_per_bucket = np.zeros(len(POSITION_EDGES))
        self._tokens_per_bucket = np.zeros(len(POSITION_EDGES), dtype=np.int64)

    @property
    def num_tokens(self) -> int:
        """Tokens predicted so far."""
        return int(self.tokens_per_document.sum())

    def read(self, step: int) -> None:
        """Read the segments of one step; steps must come in order.

        Args:
            step: Step of the plan, counted from 0.
        """
        plan = self._dataset.plan
        positions = [plan.position(step, row) for row in self._rows]
        busy = [index for index, position in enumerate(positions) if position is not None]
        # an idle row stays idle: halving the batch copies each memory a few times at most
        if 2 * len(busy) <= len(self._rows):
            device = self._state.position.device
            self._state = self._state.select_rows(torch.tensor(busy, device=device))
            self._rows = [self._rows[index] for index in busy]
            positions = [positions[index] for index in busy]
        self._read_segments(step, positions)

    def _read_segments(self, step: int, positions: list[RowPosition | None]) -> None:
        first_item = step * self._dataset.plan.num_rows
        batch = collate([self._dataset[first_item + row] for row in self._rows])
        idle = batch["num_tokens"] == 0
        device = self._state.position.device
        # rows without an unfinished segment let attention take the path for whole segments
        document_start = (batch["document_start"] | idle).to(device)
        state = self._state.at_segment_start(document_start)
        out = self._model(
            batch["input_ids"].to(device),
            state=state.without_xl_cache() if self._hides_cache else state,
            document_start=document_start,
            num_tokens=batch["num_tokens"].to(device),
            targets=batch["labels"].to(device),
        )
        self._state = self._state.commit(out.new_entries)
        self.peak_state_bytes = max(self.peak_state_bytes, num_state_bytes(self._state))
        losses = out.token_losses.cpu().double().numpy()
        predicted = (batch["labels"] != IGNORED).numpy()
        for position, nats, counts in zip(positions, losses, predicted, strict=True):
            if position is not None:
                self._add(position, nats[counts], np.flatnonzero(counts))

    def _add(
        self,
        position: RowPosition,
        nats: Float64[np.ndarray, " prediction"],
        columns: Int64[np.ndarray, " prediction"],
    ) -> None:
        self.nats_per_document[position.document] += nats.sum()
        self.tokens_per_document[position.document] += len(nats)
        buckets = np.searchsorted(POSITION_EDGES, position.offset + columns, side="right") - 1
        num_buckets = len(POSITION_EDGES)
        self._nats_per_bucket += np.bincount(buckets, weights=nats, minlength=num_buckets)
        self._tokens_per_bucket += np.bincount(buckets, minlength=num_buckets)

    def buckets(self) -> tuple[PositionBucket, ...]:
        """Give the losses by position in the document.

        Returns:
            The buckets, from the start of the documents on.
        """
        ends = (*POSITION_EDGES[1:], None)
        return tuple(
            PositionBucket(start=start, end=end, num_tokens=int(num_tokens), nats=float(nats))
            for start, end, num_tokens, nats in zip(
                POSITION_EDGES, ends, self._tokens_per_bucket, self._nats_per_bucket, strict=True
            )
        )


def num_state_bytes(state: MemoryState) -> int:
    """Add up the keys and values that a state holds.

    Args:
        state: The state.

    Returns:
        Bytes of XL caches, unfinished segments and kNN memories, all rows together; what an
        approximate index adds is not counted.
    """
    held = [side for layer in (*state.xl_cache, *(state.pending or ())) for side in layer]
    # an XL cache may be a view of the segment it came from, which is held as a whole
    storages = {side.untyped_storage().data_ptr(): side.untyped_storage() for side in held}
    num_bytes = sum(storage.nbytes() for storage in storages.values())
    layout = state.layout
    if layout.knn_memory is not None:
        width = layout.num_kv_heads * layout.head_dim * layout.knn_memory.torch_dtype.itemsize
        num_bytes += 2 * width * state.batch_size * state.memory_size * len(state.stores)
    return num_bytes
