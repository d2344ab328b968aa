"""Perplexity of a corpus by memory size, with and without the XL cache."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import numpy as np
from jaxtyping import UInt

from byheart.data.corpus import TokenizedCorpus
from byheart.data.rows import RowPlan, SegmentDataset
from byheart.data.tokenize import Tokenizer
from byheart.errors import DataError
from byheart.evaluation.reading import CorpusReader, FirstDocuments, Setting, evaluating
from byheart.evaluation.result import DocumentLoss, Measurement, PerplexityResult
from byheart.memory.layout import MemoryLayout
from byheart.models.segment_model import SegmentModel

__all__ = ["EvaluationProgress", "evaluate_perplexity"]


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluationProgress:
    """How far `evaluate_perplexity` has come."""

    memory_size: int
    """Memory size of the measurement under way."""
    xl_cache_length: int
    """Its XL cache length; 0 for none."""
    num_tokens: int
    """Tokens predicted so far, all measurements together."""
    total_tokens: int
    """Tokens to predict, all measurements together."""


def evaluate_perplexity(  # noqa: PLR0913, all of them are what a reader of the result asks about
    model: SegmentModel,
    corpus: TokenizedCorpus,
    *,
    memory_sizes: Sequence[int | None],
    rows: int = 1,
    max_documents: int | None = None,
    max_tokens_per_document: int | None = None,
    xl_cache: Literal["with", "without", "both"] = "with",
    tokenizer: Tokenizer | None = None,
    on_progress: Callable[[EvaluationProgress], None] | None = None,
) -> PerplexityResult:
    """Measure how well a model predicts documents with memories of several sizes.

    Every document is read from its start with an empty memory, and each of its tokens but the
    first, which is the start token if there is one, is predicted once. Losses are added up in
    float64. What is held at a time is one segment of each row, whatever the documents' length.

    Args:
        model: A `Decoder`, or a pretrained model with memory; its weights and modes are left as
            they are.
        corpus: The documents.
        memory_sizes: Entries per row and head; 0 for none, `None` for the model's own size. A size
            may be larger than the one the model was trained with.
        rows: Documents read side by side. Changes the speed, not the result.
        max_documents: Read only the first so many documents.
        max_tokens_per_document: Read only this many tokens of a document, start token included.
        xl_cache: Whether the tokens see the XL cache; `"without"` empties it before each segment.
        tokenizer: The corpus's tokenizer. Needed for bits per byte only if documents are cut
            off or have no start token.
        on_progress: Called after every segment.

    Returns:
        One measurement per XL cache setting and memory size.

    Raises:
        ValueError: If a number is out of range, the sizes are none or repeated, the model has no
            kNN memory or XL cache to vary, documents are longer than the model can tell apart, or
            corpus, tokenizer and model do not fit together.
        DataError: If no document has a token to predict.
    """
    settings = _settings(model.memory_layout, memory_sizes, xl_cache)
    _check_fit(model.vocab_size, corpus, tokenizer)
    _check_limits(rows, max_documents, max_tokens_per_document)
    dataset = _segments(
        corpus, model.memory_layout.segment_length, rows, max_documents, max_tokens_per_document
    )
    model.require_document_fits(
        int(dataset.plan.document_tokens.max()) - 1,
        "Read fewer tokens of each: max_tokens_per_document.",
    )
    num_bytes = _num_bytes_predicted(corpus, dataset.plan, tokenizer)
    num_tokens = int((dataset.plan.document_tokens - 1).clip(min=0).sum())

    def report(number: int, num_read: int) -> None:
        if on_progress is not None:
            progress = EvaluationProgress(
                **settings[number]._asdict(),
                num_tokens=number * num_tokens + num_read,
                total_tokens=len(settings) * num_tokens,
            )
            on_progress(progress)

    measurements = tuple(
        _measure(model, dataset, setting, num_bytes, partial(report, number))
        for number, setting in enumerate(settings)
    )
    return PerplexityResult(
        measurements=measurements,
        segment_length=model.memory_layout.segment_length,
        corpus_fingerprint=corpus.fingerprint,
    )


def _measure(
    model: SegmentModel,
    dataset: SegmentDataset,
    setting: Setting,
    num_bytes: Mapping[int, int | None],
    report: Callable[[int], None],
) -> Measurement:
    started = time.perf_counter()
    with evaluating(model):
        reader = CorpusReader(model, dataset, setting)
        for step in range(dataset.plan.num_steps):
            reader.read(step)
            report(reader.num_tokens)
    documents = tuple(
        DocumentLoss(
            document_id=dataset.corpus.document_ids[index],
            num_tokens=int(reader.tokens_per_document[index]),
            nats=float(reader.nats_per_document[index]),
            num_bytes=bytes_predicted,
        )
        for index, bytes_predicted in num_bytes.items()
    )
    return Measurement(
        **setting._asdict(),
        documents=documents,
        buckets=reader.buckets(),
        seconds=time.perf_counter() - started,
        peak_state_bytes=reader.peak_state_bytes,
    )


def _settings(
    layout: MemoryLayout, memory_sizes: Sequence[int | None], xl_cache: str
) -> list[Setting]:
    knn = layout.knn_memory
    sizes = []
    for size in memory_sizes:
        own = 0 if knn is None else knn.memory_size
        sizes.append(own if size is None else size)
    if not sizes or min(sizes) < 0:
        msg = f"memory_sizes must be at least one size of 0 or more, got {list(memory_sizes)}."
        raise ValueError(msg)
    if knn is None and any(sizes):
        msg = (
            f"A model without kNN memory can only be measured with memory size 0, got {max(sizes)}."
            " Pass memory_sizes=[0]."
        )
        raise ValueError(msg)
    repeated = [size for index, size in enumerate(sizes) if size in sizes[:index]]
    if repeated:
        msg = f"memory_sizes must not repeat a size, got {repeated[0]} twice."
        raise ValueError(msg)
    if knn is not None and knn.search == "strided_bucket":
        for size in filter(None, sizes):
            # refuses a size that the buckets do not divide
            replace(knn, memory_size=size)
    return [Setting(size, length) for length in _cache_lengths(layout, xl_cache) for size in sizes]


def _cache_lengths(layout: MemoryLayout, xl_cache: str) -> tuple[int, ...]:
    own = layout.xl_cache_length
    lengths = {"with": (own,), "without": (0,), "both": (own, 0)}
    if xl_cache not in lengths:
        msg = f"xl_cache must be one of {', '.join(lengths)}, got {xl_cache!r}."
        raise ValueError(msg)
    if xl_cache != "with" and own == 0:
        msg = f"xl_cache={xl_cache!r} needs a model with an XL cache. Pass xl_cache='with'."
        raise ValueError(msg)
    return lengths[xl_cache]


def _check_fit(vocab_size: int, corpus: TokenizedCorpus, tokenizer: Tokenizer | None) -> None:
    if corpus.manifest.vocab_size > vocab_size:
        msg = (
            f"The corpus must use at most the model's vocabulary of {vocab_size} tokens, "
            f"its tokenizer has {corpus.manifest.vocab_size}. "
            "Tokenize the documents with the model's tokenizer."
        )
        raise ValueError(msg)
    made_by = corpus.manifest.tokenizer_fingerprint
    if tokenizer is not None and tokenizer.fingerprint != made_by:
        msg = (
            f"tokenizer must be the one the corpus was made with ({made_by[:12]}), got "
            f"{tokenizer.fingerprint[:12]}. Pass that one, or tokenize the documents again."
        )
        raise ValueError(msg)


def _check_limits(rows: int, max_documents: int | None, max_tokens: int | None) -> None:
    for name, limit, least in (
        ("rows", rows, 1),
        ("max_documents", max_documents, 1),
        ("max_tokens_per_document", max_tokens, 2),
    ):
        if limit is not None and limit < least:
            msg = f"{name} must be at least {least}, got {limit}."
            raise ValueError(msg)


def _segments(
    corpus: TokenizedCorpus,
    segment_length: int,
    rows: int,
    max_documents: int | None,
    max_tokens: int | None,
) -> SegmentDataset:
    documents = FirstDocuments(corpus, max_documents)
    longest = documents.lengths.max(initial=0)
    if longest < 2:
        msg = (
            f"A document must have at least 2 tokens to predict one, the longest has {longest}. "
            "Check the corpus, or raise max_documents."
        )
        raise DataError(msg)
    plan = RowPlan(
        documents.lengths,
        segment_length=segment_length,
        num_rows=min(rows, len(documents.lengths)),
        max_document_tokens=max_tokens,
    )
    return SegmentDataset(documents, plan)


def _num_bytes_predicted(
    corpus: TokenizedCorpus, plan: RowPlan, tokenizer: Tokenizer | None
) -> dict[int, int | None]:
    """Count the bytes of the text behind the first token of each document, as far as it is read.

    Returns:
        Bytes in UTF-8 by index of the document; a character cut in two counts as U+FFFD. `None` if
        that takes a tokenizer and there is none.
    """
    counts: dict[int, int | None] = {}
    for index in np.flatnonzero(plan.document_tokens > 1).tolist():
        num_tokens = plan.document_tokens[index]
        is_whole = num_tokens == corpus.lengths[index]
        if is_whole and corpus.manifest.start_id is not None:
            counts[index] = corpus.num_bytes(index)
        elif tokenizer is None:
            counts[index] = None
        else:
            tokens = corpus.document(index)[:num_tokens]
            read = corpus.num_bytes(index) if is_whole else _decoded_bytes(tokenizer, tokens)
            counts[index] = read - _decoded_bytes(tokenizer, tokens[:1])
    return counts


def _decoded_bytes(tokenizer: Tokenizer, tokens: UInt[np.ndarray, " token"]) -> int:
    return len(tokenizer.decode(tokens).encode())
