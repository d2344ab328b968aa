"""What an evaluation found: as values, as JSON, and as tables for a report or a terminal."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from rich.console import Group

from byheart.evaluation.tables import Grid, format_number, markdown_table, rich_table

POSITION_EDGES = (0, 512, 2048, 8192, 32_768)
"""First positions of the buckets that losses are grouped in; the last bucket has no end."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PositionBucket:
    """Predictions at similar depths of their documents.

    The position of a prediction is the index of its input token: at position p the model has read
    p + 1 tokens of the document, a start token included.
    """

    start: int
    """First position."""
    end: int | None
    """Position behind the last one; `None` for the bucket without an end."""
    num_tokens: int
    """Tokens predicted."""
    nats: float
    """Their summed negative log likelihood."""

    @property
    def nats_per_token(self) -> float:
        """Mean negative log likelihood; NaN if the bucket is empty."""
        return _ratio(self.nats, self.num_tokens)

    @property
    def label(self) -> str:
        """The range, as in `512-2K`."""
        start = short_number(self.start)
        return f"{start}+" if self.end is None else f"{start}-{short_number(self.end)}"


@dataclass(frozen=True, kw_only=True, slots=True)
class DocumentLoss:
    """How well one document was predicted."""

    document_id: str
    """The document's id in the corpus."""
    num_tokens: int
    """Tokens predicted."""
    nats: float
    """Their summed negative log likelihood."""
    num_bytes: int | None
    """UTF-8 bytes of the text predicted; `None` if unknown."""

    @property
    def nats_per_token(self) -> float:
        """Mean negative log likelihood; NaN if nothing was predicted."""
        return _ratio(self.nats, self.num_tokens)

    @property
    def bits_per_byte(self) -> float | None:
        """Bits needed per byte of text, which compares across tokenizers; `None` if unknown."""
        return _bits_per_byte(self.nats, self.num_bytes)


@dataclass(frozen=True, kw_only=True, slots=True)
class Measurement:
    """The documents, read once with one memory size."""

    memory_size: int
    """Entries per row and head of the kNN memory; 0 for none."""
    xl_cache_length: int
    """Previous tokens in the XL cache; 0 for none."""
    documents: tuple[DocumentLoss, ...]
    """Losses per document, in the corpus's order."""
    buckets: tuple[PositionBucket, ...]
    """Losses by position in the document."""
    seconds: float
    """Wall time of the reading."""
    peak_state_bytes: int
    """Keys and values that the memory state held between two segments at most: XL caches,
    unfinished segments and kNN memory of all rows. What an approximate index adds is not counted.
    """

    @property
    def num_tokens(self) -> int:
        """Tokens predicted."""
        return sum(document.num_tokens for document in self.documents)

    @property
    def nats(self) -> float:
        """Summed negative log likelihood."""
        return math.fsum(document.nats for document in self.documents)

    @property
    def nats_per_token(self) -> float:
        """Mean negative log likelihood over all tokens of all documents."""
        return _ratio(self.nats, self.num_tokens)

    @property
    def perplexity(self) -> float:
        """Exponential of `nats_per_token`; infinity where a float cannot hold it."""
        try:
            return math.exp(self.nats_per_token)
        except OverflowError:
            return math.inf

    @property
    def num_bytes(self) -> int | None:
        """UTF-8 bytes of the text predicted; `None` if unknown for any document."""
        known = [doc.num_bytes for doc in self.documents if doc.num_bytes is not None]
        return sum(known) if len(known) == len(self.documents) else None

    @property
    def bits_per_byte(self) -> float | None:
        """Bits needed per byte of text, which compares across tokenizers; `None` if unknown."""
        return _bits_per_byte(self.nats, self.num_bytes)

    @property
    def tokens_per_second(self) -> float:
        """Tokens predicted per second of wall time."""
        return _ratio(self.num_tokens, self.seconds)


@dataclass(frozen=True, kw_only=True, slots=True)
class PerplexityResult:
    """All measurements of one evaluation, in the order they were asked for."""

    measurements: tuple[Measurement, ...]
    """One per memory size and XL cache setting."""
    segment_length: int
    """Tokens per segment."""
    corpus_fingerprint: str
    """Identifies the documents and their tokens."""

    def to_dict(self) -> dict[str, object]:
        """Give everything measured and derived, for JSON.

        Returns:
            Nested dictionaries. What is unknown, empty or not a finite number is `None`.
        """
        changes = compare(self.measurements)
        return {
            "segment_length": self.segment_length,
            "corpus_fingerprint": self.corpus_fingerprint,
            "measurements": [
                _measurement_dict(measurement, change)
                for measurement, change in zip(self.measurements, changes, strict=True)
            ],
        }

    def to_markdown(self) -> str:
        """Lay the result out for a report.

        Returns:
            Two Markdown tables: the summary, and the loss by position in the document.
        """
        return "\n".join(markdown_table(grid) for grid in self._grids())

    def to_rich(self) -> Group:
        """Lay the result out for a terminal.

        Returns:
            The same two tables, for `rich.print`.
        """
        return Group(*(rich_table(grid) for grid in self._grids()))

    def _grids(self) -> tuple[Grid, Grid]:
        return _summary(self.measurements), _by_position(self.measurements)


