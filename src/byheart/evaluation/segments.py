"""Accuracy by number of segments: documents of any length, read in pieces."""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch

from byheart.adapters.recurrent import RecurrentMemory
from byheart.adapters.recurrent_reading import DocumentRead, read_documents
from byheart.data.tasks import Task, TaskSample, pad_questions
from byheart.evaluation.peak_memory import peak_memory
from byheart.evaluation.segments_result import SegmentsMeasurement, SegmentsResult

__all__ = ["SEGMENTS", "Precision", "SegmentsProgress", "count_right", "evaluate_by_segments"]

Precision: TypeAlias = Literal["float32", "bfloat16"]

SEGMENTS = tuple(2**power for power in range(13))
"""From 1 to 4,096 segments, as in the report."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SegmentsProgress:
    """How far an evaluation is."""

    num_segments: int
    """Length that is measured now."""
    num_tokens: int
    """Tokens read, of all lengths."""
    total_tokens: int
    """Tokens that will be read; the report's documents have up to a question fewer each."""


def evaluate_by_segments(
    memory_model: RecurrentMemory,
    task: Task,
    *,
    segments: Sequence[int] | None = None,
    samples: int = 400,
    rows: int = 50,
    segments_per_call: int = 8,
    precision: Precision = "float32",
    on_progress: Callable[[SegmentsProgress], None] | None = None,
) -> SegmentsResult:
    """Measure the accuracy on documents of several lengths.

    No document is ever held as a whole: the model is given a few segments at a time.

    Args:
        memory_model: A classifier with memory.
        task: The documents; of each length the first `samples` are read.
        segments: Lengths, in segments; `None` for those of `SEGMENTS` that hold all facts.
        samples: Documents of each length.
        rows: Documents read at the same time.
        segments_per_call: Segments given to the model at once.
        precision: Of the matrix products; the memory is always float32.
        on_progress: Called after every piece.

    Returns:
        Accuracy, speed and peak memory for each length.

    Raises:
        ValueError: If model and task differ in the length of a segment, a number is below 1, a
            length cannot hold all facts, or the scores of a document are not finite.
    """
    if segments is None:
        segments = tuple(n for n in SEGMENTS if n >= task.min_segments)
    numbers = {"samples": samples, "rows": rows, "segments_per_call": segments_per_call}
    _check(memory_model, task, segments, numbers)
    device = memory_model.new_state(1).memory.device
    length = task.config.segment_length
    total, done = sum(segments) * samples * length, 0
    measurements = []
    for num_segments in segments:
        started, before = time.perf_counter(), done

        def moved(num_tokens: int, num_segments: int = num_segments) -> None:
            nonlocal done
            done += num_tokens
            if on_progress is not None:
                on_progress(
                    SegmentsProgress(num_segments=num_segments, num_tokens=done, total_tokens=total)
                )

        with peak_memory(device) as peak:
            right = count_right(
                memory_model,
                task,
                num_segments,
                range(samples),
                rows=rows,
                segments_per_call=segments_per_call,
                precision=precision,
                on_tokens=moved,
            )
        measurements.append(
            SegmentsMeasurement(
                num_segments=num_segments,
                num_samples=samples,
                num_right=right,
                num_tokens=done - before,
                seconds=time.perf_counter() - started,
                peak_memory_bytes=peak.num_bytes,
            )
        )
    return SegmentsResult(
        task=task.config.name,
        form=task.config.form,
        segment_length=length,
        num_labels=task.num_labels,
        measurements=tuple(measurements),
        precision=precision,
        num_facts=task.config.num_facts if task.config.name == "capacity" else None,
    )


def count_right(
    memory_model: RecurrentMemory,
    task: Task,
    num_segments: int,
    indices: Sequence[int],
    *,
    rows: int = 50,
    segments_per_call: int = 8,
    precision: Precision = "float32",
    on_tokens: Callable[[int], None] | None = None,
) -> int:
    """Count the documents whose question is answered right.

    Args:
        memory_model: A classifier with memory.
        task: The documents.
        num_segments: Their length.
        indices: Which of them.
        rows: Documents read at the same time.
        segments_per_call: Segments given to the model at once.
        precision: Of the matrix products; the memory is always float32.
        on_tokens: Called after every piece with the number of its tokens.

    Returns:
        Right answers.

    Raises:
        ValueError: If the scores of a document are not finite.
    """
    labels: dict[int, int] = {}

    def documents() -> Iterator[TaskSample]:
        for start in range(0, len(indices), rows):
            batch = [task.sample(index, num_segments) for index in indices[start : start + rows]]
            for place, sample in enumerate(pad_questions(batch), start):
                labels[place] = sample.label
                yield sample

    device = memory_model.memory.memory.device
    with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bfloat16"):
        return sum(
            _answer(read, indices, num_segments) == labels.pop(read.index)
            for read in read_documents(
                memory_model,
                documents(),
                rows=rows,
                segments_per_call=segments_per_call,
                on_tokens=on_tokens,
            )
        )


def _answer(read: DocumentRead, indices: Sequence[int], num_segments: int) -> int:
    logits = read.logits.cpu()
    # the largest of scores that are no numbers would be the first, and often enough right
    if not logits.isfinite().all():
        msg = (
            f"The scores of every document must be finite, got {logits.tolist()} for document "
            f"{indices[read.index]} of {num_segments} segments. The model has diverged: train it "
            "with a lower learning rate, or take it from an earlier checkpoint."
        )
        raise ValueError(msg)
    return int(logits.argmax())


def _check(
    memory_model: RecurrentMemory, task: Task, segments: Sequence[int], numbers: dict[str, int]
) -> None:
    mine, theirs = memory_model.memory_config.segment_length, task.config.segment_length
    if mine != theirs:
        msg = (
            f"Model and task must have segments of the same length, got {mine} and {theirs}. Make "
            f"the task with segment_length={mine}."
        )
        raise ValueError(msg)
    if not segments or min(segments) < 1:
        msg = f"segments must be one or more numbers of at least 1, got {list(segments)}."
        raise ValueError(msg)
    if min(segments) < task.min_segments:
        msg = (
            f"segments must be at least the {task.min_segments} that hold all facts, got "
            f"{list(segments)}. Leave the shorter ones out."
        )
        raise ValueError(msg)
    for name, value in numbers.items():
        if value < 1:
            msg = f"{name} must be at least 1, got {value}."
            raise ValueError(msg)
