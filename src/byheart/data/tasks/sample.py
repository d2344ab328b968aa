"""A document of a task, put together as it is read, and batches of them."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Int32
from torch import Tensor

from byheart.data.tasks.streams import TokenStream
from byheart.data.tokenize import Tokenizer

__all__ = ["TaskSample", "collate", "pad_questions"]


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class TaskSample:
    """Facts in a long background, and a question at the end.

    Only the facts, the question and the order of the background are kept. Tokens are put together
    when they are asked for, at a cost that does not depend on the length of the document.
    """

    num_tokens: int
    """Length of the document."""
    num_segments: int
    """Segments it fills."""
    label: int
    """Index of the answer among the labels of the task."""
    facts: tuple[tuple[int, Int32[np.ndarray, " _fact"]], ...]
    """Offset in the document and tokens of each fact, in the order of the story."""
    question: Int32[np.ndarray, " question"]
    """Tokens of the question, the last of the document."""
    background: TokenStream
    """The text around them."""
    tokenizer: Tokenizer
    """Turns tokens into text."""
    fragments: tuple[tuple[int, Int32[np.ndarray, " _fragment"]], ...] = ()
    """Offset and tokens of what looks like a part of a fact and is none."""
    overwrites: bool = False
    """Whether facts take the place of background tokens, as in the report, or come in between."""
    is_report: bool = False
    """Whether the question is padded to the longest of its batch; see `pad_questions`."""

    @property
    def fact_positions(self) -> tuple[int, ...]:
        """Token offset of each fact, in the story's order; in `capacity` the asked one is first."""
        return tuple(position for position, _ in self.facts)

    @property
    def question_length(self) -> int:
        """Tokens of the question, without padding."""
        return len(self.question)

    def tokens(self, start: int, stop: int) -> Int32[np.ndarray, " token"]:
        """Give any piece of the document.

        Args:
            start: First token, counted from 0.
            stop: One past the last, at most `num_tokens`.

        Returns:
            `stop - start` ids.

        Raises:
            ValueError: If the piece does not lie in the document.
        """
        if not 0 <= start <= stop <= self.num_tokens:
            msg = (
                f"start and stop must lie in the document, 0 <= start <= stop <= num_tokens "
                f"({self.num_tokens}), got {start} and {stop}."
            )
            raise ValueError(msg)
        parts = [np.zeros(0, dtype=np.int32)]
        for begin, end, source, origin in self._spans():
            low, high = max(start, begin) - origin, min(stop, end) - origin
            if low < high:
                parts.append(
                    self.background.read(low, high) if source is None else source[low:high]
                )
        return np.concatenate(parts)

    def text(self) -> str:
        """Decode the whole document, to look at it.

        Returns:
            Its text, which for a long document is as long.
        """
        return self.tokenizer.decode(self.tokens(0, self.num_tokens))

    def _spans(self) -> Iterator[tuple[int, int, Int32[np.ndarray, " _text"] | None, int]]:
        """Yield where a span begins and ends, its source, and where the source's token 0 stands."""
        place = origin = 0
        for position, fact in sorted((*self.facts, *self.fragments), key=lambda item: item[0]):
            yield place, position, None, origin
            place = position + len(fact)
            yield position, place, fact, position
            origin += 0 if self.overwrites else len(fact)
        end = self.num_tokens - len(self.question)
        yield place, end, None, origin
        yield end, self.num_tokens, self.question, end


def pad_questions(samples: Sequence[TaskSample]) -> list[TaskSample]:
    """Make the documents of a batch as long as the report's code does.

    The report pads the questions of a batch to one length, counts the padding into the length of
    the document and drops it again. So a document with a shorter question loses background.

    Args:
        samples: A batch. Those in clean form stay as they are.

    Returns:
        The same samples; in report form each is shorter by what its question lacks to the longest.

    Source:
        Bulatov et al. 2023, Scaling Transformer to 1M tokens and beyond with RMT, "Memorization
        Tasks" (arXiv:2304.11062); the padding is in its code only.
    """
    longest = max((s.question_length for s in samples if s.is_report), default=0)
    return [
        replace(s, num_tokens=s.num_tokens - (longest - s.question_length)) if s.is_report else s
        for s in samples
    ]


def collate(samples: Sequence[TaskSample], pad_id: int = 0) -> dict[str, Tensor]:
    """Make a batch of whole documents.

    Args:
        samples: Documents, of any lengths.
        pad_id: Id behind shorter documents.

    Returns:
        `input_ids` and `attention_mask` (batch, token), 1 where there is a token and 0 where there
        is padding, and `labels` (batch), all of them int64. In report form questions are padded
        first; see `pad_questions`.

    Raises:
        ValueError: If there is no sample.
    """
    if not samples:
        msg = "samples must hold at least one sample, got none."
        raise ValueError(msg)
    rows = [sample.tokens(0, sample.num_tokens) for sample in pad_questions(samples)]
    shape = len(rows), max(map(len, rows))
    input_ids = np.full(shape, pad_id, dtype=np.int64)
    attention_mask = np.zeros(shape, dtype=np.int64)
    for i, row in enumerate(rows):
        input_ids[i, : len(row)] = row
        attention_mask[i, : len(row)] = 1
    return {
        "input_ids": torch.from_numpy(input_ids),
        "attention_mask": torch.from_numpy(attention_mask),
        "labels": torch.tensor([sample.label for sample in samples], dtype=torch.int64),
    }
