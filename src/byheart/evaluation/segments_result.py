"""Accuracy by number of segments: as values, as JSON, and as tables."""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from byheart.config import from_dict, to_dict
from byheart.evaluation.tables import Grid, format_number, markdown_table

__all__ = ["RunsResult", "SegmentsMeasurement", "SegmentsResult"]

# two-sided 95 % of the normal distribution
_QUANTILE = 1.959964


@dataclass(frozen=True, kw_only=True, slots=True)
class SegmentsMeasurement:
    """Documents of one length."""

    num_segments: int
    """Their length."""
    num_samples: int
    """How many."""
    num_right: int
    """Right answers."""
    num_tokens: int
    """Tokens of all of them."""
    seconds: float
    """Wall time, with the making of the documents."""
    peak_memory_bytes: int | None
    """Most memory used meanwhile, see `byheart.evaluation.peak_memory`."""

    @property
    def accuracy(self) -> float:
        """Share of right answers."""
        return self.num_right / self.num_samples

    @property
    def interval(self) -> tuple[float, float]:
        """Where the true accuracy lies with 95 % confidence.

        Source:
            Wilson 1927, Probable Inference, the Law of Succession, and Statistical Inference.
        """
        n, z = self.num_samples, _QUANTILE
        centre = (self.num_right + z**2 / 2) / (n + z**2)
        spread = z / (n + z**2) * math.sqrt(self.num_right * (n - self.num_right) / n + z**2 / 4)
        return max(0.0, centre - spread), min(1.0, centre + spread)

    @property
    def tokens_per_second(self) -> float:
        """Tokens read per second of wall time."""
        return self.num_tokens / self.seconds


@dataclass(frozen=True, kw_only=True, slots=True)
class SegmentsResult:
    """One model on documents of several lengths."""

    task: str
    """The task."""
    form: str
    """The form of its documents."""
    segment_length: int
    """Text tokens of a segment."""
    num_labels: int
    """Answers to choose from."""
    measurements: tuple[SegmentsMeasurement, ...]
    """One per length, in the order they were asked for."""
    precision: Literal["float32", "bfloat16"] | None = None
    """Of the matrix products; `None` if it was not written down, or not the same for all."""
    num_facts: int | None = None
    """Facts of a document, where the task leaves it open."""

    @classmethod
    def joined(cls, results: "Sequence[SegmentsResult]") -> "SegmentsResult":
        """Put results of one model on one task together.

        Args:
            results: One or more, in the order of their measurements.

        Returns:
            All measurements.
        """
        measurements = tuple(m for result in results for m in result.measurements)
        precisions = {result.precision for result in results}
        precision = precisions.pop() if len(precisions) == 1 else None
        return replace(results[0], measurements=measurements, precision=precision)

    def by_length(self) -> "dict[int, SegmentsResult]":
        """Take the result apart.

        Returns:
            A result for each number of segments.
        """
        return {m.num_segments: replace(self, measurements=(m,)) for m in self.measurements}

    def to_dict(self) -> dict[str, object]:
        """Give everything measured and derived, for JSON.

        Returns:
            Nested dictionaries.
        """
        derived = [
            {
                "accuracy": measurement.accuracy,
                "interval": list(measurement.interval),
                "tokens_per_second": measurement.tokens_per_second,
            }
            for measurement in self.measurements
        ]
        plain = to_dict(self)
        measured = plain["measurements"]
        assert isinstance(measured, list)
        return plain | {
            "measurements": [entry | more for entry, more in zip(measured, derived, strict=True)]
        }

    @classmethod
    def from_dict(cls, content: Mapping[str, object]) -> "SegmentsResult":
        """Read what `to_dict` gave.

        Returns:
            The result.
        """
        plain, measured = dict(content), content["measurements"]
        assert isinstance(measured, list)
        names = SegmentsMeasurement.__dataclass_fields__
        plain["measurements"] = [{name: entry[name] for name in names} for entry in measured]
        return from_dict(cls, plain)

    def to_markdown(self) -> str:
        """Lay the result out for a report.

        Returns:
            A Markdown table.
        """
        return markdown_table(self._grid())

    def _grid(self) -> Grid:
        header = (
            "segments", "tokens", "accuracy", "95%-interval", "tokens per second",
            "peak memory MiB",
        )  # fmt: skip
        rows = [
            (
                f"{m.num_segments:,}",
                f"{m.num_segments * self.segment_length:,}",
                f"{m.accuracy:.2%}",
                f"{m.interval[0]:.1%} to {m.interval[1]:.1%}",
                f"{m.tokens_per_second:,.0f}",
                _mebibytes(m.peak_memory_bytes),
            )
            for m in self.measurements
        ]
        return Grid(_title(self), header, rows)


