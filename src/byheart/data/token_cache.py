"""Tokenize a corpus once and keep the tokens on disk."""

import contextlib
import hashlib
import json
import logging
import os
import secrets
import shutil
import time
from array import array
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Literal

import numpy as np
from jaxtyping import Int32

from byheart.config import save_config
from byheart.data.corpus import (
    FORMAT,
    IDS,
    LENGTHS,
    MANIFEST,
    NUM_BYTES,
    TOKENS,
    CorpusManifest,
    TokenizedCorpus,
)
from byheart.data.documents import (
    Document,
    DocumentReader,
    FolderAs,
    OnBad,
    ReadReport,
    iter_documents,
)
from byheart.data.files import CorpusFiles, content_hash
from byheart.data.tokenize import Tokenizer
from byheart.errors import DataError

__all__ = ["TokenizeProgress", "default_cache_dir", "tokenize_corpus"]

_LOGGER = logging.getLogger(__name__)
_BATCH_CHARS = 1 << 21
_BATCH_DOCUMENTS = 256
_MIN_TOKENS = 2
# A build that has written nothing for this long was killed.
_STALE_SECONDS = 24 * 3600.0


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenizeProgress:
    """How far `tokenize_corpus`, or a training run that prepares its documents, has come."""

    stage: Literal["learn", "hash", "tokenize"]
    """First the files are hashed, which a known and untouched corpus skips, then tokenized. Before
    that a run that learns a BPE vocabulary reads them all, which is reported once, as it begins."""
    num_bytes: int
    """Bytes of the files, as stored, that this stage has read."""
    total_bytes: int
    """Bytes of the files, as stored, that this stage will read."""
    num_documents: int
    """Documents tokenized so far."""


def default_cache_dir() -> Path:
    """Tell where tokenized corpora are kept.

    Returns:
        `tokens` below the folder that the environment variable `BYHEART_CACHE` names, or below
        `~/.cache/byheart`.
    """
    return Path(os.environ.get("BYHEART_CACHE") or "~/.cache/byheart").expanduser() / "tokens"


def tokenize_corpus(
    path: str | os.PathLike[str],
    tokenizer: Tokenizer,
    cache_dir: str | os.PathLike[str] | None = None,
    *,
    on_bad: OnBad = "raise",
    folder_as: FolderAs = "file",
    text_key: str = "text",
    suffixes: Collection[str] | None = None,
    on_progress: Callable[[TokenizeProgress], None] | None = None,
) -> TokenizedCorpus:
    """Tokenize a corpus, or open it if the same files were tokenized the same way before.

    The result appears in the cache in one step: after a crash there is the whole corpus or
    nothing. Several processes may ask for the same corpus at once; each then builds it, and one
    result stays. Neither texts nor tokens are ever all in memory.

    Args:
        path: A file or folder, as `iter_documents` reads it.
        tokenizer: Makes the tokens; its start token, if any, goes before each document.
        cache_dir: Folder for tokenized corpora; `None` means `default_cache_dir()`.
        on_bad: Whether a bad record, or a document of fewer than two tokens, raises or is skipped
            with a logged warning.
        folder_as: What one document of a folder is.
        text_key: The key of a JSON record that holds the text.
        suffixes: Endings of the files to take from a folder; `None` takes all.
        on_progress: Called every few megabytes.

    Returns:
        The corpus, memory-mapped.

    Raises:
        DataError: If the corpus cannot be read, has no usable document, or changes meanwhile.
    """
    reader = iter_documents(
        path, on_bad=on_bad, folder_as=folder_as, text_key=text_key, suffixes=suffixes
    )
    root = default_cache_dir() if cache_dir is None else Path(cache_dir)
    signature = reader.files.signature()
    content = _hash_content(reader.files, root, on_progress)
    options = [on_bad, folder_as, text_key, sorted(suffixes) if suffixes is not None else None]
    key = json.dumps([FORMAT, content, tokenizer.fingerprint, options])
    fingerprint = hashlib.sha256(key.encode()).hexdigest()
    target = root / fingerprint[:32]
    if target.exists():
        try:
            return TokenizedCorpus(target)
        except DataError as err:
            _LOGGER.warning("Tokenizing again: %s", err)
    with _CorpusWriter(target, tokenizer) as writer:
        _tokenize(reader, tokenizer, writer, on_progress)
        if reader.files.signature() != signature:
            msg = f"Corpus {reader.files.root} must not change while it is read. Start again."
            raise DataError(msg)
        writer.publish(fingerprint, reader.report)
    return TokenizedCorpus(target)


def _hash_content(
    files: CorpusFiles, root: Path, on_progress: Callable[[TokenizeProgress], None] | None
) -> str:
    total, done = files.num_bytes(), 0

    def count(num_bytes: int) -> None:
        nonlocal done
        done += num_bytes
        if on_progress is not None:
            on_progress(
                TokenizeProgress(stage="hash", num_bytes=done, total_bytes=total, num_documents=0)
            )

    return content_hash(files, root / "sources", count)


