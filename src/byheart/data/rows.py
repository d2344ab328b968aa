"""Document-ordered rows: which row of the batch reads which segment of which document at a step.

A row reads one document from its start to its end, one segment a step, and then takes the next
document from one order that all rows share. No segment holds two documents, so a row changes
document only between segments and its last segment of a document is padded. Memory can therefore
be kept per row and cleared when `document_start` says so.

A document of `n` tokens has `n - 1` inputs and as many labels, each label the token after its
input, across the borders of segments too: every token but the first is predicted exactly once.
"""

import hashlib
import heapq
import json
from array import array
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Int64, Integer
from torch import Tensor
from torch.utils.data import Dataset

from byheart.errors import DataError
from byheart.ops.losses import IGNORED

__all__ = ["Corpus", "RowPlan", "RowPosition", "SegmentDataset", "collate"]

_MIN_TOKENS = 2


@runtime_checkable
class Corpus(Protocol):
    """What `SegmentDataset` needs of a corpus; `TokenizedCorpus` has it."""

    @property
    def fingerprint(self) -> str:
        """Hash of the content."""
        ...

    @property
    def document_ids(self) -> Sequence[str]:
        """Identifier of each document."""
        ...

    @property
    def lengths(self) -> Integer[np.ndarray, " document"]:
        """Tokens of each document, the start token included."""
        ...

    def document(self, index: int) -> Integer[np.ndarray, " token"]:
        """Give the tokens of one document.

        Args:
            index: Which document, counted from 0.

        Returns:
            All its tokens, the start token first.
        """
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class RowPosition:
    """Where a row reads at a step."""

    document: int
    """Index of the document in the corpus."""
    epoch: int
    """How often all documents have been handed out before, counted from 0."""
    offset: int
    """Index in the document of the segment's first input token; 0 where the document starts."""


