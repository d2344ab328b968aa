"""Background text as endless streams of tokens, of which any piece is cheap to read."""

import os
from importlib import resources
from itertools import chain
from pathlib import Path
from typing import Literal, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Int32

from byheart.data.documents import iter_documents
from byheart.data.tasks.facts import Split
from byheart.data.tokenize import Tokenizer
from byheart.errors import DataError

__all__ = [
    "PeriodicStream",
    "ShuffledStream",
    "Stories",
    "TokenStream",
    "background_path",
    "read_background",
]


@runtime_checkable
class TokenStream(Protocol):
    """Endless tokens, the same at every reading."""

    def read(self, start: int, stop: int) -> Int32[np.ndarray, " token"]:
        """Give a piece of the stream.

        Args:
            start: First token, counted from 0.
            stop: One past the last.

        Returns:
            `stop - start` ids.
        """
        ...


def background_path(name: Split | Literal["more"]) -> Path:
    """Tell where the background that comes with byheart lies: stories under CC0.

    `README.md` beside it names the stories, their sources and licence.

    Args:
        name: Those of a split, or 87 more to train on, most of them longer. No story is in two.

    Returns:
        A JSON lines file that `iter_documents` reads.

    Raises:
        DataError: If byheart was installed without the file.
    """
    path = Path(str(resources.files(__package__) / "background" / f"{name}.jsonl.xz"))
    if not path.is_file():
        msg = f"The background must lie at {path}, and does not. Install byheart again."
        raise DataError(msg)
    return path


def read_background(
    path: str | os.PathLike[str] | None, split: Split, *, more: bool = False
) -> list[str]:
    """Read the texts of a background.

    Args:
        path: Anything `iter_documents` reads, used for both splits; `None` takes the background
            that comes with byheart.
        split: Which of the stories that come with byheart.
        more: Whether 87 more stories to train on follow them. Only training can have them.

    Returns:
        The texts with anything but white space in them.

    Raises:
        DataError: If there is no such text.
        ValueError: If `more` stories are asked for where there are none.
    """
    if more and (path is not None or split != "train"):
        msg = (
            "more_stories must be false but for byheart's own stories to train on, got "
            f"split={split!r} and background={None if path is None else os.fspath(path)!r}. Set "
            "more_stories=false."
        )
        raise ValueError(msg)
    place = background_path(split) if path is None else path
    places = [place, background_path("more")] if more else [place]
    documents = chain.from_iterable(map(iter_documents, places))
    texts = [document.text for document in documents if document.text.strip()]
    if not texts:
        msg = f"background must hold text, and {os.fspath(place)} holds none. Check the path."
        raise DataError(msg)
    return texts


class Stories:
    """Tokenised stories, one after the other.

    Args:
        texts: The stories; a blank line is put behind each.
        tokenizer: Turns them into ids.

    Raises:
        DataError: If the tokenizer gives no tokens for any of them.
    """

    def __init__(self, texts: list[str], tokenizer: Tokenizer) -> None:
        encoded = tokenizer.encode_batch([f"{text.rstrip()}\n\n" for text in texts])
        encoded = [ids for ids in encoded if len(ids)]
        if not encoded:
            msg = "background must hold text that the tokenizer knows, got no token. Check both."
            raise DataError(msg)
        self.ids: Int32[np.ndarray, " token"] = np.concatenate(encoded)
        """All tokens."""
        self.ends = np.cumsum([len(ids) for ids in encoded])
        """Where in `ids` each story ends."""


class ShuffledStream:
    """Different stories in random order: no token of the background twice before all were read.

    The stream starts at any token of any story, goes on with the others in random order and comes
    at last to the part of the first story that was left out. A stream longer than the whole
    background then goes on with all stories in another random order, and so on.

    Args:
        stories: The background.
        seed: Non-negative numbers that determine the order and the start.
    """

    def __init__(self, stories: Stories, seed: tuple[int, ...]) -> None:
        self._stories = stories
        self._seed = seed
        self._cycle = -1
        # where each piece of the cycle ends in the stream, and begins in the stories
        self._ends = self._origins = np.zeros(0, dtype=np.int64)

    def read(self, start: int, stop: int) -> Int32[np.ndarray, " token"]:
        """Give a piece of the stream.

        Args:
            start: First token, counted from 0.
            stop: One past the last.

        Returns:
            `stop - start` ids.
        """
        parts = [np.zeros(0, dtype=np.int32)]
        while start < stop:
            cycle, place = divmod(start, len(self._stories.ids))
            if cycle != self._cycle:
                self._arrange(cycle)
            piece = int(np.searchsorted(self._ends, place, side="right"))
            count = min(stop - start, int(self._ends[piece]) - place)
            # pieces end together in both countings, so this is the distance to a piece's origin
            begin = int(self._ends[piece - 1]) if piece else 0
            origin = int(self._origins[piece]) + place - begin
            parts.append(self._stories.ids[origin : origin + count])
            start += count
        return np.concatenate(parts)

    def _arrange(self, cycle: int) -> None:
        rng = np.random.default_rng((*self._seed, cycle))
        ends = self._stories.ends
        begins = ends - np.diff(ends, prepend=0)
        order = rng.permutation(len(ends))
        if cycle == 0:
            token = int(rng.integers(ends[-1]))
            first = int(np.searchsorted(ends, token, side="right"))
            order = np.concatenate(([first], order[order != first], [first]))
            begins, ends = begins[order], ends[order]
            begins[0], ends[-1] = token, token
        else:
            begins, ends = begins[order], ends[order]
        # the part left out is empty if the stream starts with a story's first token
        is_full = ends > begins
        self._ends = np.cumsum((ends - begins)[is_full])
        self._origins = begins[is_full]
        self._cycle = cycle


class PeriodicStream:
    """One text over and over, without a separator, as the report repeats its articles.

    The tokens are those of the repeated text, also where a word runs from one copy into the next,
    for every tokenizer whose tokens depend on their surroundings only.

    Args:
        text: The text.
        tokenizer: Turns it into ids.

    Raises:
        DataError: If the tokenizer gives no tokens for it.
    """

    def __init__(self, text: str, tokenizer: Tokenizer) -> None:
        once, twice = tokenizer.encode_batch([text, text + text])
        period = len(twice) - len(once)
        if period < 1:
            msg = f"background must hold text that the tokenizer knows, got {text[:40]!r}."
            raise DataError(msg)
        # from the middle of one copy to that of the next, where no text's end is near
        middle = len(once) // 2
        self._head = twice[:middle]
        self._period = twice[middle : middle + period]

    def read(self, start: int, stop: int) -> Int32[np.ndarray, " token"]:
        """Give a piece of the stream.

        Args:
            start: First token, counted from 0.
            stop: One past the last.

        Returns:
            `stop - start` ids.
        """
        head = self._head[start:stop]
        begin = max(start, len(self._head)) - len(self._head)
        turns = np.arange(begin, begin + stop - start - len(head)) % len(self._period)
        return np.concatenate([head, self._period[turns]])