def _tokenize(
    reader: DocumentReader,
    tokenizer: Tokenizer,
    writer: "_CorpusWriter",
    on_progress: Callable[[TokenizeProgress], None] | None,
) -> None:
    total = reader.files.num_bytes()
    for documents in _batches(reader):
        encoded = tokenizer.encode_batch([document.text for document in documents])
        for document, ids in zip(documents, encoded, strict=True):
            if len(ids) < _MIN_TOKENS:
                reader.skip(
                    f"{document.source} must have at least {_MIN_TOKENS} tokens, got {len(ids)}"
                )
                writer.num_short += 1
            else:
                writer.append(document, ids)
        if on_progress is not None:
            on_progress(
                TokenizeProgress(
                    stage="tokenize",
                    num_bytes=reader.num_bytes_read,
                    total_bytes=total,
                    num_documents=len(writer.lengths),
                )
            )
    if not writer.lengths:
        msg = (
            f"Corpus {reader.files.root} must hold a document of {_MIN_TOKENS} tokens or more, "
            f"got {writer.num_short} shorter ones. Check the path."
        )
        raise DataError(msg)


def _batches(reader: DocumentReader) -> Iterator[list[Document]]:
    batch: list[Document] = []
    num_chars = 0
    for document in reader:
        batch.append(document)
        num_chars += len(document.text)
        if num_chars >= _BATCH_CHARS or len(batch) == _BATCH_DOCUMENTS:
            yield batch
            batch, num_chars = [], 0
    if batch:
        yield batch


class _CorpusWriter:
    """Writes a corpus into a folder beside `target` and moves it there when it is whole."""

    def __init__(self, target: Path, tokenizer: Tokenizer) -> None:
        self.lengths = array("q")
        self.num_short = 0
        self._num_bytes = array("q")
        self._ids: list[str] = []
        self._tokenizer = tokenizer
        self._token_type: Literal["<u2", "<u4"] = (
            "<u2" if tokenizer.vocab_size <= 1 << 16 else "<u4"
        )
        self._target = target
        self._partial = target.with_name(f".{target.name}.{secrets.token_hex(8)}.partial")

    def __enter__(self) -> "_CorpusWriter":
        _remove_stale(self._target.parent)
        self._partial.mkdir(parents=True)
        self._file = (self._partial / TOKENS).open("wb")
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._file.close()
        shutil.rmtree(self._partial, ignore_errors=True)

    def append(self, document: Document, ids: Int32[np.ndarray, " token"]) -> None:
        if ids.min() < 0 or ids.max() >= self._tokenizer.vocab_size:
            msg = (
                f"Tokens must be between 0 and vocab_size - 1 ({self._tokenizer.vocab_size - 1}), "
                f"got {ids.min()} to {ids.max()} in {document.source}. Correct the tokenizer."
            )
            raise DataError(msg)
        start = [] if self._tokenizer.start_id is None else [self._tokenizer.start_id]
        self._file.write(np.asarray(start, dtype=self._token_type).tobytes())
        self._file.write(ids.astype(self._token_type).tobytes())
        self.lengths.append(len(start) + len(ids))
        self._num_bytes.append(len(document.text.encode("utf-8")))
        self._ids.append(document.id)

    def publish(self, fingerprint: str, report: ReadReport) -> None:
        self._file.close()
        np.save(self._partial / LENGTHS, np.frombuffer(self.lengths, dtype=np.int64))
        np.save(self._partial / NUM_BYTES, np.frombuffer(self._num_bytes, dtype=np.int64))
        (self._partial / IDS).write_text(json.dumps(self._ids), encoding="utf-8")
        report = replace(report, num_documents=len(self.lengths), num_short=self.num_short)
        manifest = CorpusManifest(
            fingerprint=fingerprint,
            tokenizer_fingerprint=self._tokenizer.fingerprint,
            vocab_size=self._tokenizer.vocab_size,
            start_id=self._tokenizer.start_id,
            token_type=self._token_type,
            report=report,
        )
        # the manifest comes last: it says that the rest is whole
        for name in (TOKENS, LENGTHS, NUM_BYTES, IDS):
            _sync(self._partial / name)
        save_config(manifest, self._partial / MANIFEST)
        _sync(self._partial)
        self._move()
        _sync(self._target.parent)

    def _move(self) -> None:
        try:
            self._partial.rename(self._target)
        except OSError:
            if not self._target.exists():
                raise
            # another process was faster, or a damaged corpus is in the way
            with contextlib.suppress(DataError):
                TokenizedCorpus(self._target)
                return
            shutil.rmtree(self._target)
            self._partial.rename(self._target)


def _sync(path: Path) -> None:
    # some systems cannot open a folder; the files are safe by themselves
    with contextlib.suppress(PermissionError):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _remove_stale(root: Path) -> None:
    for folder in root.glob(".*.partial"):
        with contextlib.suppress(OSError):
            newest = max(path.stat().st_mtime for path in [folder, *folder.iterdir()])
            if time.time() - newest > _STALE_SECONDS:
                shutil.rmtree(folder, ignore_errors=True)
