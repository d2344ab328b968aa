"""Read many documents of any lengths side by side: a row that is done gets the next document."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any, Protocol, TypeAlias, runtime_checkable

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from byheart.adapters.recurrent import RecurrentMemory
from byheart.adapters.segment_graph import SegmentGraph, SegmentGraphs
from byheart.memory.recurrent import RecurrentState
from byheart.models.eval_mode import eval_mode
from byheart.ops.segments import segment_bounds

__all__ = ["Document", "DocumentRead", "DocumentTokens", "read_documents"]


@runtime_checkable
class Document(Protocol):
    """A document that gives its tokens piece by piece, so that it never has to be held whole."""

    @property
    def num_tokens(self) -> int:
        """Its length."""
        ...

    def tokens(self, start: int, stop: int) -> Int[np.ndarray, " _piece"]:
        """Return the tokens from `start` to `stop`."""
        ...


DocumentTokens: TypeAlias = (
    Document | Sequence[int] | Int[np.ndarray, " _tokens"] | Int[Tensor, " _tokens"]
)
"""A document, or all of its tokens."""


@dataclass(frozen=True, kw_only=True, eq=False)
class DocumentRead:
    """A document that has been read to its end."""

    index: int
    """Which one, counted from 0 in the order they were given."""
    num_tokens: int
    """Its length."""
    logits: Float[Tensor, " scores"]
    """Scores of a classifier's labels, or of the token behind the last; as the model gives them."""
    state: RecurrentState
    """What the model remembers of it, one row: to read on, to generate from, or to save."""


def read_documents(
    memory_model: RecurrentMemory,
    documents: Iterable[DocumentTokens],
    *,
    rows: int = 32,
    segments_per_call: int = 8,
    cuda_graphs: bool | None = None,
    on_tokens: Callable[[int], None] | None = None,
) -> Iterator[DocumentRead]:
    """Read documents with a model in evaluation mode, without a gradient.

    As many as `rows` are read at a time, each from its start; as soon as one ends, the next takes
    its row. So the batch stays full whatever their lengths are, and each document is read as if it
    were alone. The documents may be a generator: one is taken when there is a row for it.

    Args:
        memory_model: A classifier or language model.
        documents: The documents, each with at least one token.
        rows: Most documents at a time.
        segments_per_call: Most segments of each that are given to the model at once; one with a
            kNN memory, and where `alignment` is `center`.
        cuda_graphs: Whether whole segments, up to the last of a document, are read by a CUDA graph
            of the segment step; `None` on a GPU for families where that is known to work, once
            enough segments are read to pay for the recording.
        on_tokens: Called after every call with the number of tokens it has read; with a graph once
            so many segments are on their way to the GPU.

    Returns:
        Each document when its end has been read, so short ones may come before earlier long ones.

    Raises:
        ValueError: If a number is below 1, the model is an encoder-decoder, `cuda_graphs` is true
            for what cannot be a graph, or, when its turn comes, a document is empty, not whole
            numbers in a row, or gives fewer tokens than it has said.
    """
    for name, value in (("rows", rows), ("segments_per_call", segments_per_call)):
        if value < 1:
            msg = f"{name} must be at least 1, got {value}."
            raise ValueError(msg)
    if memory_model.kind == "encoder-decoder":
        msg = (
            "read_documents is for classifiers and language models, got "
            f"{type(memory_model.model).__name__}. Call encode or generate."
        )
        raise ValueError(msg)
    width = 1 if _one_at_a_time(memory_model) else segments_per_call
    graphs = SegmentGraphs(memory_model, cuda_graphs)
    return _documents(memory_model, documents, rows, width, graphs, on_tokens)


