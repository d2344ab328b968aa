"""Accuracy by number of segments: documents of any length, read in pieces."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np
import torch
from torch import Tensor

from byheart.adapters.recurrent import RecurrentMemory
from byheart.data.tasks import Task, TaskSample, pad_questions
from byheart.evaluation.peak_memory import peak_memory
from byheart.evaluation.segments_result import SegmentsMeasurement, SegmentsResult
from byheart.ops.segments import segment_bounds

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
    """Tokens that will be read."""


def evaluate_by_segments(
    memory_model: RecurrentMemory,
    task: Task,
    *,
    segments: Sequence[int] = SEGMENTS,
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
        segments: Lengths, in segments.
        samples: Documents of each length.
        rows: Documents read at the same time.
        segments_per_call: Segments given to the model at once.
        precision: Of the matrix products; the memory is always float32.
        on_progress: Called after every piece.

    Returns:
        Accuracy, speed and peak memory for each length.

    Raises:
        ValueError: If model and task differ in the length of a segment, or a number is below 1.
    """
    numbers = {"samples": samples, "rows": rows, "segments_per_call": segments_per_call}
    _check(memory_model, task, segments, numbers)
    device = memory_model.new_state(1).memory.device
    length = task.config.segment_length
    total, done = sum(segments) * samples * length, 0
    measurements = []
    for num_segments in segments:
        started = time.perf_counter()

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
                num_tokens=num_segments * samples * length,
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
    """
    right = 0
    device = memory_model.new_state(1).memory.device
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=precision == "bfloat16")
    with _evaluating(memory_model), autocast:
        for start in range(0, len(indices), rows):
            samples = [task.sample(i, num_segments) for i in indices[start : start + rows]]
            logits = _answer(memory_model, samples, segments_per_call, on_tokens)
            labels = torch.tensor([sample.label for sample in samples], device=logits.device)
            right += int((logits.argmax(dim=-1) == labels).sum())
    return right


def _answer(
    memory_model: RecurrentMemory,
    samples: Sequence[TaskSample],
    segments_per_call: int,
    on_tokens: Callable[[int], None] | None,
) -> Tensor:
    """Read documents of equally many segments, piece by piece.

    Returns:
        Logits, one row per document.
    """
    samples, config = pad_questions(samples), memory_model.memory_config
    bounds = [
        segment_bounds(sample.num_tokens, config.segment_length, config.alignment)
        for sample in samples
    ]
    # segments of `center` are not full, so that only one at a time keeps its borders
    width = 1 if config.alignment == "center" else segments_per_call
    state = memory_model.new_state(len(samples))
    logits: Tensor | None = None
    for first in range(0, len(bounds[0]), width):
        pieces = [
            sample.tokens(cuts[first][0], cuts[first : first + width][-1][1])
            for sample, cuts in zip(samples, bounds, strict=True)
        ]
        input_ids, mask = _batch(pieces, state.memory.device)
        output = memory_model(input_ids, attention_mask=mask, state=state)
        state, logits = state.commit(output.new_entries), output.logits
        if on_tokens is not None:
            on_tokens(sum(map(len, pieces)))
    assert logits is not None
    return logits


def _batch(pieces: Sequence[np.ndarray], device: torch.device) -> tuple[Tensor, Tensor | None]:
    lengths = [len(piece) for piece in pieces]
    ids = np.zeros((len(pieces), max(lengths)), dtype=np.int64)
    for row, piece in enumerate(pieces):
        ids[row, : len(piece)] = piece
    input_ids = torch.from_numpy(ids).to(device)
    if len(set(lengths)) == 1:
        return input_ids, None
    columns = torch.arange(max(lengths), device=device)
    return input_ids, (columns < torch.tensor(lengths, device=device)[:, None]).long()


@contextmanager
def _evaluating(memory_model: RecurrentMemory) -> Iterator[None]:
    was_training = memory_model.training
    memory_model.train(False)
    try:
        with torch.no_grad():
            yield
    finally:
        memory_model.train(was_training)


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
    for name, value in numbers.items():
        if value < 1:
            msg = f"{name} must be at least 1, got {value}."
            raise ValueError(msg)
