"""Tokenizers: bytes, byte-level BPE, and any Hugging Face `tokenizer.json`."""

import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Int32, Integer
from tokenizers import Tokenizer as HuggingFaceTokenizer
from tokenizers import decoders, models, pre_tokenizers, trainers

from byheart.config import write_text_atomic
from byheart.errors import DataError

__all__ = ["BpeTokenizer", "ByteTokenizer", "Tokenizer", "load_tokenizer"]

_START = "<|start|>"
# by these names tokenizers in the field call the token that begins a text, the most specific first
_START_NAMES = (_START, "<s>", "<bos>", "<|begin_of_text|>", "<|endoftext|>", "[CLS]")
_BPE_FILE = "tokenizer.json"
_BYTE_FILE = "byte_tokenizer.json"
_BYTE_SETTINGS = {"kind": "bytes", "format": 1}

# A text this long is encoded in pieces: the library keeps some hundred bytes per token.
_PIECE_CHARS = 1 << 16
_PIECES_AT_ONCE = 32
_PIECE_BORDER = re.compile(r"(?<=\S)(?=[ \n])")


@runtime_checkable
class Tokenizer(Protocol):
    """Text to token ids and back."""

    @property
    def vocab_size(self) -> int:
        """One more than the largest id, the start token included."""
        ...

    @property
    def start_id(self) -> int | None:
        """Token put before every document, so that each of its own tokens is predicted.

        `None` if the vocabulary has none: then the first token of a document is only an input.
        """
        ...

    @property
    def fingerprint(self) -> str:
        """Hash that two tokenizers share only if they give the same ids for every text."""
        ...

    def encode(self, text: str) -> Int32[np.ndarray, " token"]:
        """Turn a text into ids, without start or other special tokens.

        Args:
            text: Any text. A special token spelled out in it is encoded like other text.

        Returns:
            One id per token.
        """
        ...

    def encode_batch(self, texts: Sequence[str]) -> list[Int32[np.ndarray, " _token"]]:
        """Turn several texts into ids, faster than one by one.

        Args:
            texts: Any texts.

        Returns:
            What `encode` gives for each of them.
        """
        ...

    def decode(self, ids: Sequence[int] | Integer[np.ndarray, " token"]) -> str:
        """Turn ids into text.

        Args:
            ids: Ids below `vocab_size`; start and other special tokens leave no trace.

        Returns:
            The text. Where the ids end inside a character it holds U+FFFD.
        """
        ...

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write the tokenizer so that `load_tokenizer` gives it back.

        Args:
            folder: Made if missing.
        """
        ...


class ByteTokenizer:
    """Every UTF-8 byte is a token, and the start token is 256. Needs no training and no file."""

    vocab_size = 257
    start_id = 256

    @property
    def fingerprint(self) -> str:
        """Hash of the encoding rule."""
        return _hash(_BYTE_SETTINGS)

    def encode(self, text: str) -> Int32[np.ndarray, " token"]:
        """Give the UTF-8 bytes of a text.

        Args:
            text: Any text.

        Returns:
            One id per byte.
        """
        return np.frombuffer(text.encode("utf-8"), dtype=np.uint8).astype(np.int32)

    def encode_batch(self, texts: Sequence[str]) -> list[Int32[np.ndarray, " _token"]]:
        """Give the UTF-8 bytes of several texts.

        Args:
            texts: Any texts.

        Returns:
            One id per byte, for each text.
        """
        return [self.encode(text) for text in texts]

    def decode(self, ids: Sequence[int] | Integer[np.ndarray, " token"]) -> str:
        """Read bytes as UTF-8.

        Args:
            ids: Ids below 257; start tokens leave no trace.

        Returns:
            The text, with U+FFFD for bytes that are not UTF-8.
        """
        codes = np.asarray(ids, dtype=np.int64)
        data: bytes = codes[codes != self.start_id].astype(np.uint8).tobytes()
        return data.decode("utf-8", errors="replace")

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write a small file that names this tokenizer.

        Args:
            folder: Made if missing.
        """
        Path(folder).mkdir(parents=True, exist_ok=True)
        write_text_atomic(Path(folder, _BYTE_FILE), json.dumps(_BYTE_SETTINGS) + "\n")