@dataclass(frozen=True, kw_only=True, slots=True)
class RunsResult:
    """Several runs that differ in their seed alone, measured at the same lengths."""

    runs: tuple[SegmentsResult, ...]
    """One per run."""

    def __post_init__(self) -> None:
        lengths = {tuple(m.num_segments for m in run.measurements) for run in self.runs}
        tasks = {(run.task, run.form, run.segment_length, run.num_facts) for run in self.runs}
        if len(lengths) != 1 or len(tasks) != 1:
            msg = (
                "runs must be one or more results of the same task at the same lengths, got tasks "
                f"{sorted(tasks)} and lengths {sorted(lengths)}."
            )
            raise ValueError(msg)

    @property
    def segments(self) -> tuple[int, ...]:
        """The lengths."""
        return tuple(m.num_segments for m in self.runs[0].measurements)

    @property
    def mean(self) -> tuple[float, ...]:
        """Mean accuracy of the runs at each length."""
        return tuple(statistics.fmean(values) for values in self._accuracies())

    @property
    def deviation(self) -> tuple[float, ...] | None:
        """Standard deviation of the runs' accuracies at each length; `None` for a single run."""
        if len(self.runs) == 1:
            return None
        return tuple(statistics.stdev(values) for values in self._accuracies())

    def to_dict(self) -> dict[str, object]:
        """Give everything measured and derived, for JSON.

        Returns:
            Nested dictionaries.
        """
        deviation = self.deviation
        return {
            "segments": list(self.segments),
            "accuracy_mean": list(self.mean),
            "accuracy_deviation": None if deviation is None else list(deviation),
            "runs": [run.to_dict() for run in self.runs],
        }

    def to_markdown(self, reference: Mapping[int, float] | None = None) -> str:
        """Lay the runs out for a report.

        Args:
            reference: Published accuracy by number of segments, to stand beside.

        Returns:
            A Markdown table.
        """
        return markdown_table(self._grid(reference))

    def _accuracies(self) -> list[list[float]]:
        per_run = [[m.accuracy for m in run.measurements] for run in self.runs]
        return [list(values) for values in zip(*per_run, strict=True)]

    def _grid(self, reference: Mapping[int, float] | None) -> Grid:
        deviation = self.deviation or (None,) * len(self.segments)
        first = self.runs[0]
        header = [
            "segments", "tokens", "accuracy", "deviation", "lowest", "tokens per second",
            "peak memory MiB",
        ]  # fmt: skip
        rows = []
        for place, count in enumerate(self.segments):
            measured = [run.measurements[place] for run in self.runs]
            peaks = [m.peak_memory_bytes for m in measured if m.peak_memory_bytes is not None]
            rows.append(
                [
                    f"{count:,}",
                    f"{count * first.segment_length:,}",
                    f"{self.mean[place]:.2%}",
                    format_number(deviation[place], ".2%"),
                    f"{min(m.accuracy for m in measured):.2%}",
                    f"{statistics.fmean(m.tokens_per_second for m in measured):,.0f}",
                    _mebibytes(max(peaks, default=None)),
                ]
            )
        if reference is not None:
            header.append("report")
            for row, count in zip(rows, self.segments, strict=True):
                row.append(format_number(reference.get(count), ".2%"))
        runs = "1 run" if len(self.runs) == 1 else f"{len(self.runs)} runs"
        return Grid(f"{_title(first)}, {runs}", tuple(header), [tuple(row) for row in rows])


def _title(result: SegmentsResult) -> str:
    samples = result.measurements[0].num_samples if result.measurements else 0
    facts = "" if result.num_facts is None else f", {result.num_facts} facts"
    return (
        f"Accuracy of {result.task} ({result.form} form{facts}) by number of segments "
        f"({samples:,} documents each, chance {1 / result.num_labels:.1%})"
    )


def _mebibytes(num_bytes: int | None) -> str:
    return format_number(None if num_bytes is None else num_bytes / 2**20, ",.1f")
