"""A tokenized corpus on disk, read through a memory map."""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from jaxtyping import Int64, UInt

from byheart.config import load_config
from byheart.data.documents import ReadReport
from byheart.errors import DataError

__all__ = ["CorpusManifest", "TokenizedCorpus"]

FORMAT = 1
MANIFEST, TOKENS, LENGTHS = "manifest.json", "tokens.bin", "lengths.npy"
NUM_BYTES, IDS = "num_bytes.npy", "document_ids.json"


@dataclass(frozen=True, kw_only=True, slots=True)
class CorpusManifest:
    """What the files of a tokenized corpus are. It is written last, so it says they are whole."""

    format: int = FORMAT
    """Version of the file layout."""
    fingerprint: str
    """Hash of source bytes, tokenizer and reading options."""
    tokenizer_fingerprint: str
    """Hash of the tokenizer."""
    vocab_size: int
    """One more than the largest token the tokenizer makes."""
    start_id: int | None
    """First token of every document, or `None` if the tokenizer has no start token."""
    token_type: Literal["<u2", "<u4"]
    """NumPy type of a stored token: the smaller that holds the vocabulary."""
    report: ReadReport
    """What was read from the sources and what was left out."""

    def __post_init__(self) -> None:
        if self.format != FORMAT:
            msg = f"format must be {FORMAT}, got {self.format}. Tokenize the corpus again."
            raise ValueError(msg)


class TokenizedCorpus:
    """The tokens of a corpus in a folder on disk, read through a memory map.

    `tokenize_corpus` makes it. Pickling stores only the path, so workers share the pages.

    Args:
        folder: A folder that `tokenize_corpus` wrote.

    Raises:
        DataError: If the folder is incomplete, damaged or of another format.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)
        try:
            self.manifest = load_config(CorpusManifest, self.folder / MANIFEST)
            self.lengths = _load_counts(self.folder / LENGTHS)
            """Tokens of each document, the start token included."""
            self._num_bytes = _load_counts(self.folder / NUM_BYTES)
            ids: list[str] = json.loads((self.folder / IDS).read_text(encoding="utf-8"))
            self.document_ids = tuple(ids)
            """Identifier of each document, as the reader gave it; not necessarily unique."""
            self._tokens = np.memmap(
                self.folder / TOKENS, dtype=self.manifest.token_type, mode="r"
            ).view(np.ndarray)
        except (OSError, EOFError, ValueError, TypeError) as err:
            raise DataError(self._damage(str(err))) from err
        self._ends = np.cumsum(self.lengths)
        for name, expected, met in (
            (TOKENS, self.num_tokens, len(self._tokens)),
            (NUM_BYTES, self.num_documents, len(self._num_bytes)),
            (IDS, self.num_documents, len(self.document_ids)),
        ):
            if expected != met:
                raise DataError(self._damage(f"{name} must have {expected} entries, got {met}"))

    @property
    def fingerprint(self) -> str:
        """Hash of source bytes, tokenizer and reading options."""
        return self.manifest.fingerprint

    @property
    def report(self) -> ReadReport:
        """What was read from the sources and what was left out."""
        return self.manifest.report

    @property
    def num_documents(self) -> int:
        """Documents in the corpus."""
        return len(self.lengths)

    @property
    def num_tokens(self) -> int:
        """Tokens in the corpus, start tokens included."""
        return int(self._ends[-1])

    def document(self, index: int) -> UInt[np.ndarray, " token"]:
        """Look at the tokens of one document.

        Args:
            index: Which document, counted from 0.

        Returns:
            A read-only view of the file, the start token first.
        """
        self._check(index)
        end = int(self._ends[index])
        return self._tokens[end - int(self.lengths[index]) : end]

    def num_bytes(self, index: int) -> int:
        """Tell the size of a document's text, the unit of bits per byte.

        Args:
            index: Which document, counted from 0.

        Returns:
            Bytes of the text in UTF-8.
        """
        self._check(index)
        return int(self._num_bytes[index])

    def __reduce__(self) -> tuple[type["TokenizedCorpus"], tuple[Path]]:
        return TokenizedCorpus, (self.folder,)

    def _check(self, index: int) -> None:
        if not 0 <= index < self.num_documents:
            msg = f"index must be between 0 and {self.num_documents - 1}, got {index}."
            raise IndexError(msg)

    def _damage(self, problem: str) -> str:
        return (
            f"Tokenized corpus {self.folder} must be whole: {problem}. "
            "Delete the folder and tokenize again."
        )


def _load_counts(path: Path) -> Int64[np.ndarray, " document"]:
    counts = np.load(path, allow_pickle=False)
    counts.flags.writeable = False
    return np.asarray(counts)
