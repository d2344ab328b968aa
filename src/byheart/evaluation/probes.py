"""Accuracy of finding again what a long text mentions once, by length and memory size."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from byheart.config import to_dict
from byheart.data.probes import Probe, ProbeSample
from byheart.evaluation.continuations import score_continuations
from byheart.evaluation.reading import evaluating
from byheart.evaluation.tables import Grid, markdown_table
from byheart.models.segment_model import SegmentModel

__all__ = ["ProbeMeasurement", "ProbeOutcome", "ProbeProgress", "ProbeResult", "evaluate_probe"]

_LOGGER = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class ProbeOutcome:
    """One text."""

    distance: int
    """Tokens from the end of the first fact, which tells the answer, to the end of the text; in
    `babi` the first of several facts."""
    is_right: bool
    """Whether the right answer is the most likely of the candidates, per token."""
    is_greedy: bool
    """Whether the model itself would continue with it, always taking the most likely token."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ProbeMeasurement:
    """Texts of one length, read with one size of memory."""

    num_tokens: int
    """Length of the texts."""
    memory_size: int
    """Entries per row and head of the kNN memory; 0 for none."""
    outcomes: tuple[ProbeOutcome, ...]
    """One per text."""

    @property
    def accuracy(self) -> float:
        """Share of texts whose right answer is the most likely candidate."""
        return sum(outcome.is_right for outcome in self.outcomes) / len(self.outcomes)

    @property
    def greedy_accuracy(self) -> float:
        """Share of texts that the model itself would continue with the right answer."""
        return sum(outcome.is_greedy for outcome in self.outcomes) / len(self.outcomes)


@dataclass(frozen=True, kw_only=True, slots=True)
class ProbeResult:
    """One model on one probe."""

    probe: str
    """The probe."""
    num_candidates: int
    """Answers to choose from."""
    measurements: tuple[ProbeMeasurement, ...]
    """One per length and memory size."""

    def to_dict(self) -> dict[str, object]:
        """Give everything measured and derived, for JSON.

        Returns:
            Nested dictionaries.
        """
        plain = to_dict(self)
        measured = plain["measurements"]
        assert isinstance(measured, list)
        derived = [
            {"accuracy": m.accuracy, "greedy_accuracy": m.greedy_accuracy}
            for m in self.measurements
        ]
        return plain | {
            "chance": 1 / self.num_candidates,
            "measurements": [entry | more for entry, more in zip(measured, derived, strict=True)],
        }

    def to_markdown(self) -> str:
        """Lay the result out for a report.

        Returns:
            A Markdown table.
        """
        samples = len(self.measurements[0].outcomes)
        title = (
            f"Accuracy of {self.probe} ({samples:,} texts each, chance "
            f"{1 / self.num_candidates:.1%})"
        )
        rows = [
            (
                f"{m.num_tokens:,}",
                f"{m.memory_size:,}",
                f"{m.accuracy:.1%}",
                f"{m.greedy_accuracy:.1%}",
            )
            for m in self.measurements
        ]
        header = ("tokens", "memory size", "best of the candidates", "own continuation")
        return markdown_table(Grid(title, header, rows))


@dataclass(frozen=True, kw_only=True, slots=True)
class ProbeProgress:
    """How far an evaluation is."""

    num_tokens: int
    """Tokens read."""
    total_tokens: int
    """Tokens that will be read."""


def evaluate_probe(
    model: SegmentModel,
    probe: Probe,
    *,
    lengths: Sequence[int],
    memory_sizes: Sequence[int | None] = (None,),
    samples: int = 50,
    rows: int = 8,
    on_progress: Callable[[ProbeProgress], None] | None = None,
) -> ProbeResult:
    """Measure how often a model finds the answer again.

    Texts are read a few segments at a time and never held as tensors of their length.

    Args:
        model: A language model with memory.
        probe: The texts; of each length the first `samples` are read.
        lengths: Lengths of the texts, in tokens.
        memory_sizes: Entries per row and head of the kNN memory; `None` for what the model has.
        samples: Texts of each length.
        rows: Texts read side by side.
        on_progress: Called after every batch.

    Returns:
        What became of each text.

    Raises:
        ValueError: If there is no length, a number is below 1, or one of the texts is too short for
            its facts; nothing has been read then.
    """
    numbers = {"samples": samples, "rows": rows, "the number of lengths": len(lengths)}
    for name, value in numbers.items():
        if value < 1:
            msg = f"{name} must be at least 1, got {value}."
            raise ValueError(msg)
    _look_at_all(model, probe, lengths, samples)
    total, done = sum(lengths) * samples * len(memory_sizes), 0
    measurements, num_candidates = [], 0
    for num_tokens in lengths:
        for memory_size in memory_sizes:
            outcomes: list[ProbeOutcome] = []
            for start in range(0, samples, rows):
                texts = [
                    probe.sample(index, num_tokens)
                    for index in range(start, min(start + rows, samples))
                ]
                outcomes += _read(model, texts, memory_size)
                num_candidates = len(texts[0].candidates)
                done += num_tokens * len(texts)
                if on_progress is not None:
                    on_progress(ProbeProgress(num_tokens=done, total_tokens=total))
            measurements.append(
                ProbeMeasurement(
                    num_tokens=num_tokens,
                    memory_size=model.new_state(1, memory_size=memory_size).memory_size,
                    outcomes=tuple(outcomes),
                )
            )
    return ProbeResult(
        probe=probe.config.name, num_candidates=num_candidates, measurements=tuple(measurements)
    )


def _look_at_all(model: SegmentModel, probe: Probe, lengths: Sequence[int], samples: int) -> None:
    # what is too short or too long is refused now, not when the others have been read
    background = 0
    for num_tokens in lengths:
        for index in range(samples):
            sample = probe.sample(index, num_tokens)
            text, answer = sample.text, max(map(len, sample.candidates))
            model.require_document_fits(text.num_tokens + answer - 1, "Use shorter --lengths.")
            facts = sum(len(fact) for _, fact in text.facts)
            background = max(background, num_tokens - len(text.question) - facts)
    if background > probe.num_background_tokens:
        _LOGGER.warning(
            "The background repeats within a text: it has %s tokens, and texts of %s tokens are "
            "asked for. Name more documents, or shorter lengths.",
            f"{probe.num_background_tokens:,}",
            f"{max(lengths):,}",
        )


def _read(
    model: SegmentModel, texts: Sequence[ProbeSample], memory_size: int | None
) -> list[ProbeOutcome]:
    candidates = [[ids.tolist() for ids in text.candidates] for text in texts]
    with evaluating(model):
        scores = score_continuations(
            model, [text.text for text in texts], candidates, memory_size=memory_size
        )
    outcomes = []
    for text, row, answers in zip(texts, scores, candidates, strict=True):
        per_token = [s.log_likelihood / len(ids) for s, ids in zip(row, answers, strict=True)]
        place, fact = text.text.facts[0]
        outcomes.append(
            ProbeOutcome(
                distance=text.text.num_tokens - place - len(fact),
                is_right=int(np.argmax(per_token)) == text.answer,
                is_greedy=row[text.answer].is_greedy,
            )
        )
    return outcomes