@dataclass(frozen=True, kw_only=True, slots=True)
class Comparison:
    """A measurement against its baseline."""

    baseline: Measurement
    """The first measurement with the same XL cache."""
    perplexity_change: float | None
    """Relative change of the perplexity: -0.1 is 10 % lower. `None` if it is not defined."""


def compare(measurements: Sequence[Measurement]) -> tuple[Comparison, ...]:
    """Compare each measurement with the first of the same XL cache length.

    Args:
        measurements: Those of one result, or of several models in a row.

    Returns:
        One comparison per measurement; a baseline's own change is 0.
    """
    baselines: dict[int, Measurement] = {}
    comparisons = []
    for measurement in measurements:
        baseline = baselines.setdefault(measurement.xl_cache_length, measurement)
        # of the losses, not of the perplexities, which may be too large for a float
        difference = measurement.nats_per_token - baseline.nats_per_token
        try:
            change = _finite(math.expm1(difference))
        except OverflowError:
            change = None
        comparisons.append(Comparison(baseline=baseline, perplexity_change=change))
    return tuple(comparisons)


def short_number(count: int) -> str:
    """Write a count with a binary prefix where that loses nothing.

    Returns:
        `512`, `8K` for 8192, `1.5K` for 1536, `1M` for 1048576, `10,000` for itself.
    """
    for unit, name in ((1 << 30, "G"), (1 << 20, "M"), (1 << 10, "K")):
        if count >= unit and count % (unit // 2) == 0:
            return f"{count / unit:.1f}".removesuffix(".0") + name
    return f"{count:,}"


def _summary(measurements: Sequence[Measurement]) -> Grid:
    header = (
        "memory", "XL cache", "perplexity", "change", "nats per token", "bits per byte",
        "tokens per second", "state MiB",
    )  # fmt: skip
    rows = [
        (
            *_names(measurement),
            format_number(measurement.perplexity, ".4g"),
            format_number(change.perplexity_change, "+.1%"),
            format_number(measurement.nats_per_token, ".4f"),
            format_number(measurement.bits_per_byte, ".4f"),
            format_number(measurement.tokens_per_second, ",.0f"),
            format_number(measurement.peak_state_bytes / 2**20, ",.1f"),
        )
        for measurement, change in zip(measurements, compare(measurements), strict=True)
    ]
    num_tokens = measurements[0].num_tokens if measurements else 0
    return Grid(f"Perplexity by memory size ({num_tokens:,} tokens)", header, rows)


def _by_position(measurements: Sequence[Measurement]) -> Grid:
    buckets = measurements[0].buckets if measurements else ()
    rows: list[tuple[str, ...]] = [
        (
            *_names(measurement),
            *(
                format_number(bucket.nats_per_token if bucket.num_tokens else None, ".4f")
                for bucket in measurement.buckets
            ),
        )
        for measurement in measurements
    ]
    rows.append(("tokens", "", *(f"{bucket.num_tokens:,}" for bucket in buckets)))
    header = ("memory", "XL cache", *(bucket.label for bucket in buckets))
    return Grid("Loss by position in the document (nats per token)", header, rows)


def _names(measurement: Measurement) -> tuple[str, str]:
    sizes = (measurement.memory_size, measurement.xl_cache_length)
    memory, cache = (short_number(size) if size else "none" for size in sizes)
    return memory, cache


def _measurement_dict(measurement: Measurement, change: Comparison) -> dict[str, object]:
    return {
        "memory_size": measurement.memory_size,
        "xl_cache_length": measurement.xl_cache_length,
        "num_documents": len(measurement.documents),
        "num_tokens": measurement.num_tokens,
        "num_bytes": measurement.num_bytes,
        "nats_per_token": _finite(measurement.nats_per_token),
        "perplexity": _finite(measurement.perplexity),
        "perplexity_change": change.perplexity_change,
        "bits_per_byte": _finite(measurement.bits_per_byte),
        "seconds": measurement.seconds,
        "tokens_per_second": _finite(measurement.tokens_per_second),
        "peak_state_bytes": measurement.peak_state_bytes,
        "buckets": [
            {
                "start": bucket.start,
                "end": bucket.end,
                "num_tokens": bucket.num_tokens,
                "nats_per_token": _finite(bucket.nats_per_token),
            }
            for bucket in measurement.buckets
        ],
        "documents": [
            {
                "document_id": document.document_id,
                "num_tokens": document.num_tokens,
                "num_bytes": document.num_bytes,
                "nats_per_token": _finite(document.nats_per_token),
                "bits_per_byte": _finite(document.bits_per_byte),
            }
            for document in measurement.documents
        ],
    }


def _bits_per_byte(nats: float, num_bytes: int | None) -> float | None:
    return nats / math.log(2) / num_bytes if num_bytes else None


def _ratio(total: int | float, count: int | float) -> float:
    return total / count if count else math.nan


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None
