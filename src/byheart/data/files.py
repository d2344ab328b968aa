"""The files of a corpus: which they are, how they are opened, and what identifies their content."""

import contextlib
import gzip
import hashlib
import io
import json
import lzma
import os
import time
import zlib
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import BinaryIO, cast

from byheart.config import write_text_atomic
from byheart.errors import DataError

__all__ = ["CorpusFiles", "bare_name", "content_hash", "find_files", "open_stream"]

_COMPRESSION_SUFFIXES = (".gz", ".xz", ".zst")
_CHUNK_BYTES = 1 << 20
# A file changed this shortly before it was hashed may change again without a new time stamp.
_RACY_SECONDS = 2.0
# Corpora packed with `zstd --long=31` need this window; zstd's own default refuses them.
_ZSTD_WINDOW_BYTES = 1 << 31


@dataclass(frozen=True, kw_only=True, slots=True)
class CorpusFiles:
    """The files that make up a corpus, in reading order."""

    root: Path
    """The path the user gave: a file or a folder."""
    paths: tuple[Path, ...]
    """The files, sorted by their path below the root, folder by folder."""
    num_hidden: int = 0
    """Hidden files and folders passed over, those whose name starts with a dot."""
    num_other: int = 0
    """Files passed over because of their suffix, or because they are no regular files."""

    def name(self, path: Path) -> str:
        """Name a file independently of where the corpus lies.

        Args:
            path: The root or one of `paths`.

        Returns:
            The path below the root with forward slashes; for the root itself its own name.
        """
        is_root = path == self.root
        relative = path.absolute().name if is_root else path.relative_to(self.root).as_posix()
        # file names are bytes: what is not UTF-8 arrives as surrogates, which no file can store
        return os.fsencode(relative).decode("utf-8", errors="replace")

    def num_bytes(self) -> int:
        """Add up the sizes on disk.

        Returns:
            Bytes of all files as stored, compressed or not.
        """
        return sum(path.stat().st_size for path in self.paths)

    def signature(self) -> str:
        """Describe the files without reading them: paths, sizes and time stamps.

        Returns:
            A hash that changes when a file is added, removed, replaced or written to.
        """
        digest = hashlib.sha256()
        for path in self.paths:
            stat = path.stat()
            facts = [os.fsencode(path.absolute()).hex(), stat.st_ino, stat.st_size]
            digest.update(json.dumps([*facts, stat.st_mtime_ns, stat.st_ctime_ns]).encode())
        return digest.hexdigest()


def find_files(
    path: str | os.PathLike[str], suffixes: Collection[str] | None = None
) -> CorpusFiles:
    """List the files of a corpus in a fixed order.

    In a folder, hidden files and folders are passed over and links to folders are not followed.

    Args:
        path: A file or a folder.
        suffixes: Endings of the files to take from a folder, as in `(".py", ".md")`, with or
            without a compression suffix behind; `None` takes all.

    Returns:
        The files, at least one.

    Raises:
        TypeError: If `suffixes` is a single string.
        DataError: If the path does not exist or the folder holds no such file.
    """
    if isinstance(suffixes, str):
        msg = f"suffixes must be a collection of strings, got {suffixes!r}. Write ({suffixes!r},)."
        raise TypeError(msg)
    root = Path(path)
    if root.is_file():
        return CorpusFiles(root=root, paths=(root,))
    if not root.is_dir():
        msg = f"Corpus {root} must be an existing file or folder, and is neither. Check the path."
        raise DataError(msg)
    found, num_hidden, num_other = _walk(root, suffixes)
    if not found:
        wanted = "" if suffixes is None else f" ending in {', '.join(sorted(suffixes))}"
        msg = (
            f"Corpus folder {root} must hold at least one file{wanted}, got none "
            f"({num_hidden} hidden, {num_other} of another kind). Check the path and the suffixes."
        )
        raise DataError(msg)
    paths = sorted(found, key=lambda file: file.relative_to(root).parts)
    return CorpusFiles(root=root, paths=tuple(paths), num_hidden=num_hidden, num_other=num_other)


def _walk(root: Path, suffixes: Collection[str] | None) -> tuple[list[Path], int, int]:
    found: list[Path] = []
    num_hidden = num_other = 0
    for folder, subfolders, names in os.walk(root):
        visible = [name for name in subfolders if not name.startswith(".")]
        num_hidden += len(subfolders) - len(visible)
        subfolders[:] = visible
        for name in names:
            file = Path(folder, name)
            if name.startswith("."):
                num_hidden += 1
            elif _has_suffix(name, suffixes) and file.is_file():
                found.append(file)
            else:
                num_other += 1
    return found, num_hidden, num_other


def _has_suffix(name: str, suffixes: Collection[str] | None) -> bool:
    if suffixes is None:
        return True
    endings = tuple(f".{suffix.lstrip('.').lower()}" for suffix in suffixes)
    return name.lower().endswith(endings) or bare_name(name).lower().endswith(endings)


