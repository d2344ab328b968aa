"""Documents from JSON lines, text files and folders, one at a time."""

import codecs
import json
import logging
import os
from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias

from byheart.data.files import CorpusFiles, bare_name, find_files, open_stream
from byheart.errors import DataError

__all__ = ["Document", "DocumentReader", "FolderAs", "OnBad", "ReadReport", "iter_documents"]

OnBad: TypeAlias = Literal["raise", "skip"]
FolderAs: TypeAlias = Literal["file", "folder"]

_LOGGER = logging.getLogger(__name__)
_JSON_LINES_SUFFIXES = (".jsonl", ".ndjson")
# git's rule: a file with a NUL byte near its start is binary
_BINARY_PROBE_BYTES = 8192
# a corpus with a wrong setting can hold millions of bad records
_MAX_WARNINGS = 10


@dataclass(frozen=True, kw_only=True, slots=True)
class Document:
    """One text that is read from its start to its end."""

    id: str
    """The record's `id`, or else where the text lies below the corpus path."""
    text: str
    """The whole text; line ends as in the file, a byte order mark removed."""
    source: str
    """The file, and for JSON lines the line, that the text came from."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ReadReport:
    """What was read from a corpus and what was left out, and why."""

    num_documents: int = 0
    """Documents read."""
    num_bad: int = 0
    """Bad records skipped: no JSON, no text, or not UTF-8."""
    num_short: int = 0
    """Documents skipped because they have fewer than two tokens."""
    num_binary_files: int = 0
    """Files of a folder skipped because they hold a NUL byte."""
    num_empty_files: int = 0
    """Text files of a folder skipped because they hold nothing but white space."""
    num_hidden_files: int = 0
    """Files and folders of a folder passed over because their name starts with a dot."""
    num_other_files: int = 0
    """Files of a folder passed over because of their suffix, or because they are no files."""


class DocumentReader(Iterator[Document]):
    """Iterator over the documents of a corpus that counts what it leaves out.

    `iter_documents` makes it and describes what it reads. At most one document is in memory.

    Args:
        files: The files of the corpus.
        on_bad: Whether a bad record raises, or is skipped with a warning.
        folder_as: What one document of a folder is: a file, or an immediate sub-folder.
        text_key: The key of a JSON record that holds the text.
    """

    def __init__(
        self,
        files: CorpusFiles,
        *,
        on_bad: OnBad = "raise",
        folder_as: FolderAs = "file",
        text_key: str = "text",
    ) -> None:
        self.files = files
        self.on_bad = on_bad
        self.text_key = text_key
        self.num_bytes_read = 0
        """Bytes of the files, as stored, that have been read; for progress."""
        self._counts: Counter[str] = Counter()
        is_joined = folder_as == "folder" and files.root.is_dir()
        self._documents = self._read_joined() if is_joined else self._read_files()

    @property
    def report(self) -> ReadReport:
        """What has been read and left out so far."""
        return ReadReport(
            num_documents=self._counts["documents"],
            num_bad=self._counts["bad"],
            num_binary_files=self._counts["binary"],
            num_empty_files=self._counts["empty"],
            num_hidden_files=self.files.num_hidden,
            num_other_files=self.files.num_other,
        )

    def __next__(self) -> Document:
        document = next(self._documents, None)
        if document is None:
            self._finish()
            raise StopIteration
        self._counts["documents"] += 1
        return document

    def skip(self, problem: str) -> None:
        """Leave a bad record out, or refuse it if the reader was made with `on_bad="raise"`.

        Args:
            problem: What is wrong and where, without a full stop.

        Raises:
            DataError: With the problem and the remedies, if bad records are to raise.
        """
        if self.on_bad == "raise":
            msg = (
                f"{problem}. Correct it, or leave such documents out with on_bad='skip' "
                "(--skip-bad)."
            )
            raise DataError(msg)
        self._counts["warnings"] += 1
        level = logging.WARNING if self._counts["warnings"] <= _MAX_WARNINGS else logging.DEBUG
        _LOGGER.log(level, "Skipped: %s.", problem)

    def _finish(self) -> None:
        unseen = self._counts["warnings"] - _MAX_WARNINGS
        if unseen > 0:
            _LOGGER.warning("Skipped %d more documents of %s.", unseen, self.files.root)
            self._counts["warnings"] = 0
        if not self._counts["documents"]:
            msg = (
                f"Corpus {self.files.root} must hold at least one document, got none "
                f"({self._counts['bad']} bad, {self._counts['binary']} binary, "
                f"{self._counts['empty']} empty). Check the path."
            )
            raise DataError(msg)

    def _read_files(self) -> Iterator[Document]:
        for path in self.files.paths:
            if _is_json_lines(path):
                yield from self._read_json_lines(path)
            else:
                text = self._read_text(path)
                if text is not None:
                    yield Document(id=self.files.name(path), text=text, source=str(path))

    def _read_joined(self) -> Iterator[Document]:
        root = self.files.root
        groups: dict[str, list[Path]] = {}
        for path in self.files.paths:
            parts = path.relative_to(root).parts
            groups.setdefault(parts[0] if len(parts) > 1 else "", []).append(path)
        for folder, paths in groups.items():
            texts = [text for path in paths if (text := self._read_text(path)) is not None]
            # the last line of one file and the first of the next stay two lines
            lines_end = [text if text.endswith("\n") else f"{text}\n" for text in texts[:-1]]
            if texts:
                place = root / folder
                text = "".join([*lines_end, texts[-1]])
                yield Document(id=self.files.name(place), text=text, source=str(place))

    def _read_text(self, path: Path) -> str | None:
        is_listed = path != self.files.root
        start = self.num_bytes_read
        with open_stream(path) as (content, _):
            head = content.read(_BINARY_PROBE_BYTES)
            data = head if b"\0" in head else head + content.read()
        self.num_bytes_read = start + path.stat().st_size
        if is_listed and b"\0" in data:
            self._counts["binary"] += 1
            return None
        try:
            text = _decode(data)
        except _BadRecordError as err:
            self._skip_bad(f"{path} {err}")
            return None
        # many repositories have files without content, such as __init__.py
        if is_listed and (not text or text.isspace()):
            self._counts["empty"] += 1
            return None
        return text

    def _read_json_lines(self, path: Path) -> Iterator[Document]:
        start = self.num_bytes_read
        with open_stream(path) as (content, raw):
            for number, line in enumerate(content, start=1):
                self.num_bytes_read = start + raw.tell()
                document = self._read_record(line, path, number) if line.strip() else None
                if document is not None:
                    yield document
        self.num_bytes_read = start + path.stat().st_size

    def _read_record(self, line: bytes, path: Path, number: int) -> Document | None:
        where = f"{path}:{number}"
        try:
            text, name = _parse_record(line, self.text_key)
        except _BadRecordError as err:
            self._skip_bad(f"{where} {err}")
            return None
        return Document(id=name or f"{self.files.name(path)}:{number}", text=text, source=where)

    def _skip_bad(self, problem: str) -> None:
        self.skip(problem)
        self._counts["bad"] += 1


def iter_documents(
    path: str | os.PathLike[str],
    *,
    on_bad: OnBad = "raise",
    folder_as: FolderAs = "file",
    text_key: str = "text",
    suffixes: Collection[str] | None = None,
) -> DocumentReader:
    """Read the documents of a corpus one at a time, in a fixed order.

    A corpus is one of:

    - a JSON lines file (`.jsonl` or `.ndjson`), one record with the text a line;
    - any other file: one document of UTF-8 text;
    - a folder: every file of it and its sub-folders, in sorted order. With `folder_as="file"`
      each text file is a document, and JSON lines files are read as such. With
      `folder_as="folder"` the files of each immediate sub-folder are joined into one document,
      as Memorizing Transformers does with repositories, and files beside them into another.
      Hidden files, binary files (a NUL byte) and text files without content are passed over.

    Files ending in `.gz`, `.xz` and `.zst` are decompressed on the way. The order is that of the
    sorted paths; the paper takes a repository's files in random order.

    Args:
        path: A file or a folder.
        on_bad: `"raise"` refuses a record that is no JSON, has no text or is not UTF-8; `"skip"`
            leaves it out with a logged warning. A damaged compressed file always raises.
        folder_as: What one document of a folder is.
        text_key: The key of a JSON record that holds the text. Its `id`, if it has one, becomes
            the document's.
        suffixes: Endings of the files to take from a folder; `None` takes all.

    Returns:
        An iterator whose `report` says what has been read and what was left out. While it is
        consumed it raises `DataError` on a bad record (if asked to), a damaged file, or at its
        end if there was no document at all.

    Raises:
        DataError: If the path does not exist, the folder holds no fitting file, or it is a
            `.json` file, which may be a document or a list of documents.

    Source:
        Wu et al. 2022, Memorizing Transformers, "Datasets" (arXiv:2203.08913).
    """
    files = find_files(path, suffixes)
    if files.root.is_file() and bare_name(files.root.name).lower().endswith(".json"):
        msg = (
            f"Corpus {files.root} must be JSON lines or text, got a .json file. "
            "Rename it to .jsonl if each line is a record, or to .txt to read it as one text."
        )
        raise DataError(msg)
    return DocumentReader(files, on_bad=on_bad, folder_as=folder_as, text_key=text_key)


class _BadRecordError(Exception):
    """What a record must be, in words that follow its place."""


def _parse_record(line: bytes, text_key: str) -> tuple[str, str | None]:
    try:
        record = json.loads(_decode(line))
    except (ValueError, RecursionError) as err:
        msg = f"must be a JSON record: {err}"
        raise _BadRecordError(msg) from err
    if not isinstance(record, dict):
        msg = f"must be a JSON object, got {type(record).__name__}"
        raise _BadRecordError(msg)
    text, name = record.get(text_key), record.get("id")
    if not isinstance(text, str):
        if text_key in record:
            found = f"has {type(text).__name__}"
        else:
            found = f"has keys: {', '.join(record)}"
        msg = f"must have a string under text_key={text_key!r}, {found}"
        raise _BadRecordError(msg)
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as err:
        # JSON can spell half a surrogate pair, which is no character
        msg = f"must be Unicode text: {err}"
        raise _BadRecordError(msg) from err
    return text, str(name) if isinstance(name, (str, int)) else None


def _decode(data: bytes) -> str:
    try:
        return data.removeprefix(codecs.BOM_UTF8).decode("utf-8")
    except UnicodeDecodeError as err:
        msg = f"must be UTF-8: {err}"
        raise _BadRecordError(msg) from err


def _is_json_lines(path: Path) -> bool:
    return bare_name(path.name).lower().endswith(_JSON_LINES_SUFFIXES)