def _documents(
    memory_model: RecurrentMemory,
    documents: Iterable[DocumentTokens],
    rows: int,
    width: int,
    graphs: SegmentGraphs,
    on_tokens: Callable[[int], None] | None,
) -> Iterator[DocumentRead]:
    waiting = (_Row.begin(memory_model, *item) for item in enumerate(documents))
    active = list(islice(waiting, rows))
    state = memory_model.new_state(len(active)) if active else None
    while state is not None:
        starts = [row.is_new for row in active]
        whole = min(row.whole_segments_left for row in active)
        if graphs.are_for(len(active), whole):
            before = state.start_documents(torch.tensor(starts, device=state.memory.device))
            memory = memory_model.first_memory(before)
            memory = _replay(graphs.graph, memory, active, whole, width, on_tokens)
            state = _after_segments(before, memory, whole)
            continue
        count = min(width, min(row.segments_left for row in active))
        pieces = [row.take(count) for row in active]
        ends = not all(row.segments_left for row in active)
        logits, state = _read(memory_model, pieces, state, starts=starts, ends=ends)
        graphs.add(min(count, whole))
        if on_tokens is not None:
            on_tokens(sum(map(len, pieces)))
        for place, row in enumerate(active):
            if not row.segments_left:
                assert logits is not None
                yield DocumentRead(
                    index=row.index,
                    num_tokens=row.document.num_tokens,
                    # a view would keep those of all rows
                    logits=logits[place].clone(),
                    state=state.select_rows(torch.tensor([place], device=logits.device)),
                )
        active, state = _refill(active, waiting, state)


def _one_at_a_time(memory_model: RecurrentMemory) -> bool:
    # segments of `center` are not full, so that only their ends keep them apart; a kNN memory is
    # written when a call is committed
    inner = memory_model.layout.inner
    has_knn = inner is not None and inner.knn_memory is not None
    return has_knn or memory_model.memory_config.alignment == "center"


class _Row:
    """A document, and how much of it has been read."""

    def __init__(
        self, index: int, document: Document, bounds: list[tuple[int, int]], length: int
    ) -> None:
        self.index = index
        self.document = document
        self._length = length
        self._bounds = bounds
        self._next = 0

    @classmethod
    def begin(cls, memory_model: RecurrentMemory, index: int, document: Any) -> "_Row":
        config = memory_model.memory_config
        whole = document if isinstance(document, Document) else _Tokens(document, index)
        bounds = segment_bounds(whole.num_tokens, config.segment_length, config.alignment)
        if not bounds:
            msg = f"Every document must have at least one token, number {index} has none."
            raise ValueError(msg)
        return cls(index, whole, bounds, config.segment_length)

    @property
    def is_new(self) -> bool:
        return self._next == 0

    @property
    def segments_left(self) -> int:
        return len(self._bounds) - self._next

    @property
    def whole_segments_left(self) -> int:
        """Segments of full length that come next; without the last, whose scores are wanted."""
        start, stop = self._bounds[self._next]
        # only the first segment of a document and its last may be short
        return self.segments_left - 1 if stop - start == self._length else 0

    def take(self, count: int) -> Int[np.ndarray, " _piece"]:
        """Take the next `count` segments.

        Returns:
            Their tokens.

        Raises:
            ValueError: If the document gives fewer tokens than it has said.
        """
        cuts = self._bounds[self._next : self._next + count]
        self._next += count
        start, stop = cuts[0][0], cuts[-1][1]
        piece = self.document.tokens(start, stop)
        if len(piece) != stop - start:
            msg = (
                f"Document {self.index} must give its tokens {start} to {stop}, as it has "
                f"num_tokens {self.document.num_tokens}, got {len(piece)} of them."
            )
            raise ValueError(msg)
        return piece


class _Tokens:
    """A document of which all tokens are at hand."""

    def __init__(self, tokens: Any, index: int) -> None:
        found = tokens.cpu().numpy() if isinstance(tokens, Tensor) else np.asarray(tokens)
        if found.ndim != 1 or (len(found) and not np.issubdtype(found.dtype, np.integer)):
            msg = (
                f"Document {index} must be token ids in a row, got {found.dtype} of the shape "
                f"{list(found.shape)}. Give tensors of a tokenizer as input_ids[0]."
            )
            raise ValueError(msg)
        self._tokens = found

    @property
    def num_tokens(self) -> int:
        return len(self._tokens)

    def tokens(self, start: int, stop: int) -> Int[np.ndarray, " _piece"]:
        return self._tokens[start:stop]