class RowPlan:
    """The schedule of all rows, computed from the lengths of the documents alone.

    Documents are handed out in one order per epoch: the row that ends its document at the earliest
    step takes the next one, of several the lowest row. At the end of an epoch rows go on with the
    next without a pause, so that two epochs overlap by some steps. The same arguments give the same
    schedule on every machine and with every version of NumPy.

    Args:
        lengths: Tokens of each document, start token included.
        segment_length: Input tokens of a segment.
        num_rows: Rows of the whole batch, over all processes and accumulated micro-batches.
        num_steps: Steps to plan; `None` means one pass: until every document has been read once.
            Rows that find no further document are then idle.
        seed: Shuffles the documents, differently in each epoch; `None` keeps the corpus order.
        min_document_tokens: Leave out documents shorter than this.
        max_document_tokens: Read only this many tokens of longer documents.

    Raises:
        ValueError: If a number is out of range.
        DataError: If no document is long enough.
    """

    def __init__(
        self,
        lengths: Integer[np.ndarray, " document"],
        *,
        segment_length: int,
        num_rows: int,
        num_steps: int | None = None,
        seed: int | None = None,
        min_document_tokens: int = _MIN_TOKENS,
        max_document_tokens: int | None = None,
    ) -> None:
        _check_at_least(1, segment_length=segment_length, num_rows=num_rows)
        _check_at_least(_MIN_TOKENS, min_document_tokens=min_document_tokens)
        if num_steps is not None:
            _check_at_least(1, num_steps=num_steps)
        if seed is not None:
            _check_at_least(0, seed=seed)
        if max_document_tokens is not None:
            _check_at_least(min_document_tokens, max_document_tokens=max_document_tokens)
        self.segment_length = segment_length
        self.num_rows = num_rows
        self.seed = seed
        self.is_one_pass = num_steps is None
        """Whether the plan ends when every document has been read once."""
        self.lengths = np.array(lengths, dtype=np.int64)
        """Tokens of each document of the corpus."""
        longest = np.iinfo(np.int64).max if max_document_tokens is None else max_document_tokens
        self.document_tokens = np.minimum(self.lengths, longest)
        """Tokens the plan reads of each document, if it is not left out."""
        self._documents = np.flatnonzero(self.lengths >= min_document_tokens)
        if not len(self._documents):
            msg = (
                f"A document must have min_document_tokens ({min_document_tokens}) or more, the "
                f"longest has {self.lengths.max(initial=0)}. Lower min_document_tokens."
            )
            raise DataError(msg)
        self._rows = [_RowSchedule() for _ in range(num_rows)]
        # (first step without a document, row): a heap, so that its head takes the next document
        self._free = [(0, row) for row in range(num_rows)]
        # (document, segments) still to hand out in this epoch, the next one last
        self._pending: list[tuple[int, int]] = []
        self._start_epoch(0)
        self.num_steps = self._plan_one_pass() if num_steps is None else num_steps
        """Steps of the plan."""

    @property
    def num_documents(self) -> int:
        """Documents read in an epoch: those that are long enough."""
        return len(self._documents)

    @property
    def num_segments_per_epoch(self) -> int:
        """Segments of all documents read in an epoch."""
        return int(self._num_segments(self._documents).sum())

    @property
    def num_steps_per_epoch(self) -> int:
        """Steps in which the rows together read as many segments as an epoch has, rounded up."""
        return -(-self.num_segments_per_epoch // self.num_rows)

    @property
    def fingerprint(self) -> str:
        """Hash of everything the schedule depends on.

        The number of steps is not part of it: a longer plan only continues a shorter one.
        """
        settings = [self.segment_length, self.num_rows, self.seed, self.is_one_pass]
        digest = hashlib.sha256(json.dumps(["row plan 1", *settings]).encode())
        for numbers in (self.document_tokens, self._documents):
            digest.update(numbers.astype("<i8").tobytes())
        return digest.hexdigest()

    def position(self, step: int, row: int) -> RowPosition | None:
        """Look up where a row reads.

        Args:
            step: Step of the plan, counted from 0.
            row: Row of the whole batch, counted from 0.

        Returns:
            The position, or `None` if the row is idle because the one pass has no further document.

        Raises:
            IndexError: If the plan has no such step or row.
        """
        for name, value, end in (("step", step, self.num_steps), ("row", row, self.num_rows)):
            if not 0 <= value < end:
                msg = f"{name} must be between 0 and {end - 1}, got {value}."
                raise IndexError(msg)
        # planned only as far as asked for: a long run need not wait for its last step
        while not self.is_one_pass and self._free[0][0] <= step:
            self._hand_out_next()
        schedule = self._rows[row]
        index = bisect_right(schedule.first_steps, step) - 1
        if index < 0:
            return None
        document = schedule.documents[index]
        offset = (step - schedule.first_steps[index]) * self.segment_length
        if offset >= self.document_tokens[document] - 1:
            return None
        return RowPosition(document=document, epoch=schedule.epochs[index], offset=offset)

    def _plan_one_pass(self) -> int:
        while self._pending:
            self._hand_out_next()
        return max(step for step, _ in self._free)

    def _hand_out_next(self) -> None:
        if not self._pending:
            self._start_epoch(self._epoch + 1)
        document, num_segments = self._pending.pop()
        first_step, row = self._free[0]
        self._rows[row].append(first_step, document, self._epoch)
        heapq.heapreplace(self._free, (first_step + num_segments, row))

    def _start_epoch(self, epoch: int) -> None:
        self._epoch = epoch
        order = self._documents
        if self.seed is not None:
            # NumPy promises the raw numbers of PCG64 for ever, but not what `permutation` makes
            # of them
            sequence = np.random.SeedSequence([self.seed, epoch])
            keys = np.random.PCG64(sequence).random_raw(len(order))
            order = order[np.argsort(keys, kind="stable")]
        last_first = order[::-1]
        num_segments = self._num_segments(last_first)
        self._pending = list(zip(last_first.tolist(), num_segments.tolist(), strict=True))

    def _num_segments(
        self, documents: Int64[np.ndarray, " document"]
    ) -> Int64[np.ndarray, " document"]:
        num_inputs: Int64[np.ndarray, " document"] = self.document_tokens[documents] - 1
        return -(-num_inputs // self.segment_length)


class _RowSchedule:
    """The documents of one row, in the order of their first steps; 16 bytes each."""

    def __init__(self) -> None:
        self.first_steps = array("q")
        self.documents = array("I")
        self.epochs = array("I")

    def append(self, first_step: int, document: int, epoch: int) -> None:
        self.first_steps.append(first_step)
        self.documents.append(document)
        self.epochs.append(epoch)


class SegmentDataset(Dataset[dict[str, Tensor]]):
    """The segments of a plan as a map-style dataset, item `step * num_rows + row`.

    Read in order, in batches of a size that divides the number of rows, it gives every slot of
    every batch its own rows, on several processes and with accumulated micro-batches too. So any
    sequential sampler will do, that of the Hugging Face Trainer included, and skipping batches
    resumes a run.

    An item holds

    - `input_ids` (`segment_length`): tokens `offset` and following of the document, then zeros;
    - `labels` (`segment_length`): for each input the token after it, then -100;
    - `num_tokens` (scalar): inputs that are no padding; 0 in an idle row;
    - `document_start` (scalar): whether the document starts here, so that memory must be cleared.

    Args:
        corpus: The tokens.
        plan: The schedule, made from the lengths of this corpus.

    Raises:
        ValueError: If the plan was made for other lengths.
    """

    def __init__(self, corpus: Corpus, plan: RowPlan) -> None:
        if not np.array_equal(corpus.lengths, plan.lengths):
            msg = (
                f"The plan must be made for the lengths of the corpus ({len(corpus.lengths)} "
                f"documents), got one for others ({len(plan.lengths)} documents). "
                "Make it with RowPlan(corpus.lengths, ...)."
            )
            raise ValueError(msg)
        self.corpus = corpus
        self.plan = plan

    @property
    def fingerprint(self) -> str:
        """Hash of tokens and schedule: two datasets that share it give the same items."""
        parts = f"{self.corpus.fingerprint} {self.plan.fingerprint}"
        return hashlib.sha256(parts.encode()).hexdigest()

    def __len__(self) -> int:
        return self.plan.num_steps * self.plan.num_rows

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        step, row = divmod(index, self.plan.num_rows)
        position = self.plan.position(step, row)
        length = self.plan.segment_length
        input_ids = torch.zeros(length, dtype=torch.int64)
        labels = torch.full((length,), IGNORED, dtype=torch.int64)
        num_tokens = 0
        if position is not None:
            end = int(self.plan.document_tokens[position.document])
            tokens = self.corpus.document(position.document)
            tokens = tokens[position.offset : min(position.offset + length + 1, end)]
            segment = torch.from_numpy(tokens.astype(np.int64))
            num_tokens = len(segment) - 1
            input_ids[:num_tokens] = segment[:-1]
            labels[:num_tokens] = segment[1:]
        return {
            "input_ids": input_ids,
            "labels": labels,
            "num_tokens": torch.tensor(num_tokens),
            "document_start": torch.tensor(position is not None and position.offset == 0),
        }

    def positions_at(self, step: int) -> list[dict[str, str | int] | None]:
        """Describe what every row reads at a step, for a checkpoint.

        Args:
            step: Step of the plan, counted from 0.

        Returns:
            For each row the `document` (index), `document_id`, `epoch` and `offset`, all of which
            JSON can hold, or `None` for an idle row.
        """
        positions = [self.plan.position(step, row) for row in range(self.plan.num_rows)]
        return [None if position is None else self._describe(position) for position in positions]

    def _describe(self, position: RowPosition) -> dict[str, str | int]:
        return {
            "document": position.document,
            "document_id": self.corpus.document_ids[position.document],
            "epoch": position.epoch,
            "offset": position.offset,
        }


def collate(items: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Stack items of a `SegmentDataset` into a batch.

    Args:
        items: One item per row, in the order of the rows.

    Returns:
        `input_ids` and `labels` (batch, segment), `num_tokens` and `document_start` (batch).
    """
    return {key: torch.stack([item[key] for item in items]) for key in items[0]}


def _check_at_least(minimum: int, **numbers: int) -> None:
    for name, number in numbers.items():
        if number < minimum:
            msg = f"{name} must be at least {minimum}, got {number}."
            raise ValueError(msg)
