"""Tokenizer, documents and schedule of a run."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from byheart.data.corpus import TokenizedCorpus
from byheart.data.documents import DocumentReader, iter_documents
from byheart.data.rows import RowPlan, SegmentDataset
from byheart.data.token_cache import TokenizeProgress, tokenize_corpus
from byheart.data.tokenize import BpeTokenizer, Tokenizer, load_tokenizer
from byheart.training.config import DataConfig, RunConfig

__all__ = ["RunData", "load_data", "make_dataset"]


@dataclass(frozen=True, kw_only=True, slots=True)
class RunData:
    """What a run reads."""

    tokenizer: Tokenizer
    """Makes the tokens."""
    train: TokenizedCorpus
    """The documents to learn from."""
    validation: TokenizedCorpus | None
    """The documents to evaluate on, if there are any."""


def load_data(
    config: DataConfig,
    saved_tokenizer: Path | None = None,
    on_progress: Callable[[TokenizeProgress], None] | None = None,
) -> RunData:
    """Tokenize the documents, or find their tokens in the cache.

    Args:
        config: Documents and tokenizer.
        saved_tokenizer: Where the run has saved its tokenizer: a BPE vocabulary is not learned
            again.
        on_progress: Called before a BPE vocabulary is learned, and every few megabytes.

    Returns:
        The opened data.
    """
    for path in (config.train, config.validation):
        if path is not None:
            # learning a vocabulary and tokenizing take long: what is not there is refused first
            _documents(config, path)
    if config.bpe_size is None:
        tokenizer = load_tokenizer(config.tokenizer)
    elif saved_tokenizer is not None:
        tokenizer = load_tokenizer(saved_tokenizer)
    else:
        tokenizer = _learn_tokenizer(config, config.bpe_size, on_progress)

    def open_corpus(path: str) -> TokenizedCorpus:
        return tokenize_corpus(
            path,
            tokenizer,
            config.cache_dir,
            on_bad=config.on_bad,
            folder_as=config.folder_as,
            text_key=config.text_key,
            suffixes=config.suffixes,
            on_progress=on_progress,
        )

    return RunData(
        tokenizer=tokenizer,
        train=open_corpus(config.train),
        validation=None if config.validation is None else open_corpus(config.validation),
    )


def make_dataset(run: RunConfig, corpus: TokenizedCorpus, num_processes: int) -> SegmentDataset:
    """Lay the documents out in rows for a whole run.

    Args:
        run: The run.
        corpus: The documents to learn from.
        num_processes: Processes of the run.

    Returns:
        The segments, in the order of the steps.
    """
    training = run.training
    plan = RowPlan(
        corpus.lengths,
        segment_length=run.segment_length,
        num_rows=training.rows_per_device * num_processes * training.accumulation_steps,
        num_steps=training.max_steps,
        seed=training.seed if run.data.shuffle else None,
        min_document_tokens=run.data.min_document_tokens,
        max_document_tokens=run.data.max_document_tokens,
    )
    return SegmentDataset(corpus, plan)


def _documents(config: DataConfig, path: str) -> DocumentReader:
    return iter_documents(
        path,
        on_bad=config.on_bad,
        folder_as=config.folder_as,
        text_key=config.text_key,
        suffixes=config.suffixes,
    )


def _learn_tokenizer(
    config: DataConfig, size: int, on_progress: Callable[[TokenizeProgress], None] | None
) -> Tokenizer:
    documents = _documents(config, config.train)
    if on_progress is not None:
        total = documents.files.num_bytes()
        on_progress(
            TokenizeProgress(stage="learn", num_bytes=0, total_bytes=total, num_documents=0)
        )
    return BpeTokenizer.train((document.text for document in documents), size)