def bare_name(name: str) -> str:
    """Take a compression suffix off a file name.

    Args:
        name: A file name or path.

    Returns:
        The name without a final `.gz`, `.xz` or `.zst`.
    """
    for suffix in _COMPRESSION_SUFFIXES:
        if name.lower().endswith(suffix):
            return name[: -len(suffix)]
    return name


@contextlib.contextmanager
def open_stream(path: Path) -> Iterator[tuple[BinaryIO, BinaryIO]]:
    """Open a file for reading, decompressing by its suffix.

    Args:
        path: A file, possibly ending in `.gz`, `.xz` or `.zst`.

    Yields:
        The content, decompressed, and the file as stored, whose position tells the progress.

    Raises:
        DataError: If the compressed data are damaged or end early.
        ImportError: If the file needs the zstandard package and it is missing.
    """
    suffix = path.suffix.lower()
    with path.open("rb") as raw:
        try:
            with _decompressed(raw, suffix) as content:
                yield content, raw
        except (EOFError, gzip.BadGzipFile, lzma.LZMAError, zlib.error) as err:
            msg = f"{path} must be a whole {suffix} file: {err}. Copy or download it again."
            raise DataError(msg) from err


def _decompressed(raw: BinaryIO, suffix: str) -> contextlib.AbstractContextManager[BinaryIO]:
    if suffix == ".gz":
        return cast("contextlib.AbstractContextManager[BinaryIO]", gzip.open(raw))
    if suffix == ".xz":
        return cast("contextlib.AbstractContextManager[BinaryIO]", lzma.open(raw))
    if suffix == ".zst":
        return io.BufferedReader(_ZstdStream(raw), _CHUNK_BYTES)
    return contextlib.nullcontext(raw)


class _ZstdStream(io.RawIOBase):
    """Decompressed view of zstd frames that notices when the last one is cut off."""

    def __init__(self, raw: BinaryIO) -> None:
        zstandard = _import_zstandard()
        self._raw = raw
        self._error = zstandard.ZstdError
        self._decompressor = zstandard.ZstdDecompressor(max_window_size=_ZSTD_WINDOW_BYTES)
        self._frame = self._decompressor.decompressobj()
        self._frame_is_empty = True
        self._pending = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: "bytearray | memoryview") -> int:  # type: ignore[override]
        while not self._pending:
            if not self._decompress_more():
                return 0
        count = min(len(buffer), len(self._pending))
        buffer[:count] = self._pending[:count]
        self._pending = self._pending[count:]
        return count

    def _decompress_more(self) -> bool:
        compressed = self._frame.unused_data if self._frame.eof else b""
        compressed = compressed or self._raw.read(_CHUNK_BYTES // 16)
        if not compressed:
            if not self._frame.eof and not self._frame_is_empty:
                msg = "the compressed data end inside a frame"
                raise EOFError(msg)
            return False
        if self._frame.eof:
            self._frame = self._decompressor.decompressobj()
        self._frame_is_empty = False
        try:
            self._pending = self._frame.decompress(compressed)
        except self._error as err:
            raise EOFError(str(err)) from err
        return True


def _import_zstandard() -> ModuleType:
    try:
        import zstandard
    except ImportError as err:
        msg = (
            "Reading .zst files needs the zstandard package: pip install 'byheart[data]'. "
            "Without it, recompress the file as .xz or .gz."
        )
        raise ImportError(msg) from err
    return zstandard


def content_hash(
    files: CorpusFiles, memo_dir: Path, on_bytes: Callable[[int], None] | None = None
) -> str:
    """Identify the content of a corpus: the names and bytes of its files.

    Hashing reads every byte once. The result is remembered under `memo_dir` with sizes and time
    stamps, so that an untouched corpus is recognised without reading it again.

    Args:
        files: The files of the corpus.
        memo_dir: Folder for remembered hashes; made if missing.
        on_bytes: Called with the number of bytes just read.

    Returns:
        A hexadecimal hash, the same wherever the corpus lies.
    """
    newest = max(max(s.st_mtime, s.st_ctime) for s in (path.stat() for path in files.paths))
    is_settled = time.time() - newest >= _RACY_SECONDS
    memo = memo_dir / f"{files.signature()}.json"
    with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
        return str(json.loads(memo.read_text(encoding="utf-8"))["content_hash"])
    digest = hashlib.sha256()
    digest.update(files.name(files.root).encode() + b"\0")
    for path in files.paths:
        digest.update(files.name(path).encode() + b"\0" + _file_hash(path, on_bytes))
    result = digest.hexdigest()
    if is_settled:
        memo_dir.mkdir(parents=True, exist_ok=True)
        write_text_atomic(memo, json.dumps({"content_hash": result}) + "\n")
    return result


def _file_hash(path: Path, on_bytes: Callable[[int], None] | None) -> bytes:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
            if on_bytes is not None:
                on_bytes(len(chunk))
    return digest.digest()