class BpeTokenizer:
    """A tokenizer of the `tokenizers` library, made by `train` or `from_file`.

    Unlike the library it never adds, cuts or pads anything, and special tokens spelled out in a
    text are encoded as ordinary text: only byheart puts a start token, and only before documents.

    Args:
        settings: The content of a `tokenizer.json`.
    """

    def __init__(self, settings: str) -> None:
        self._settings: dict[str, Any] = json.loads(settings)
        # not part of what a token is, and fatal for long documents
        self._settings["truncation"] = self._settings["padding"] = None
        self._tokenizer = HuggingFaceTokenizer.from_str(json.dumps(self._settings))
        self._tokenizer.encode_special_tokens = True
        self._fingerprint = _hash(self._settings)
        self._can_cut = _splits_at_spaces(self._settings)
        vocab = self._tokenizer.get_vocab(with_added_tokens=True)
        self._vocab_size = max(vocab.values()) + 1
        self._start_id = next((vocab[name] for name in _START_NAMES if name in vocab), None)

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int) -> "BpeTokenizer":
        """Learn a byte-level BPE vocabulary, which can spell every text exactly.

        Args:
            texts: The texts to learn from, read once.
            vocab_size: Tokens to learn at most, the 256 bytes and `<|start|>` included; a small
                corpus yields fewer.

        Returns:
            The tokenizer.

        Raises:
            ValueError: If `vocab_size` is below 257.
            DataError: If there is no text to learn from.
        """
        if vocab_size < 257:
            msg = (
                f"vocab_size must be at least 257 (256 bytes and a start token), got {vocab_size}."
            )
            raise ValueError(msg)
        tokenizer = HuggingFaceTokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=[_START],
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        )
        has_text = False

        def watched() -> Iterator[str]:
            nonlocal has_text
            for text in texts:
                has_text = has_text or bool(text and not text.isspace())
                yield text

        tokenizer.train_from_iterator(_pieces_of(watched()), trainer)
        if not has_text:
            msg = (
                "A BPE must be learned from documents with text, got none but white space. Name "
                "other documents."
            )
            raise DataError(msg)
        return cls(tokenizer.to_str())

    @classmethod
    def from_file(cls, path: str | os.PathLike[str]) -> "BpeTokenizer":
        """Read the tokenizer of a pretrained model.

        Args:
            path: A `tokenizer.json`.

        Returns:
            The tokenizer. Its start token is the first of `<|start|>`, `<s>`, `<bos>`,
            `<|begin_of_text|>`, `<|endoftext|>` and `[CLS]` that the vocabulary has.

        Raises:
            DataError: If the file is missing or no tokenizer.
        """
        try:
            return cls(Path(path).read_text(encoding="utf-8"))
        # the library raises bare Exception for JSON that is no tokenizer
        except Exception as err:
            msg = f"{os.fspath(path)} must be a Hugging Face tokenizer.json: {err}. Check the path."
            raise DataError(msg) from err

    @property
    def vocab_size(self) -> int:
        """One more than the largest id, added tokens included."""
        return self._vocab_size

    @property
    def start_id(self) -> int | None:
        """Token put before every document, or `None` if the vocabulary has none."""
        return self._start_id

    @property
    def fingerprint(self) -> str:
        """Hash of the content of `tokenizer.json`, without truncation and padding."""
        return self._fingerprint

    def encode(self, text: str) -> Int32[np.ndarray, " token"]:
        """Turn a text into ids, without start or other special tokens.

        A long text is encoded in pieces if the tokenizer is a byte-level one that splits like
        GPT-2's, so that memory stays bounded; the ids are the same. With other tokenizers memory
        grows with the text.

        Args:
            text: Any text. A special token spelled out in it is encoded like other text.

        Returns:
            One id per token.
        """
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[Int32[np.ndarray, " _token"]]:
        """Turn several texts into ids, in parallel.

        Args:
            texts: Any texts.

        Returns:
            What `encode` gives for each of them.
        """
        pieces = ((i, piece) for i, text in enumerate(texts) for piece in self._cut(text))
        parts: list[list[Int32[np.ndarray, " _token"]]] = [[] for _ in texts]
        while some := list(islice(pieces, _PIECES_AT_ONCE)):
            encoded = self._tokenizer.encode_batch_fast(
                [piece for _, piece in some], add_special_tokens=False
            )
            for (i, _), encoding in zip(some, encoded, strict=True):
                parts[i].append(np.array(encoding.ids, dtype=np.int32))
        return [np.concatenate(part) for part in parts]

    def decode(self, ids: Sequence[int] | Integer[np.ndarray, " token"]) -> str:
        """Turn ids into text.

        Args:
            ids: Ids below `vocab_size`; start and other special tokens leave no trace.

        Returns:
            The text. Where the ids end inside a character it holds U+FFFD.
        """
        return str(self._tokenizer.decode(np.asarray(ids).tolist(), skip_special_tokens=True))

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write a `tokenizer.json` that `load_tokenizer` and Hugging Face libraries read.

        Args:
            folder: Made if missing.
        """
        Path(folder).mkdir(parents=True, exist_ok=True)
        text = json.dumps(self._settings, ensure_ascii=False, indent=2)
        write_text_atomic(Path(folder, _BPE_FILE), text + "\n")

    def _cut(self, text: str) -> Iterator[str]:
        return _cut_at_spaces(text) if self._can_cut else iter([text])


def load_tokenizer(name: str | os.PathLike[str]) -> Tokenizer:
    """Load a tokenizer by path, or the one that needs no file.

    Args:
        name: `"bytes"`, a folder with a `tokenizer.json` (that of a Hugging Face model will do) or
            a saved byte tokenizer, or the path of a `tokenizer.json`.

    Returns:
        The tokenizer.

    Raises:
        DataError: If there is no tokenizer at this path.
    """
    path = Path(name)
    if name == "bytes" or _is_byte_tokenizer(path / _BYTE_FILE):
        return ByteTokenizer()
    file = path / _BPE_FILE if path.is_dir() else path
    if not file.is_file():
        msg = (
            f"Tokenizer {os.fspath(name)!r} must be 'bytes', a folder with {_BPE_FILE} or "
            f"{_BYTE_FILE}, or a {_BPE_FILE}, and is none of them. Check the path."
        )
        raise DataError(msg)
    return BpeTokenizer.from_file(file)


def _is_byte_tokenizer(file: Path) -> bool:
    if not file.is_file():
        return False
    settings = json.loads(file.read_text(encoding="utf-8"))
    if settings != _BYTE_SETTINGS:
        msg = f"{file} must hold {_BYTE_SETTINGS}, got {settings}. Save the tokenizer again."
        raise DataError(msg)
    return True


def _hash(settings: Mapping[str, object]) -> str:
    canonical = json.dumps(settings, sort_keys=True, ensure_ascii=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()


def _splits_at_spaces(settings: Mapping[str, Any]) -> bool:
    # GPT-2's pattern matches from left to right and never looks back, so a text may be cut where
    # any match ends. A word, number or run of signs never reaches over white space, hence a match
    # ends before each white space that follows something else; and such a match looks at nothing
    # behind it. Merges stay inside a match. A normalizer, or an added token that is searched for in
    # the text first, could undo this.
    splitter = settings.get("pre_tokenizer") or {}
    return (
        settings.get("normalizer") is None
        and splitter.get("type") == "ByteLevel"
        and splitter.get("add_prefix_space") is False
        and splitter.get("use_regex", True)
        and all(token["special"] for token in settings.get("added_tokens", ()))
    )


def _cut_at_spaces(text: str) -> Iterator[str]:
    start = 0
    while len(text) - start > _PIECE_CHARS:
        border = _PIECE_BORDER.search(text, start + _PIECE_CHARS)
        if border is None:
            break
        yield text[start : border.start()]
        start = border.start()
    yield text[start:]


def _pieces_of(texts: Iterable[str]) -> Iterator[str]:
    for text in texts:
        yield from _cut_at_spaces(text)