def _refill(
    active: list[_Row], waiting: Iterator[_Row], state: RecurrentState
) -> tuple[list[_Row], RecurrentState | None]:
    """Give the rows of documents that are done to those that wait, and drop rows left over.

    Returns:
        The rows, and their state: that of a row with a new document is still the old one's.
    """
    rows = [row if row.segments_left else next(waiting, None) for row in active]
    kept = [place for place, row in enumerate(rows) if row is not None]
    if not kept:
        return [], None
    if len(kept) < len(rows):
        state = state.select_rows(torch.tensor(kept, device=state.memory.device))
    return [row for row in rows if row is not None], state


def _replay(
    graph: SegmentGraph,
    memory: Float[Tensor, "rows memory embed_dim"],
    active: Sequence[_Row],
    count: int,
    width: int,
    on_tokens: Callable[[int], None] | None,
) -> Float[Tensor, "rows memory embed_dim"]:
    """Read the next `count` segments of each row, all of full length, `width` at a time.

    Returns:
        The memory after them.
    """
    graph.start(memory)
    for done in range(0, count, width):
        pieces = [row.take(min(width, count - done)) for row in active]
        graph.read(_on_device(_batch(pieces)[0], graph.device))
        if on_tokens is not None:
            on_tokens(sum(map(len, pieces)))
    return graph.memory()


def _after_segments(
    before: RecurrentState, memory: Float[Tensor, "rows memory embed_dim"], count: int
) -> RecurrentState:
    """Count `count` segments of full length of every row, behind which nothing is pending.

    Returns:
        The state after them.
    """
    return replace(
        before,
        memory=memory,
        num_segments=before.num_segments + count,
        position=before.position + count * before.layout.segment_length,
    )


def _on_device(input_ids: Int[Tensor, "rows tokens"], device: torch.device) -> Tensor:
    # from pageable memory the host would wait for all that the GPU has to do
    pinned = input_ids.pin_memory() if device.type == "cuda" else input_ids
    return pinned.to(device, non_blocking=True)


@torch.no_grad()
def _read(
    memory_model: RecurrentMemory,
    pieces: Sequence[Int[np.ndarray, " _piece"]],
    state: RecurrentState,
    *,
    starts: Sequence[bool],
    ends: bool,
) -> tuple[Float[Tensor, "rows scores"] | None, RecurrentState]:
    """Read a piece of each row.

    Returns:
        Scores at the end of each piece, for a language model only if one of them `ends`; and the
        state after the pieces.
    """
    device = state.memory.device
    input_ids, mask = _batch(pieces)
    is_decoder = memory_model.kind == "decoder"
    with eval_mode(memory_model):
        output = memory_model(
            _on_device(input_ids, device),
            attention_mask=None if mask is None else mask.to(device),
            state=state,
            document_start=torch.tensor(starts, device=device),
            logits_to_keep=int(ends) if is_decoder else None,
        )
    logits = output.logits
    if is_decoder:
        logits = logits[:, 0] if ends else None
    return logits, state.commit(output.new_entries)


def _batch(
    pieces: Sequence[Int[np.ndarray, " _piece"]],
) -> tuple[Int[Tensor, "rows tokens"], Bool[Tensor, "rows tokens"] | None]:
    # padding is before the text: then the last column is the last token of each row
    width = max(map(len, pieces))
    ids = np.zeros((len(pieces), width), dtype=np.int64)
    for row, piece in enumerate(pieces):
        ids[row, width - len(piece) :] = piece
    input_ids = torch.from_numpy(ids)
    lengths = torch.tensor([len(piece) for piece in pieces])
    if bool((lengths == width).all()):
        return input_ids, None
    return input_ids, torch.arange(width) >= width - lengths[:, None]
