"""Accuracy by the segments that a model was trained on and those it is evaluated on."""

from collections.abc import Mapping
from dataclasses import dataclass

from byheart.evaluation.segments_result import RunsResult
from byheart.evaluation.tables import Grid, format_number, markdown_table

__all__ = ["GeneralizationResult"]


@dataclass(frozen=True, kw_only=True, slots=True)
class GeneralizationResult:
    """Models of the stages of a curriculum, all measured at the same lengths."""

    stages: Mapping[int, RunsResult]
    """Segments trained on, and the runs that have reached that stage."""

    def __post_init__(self) -> None:
        kinds = {
            (runs.segments, runs.runs[0].task, runs.runs[0].form) for runs in self.stages.values()
        }
        if len(kinds) != 1:
            msg = (
                "stages must be one or more of the same task, measured at the same lengths, got "
                f"{sorted(kinds)}."
            )
            raise ValueError(msg)

    @property
    def segments(self) -> tuple[int, ...]:
        """The lengths."""
        return next(iter(self.stages.values())).segments

    def to_dict(self) -> dict[str, object]:
        """Give everything measured and derived, for JSON.

        Returns:
            Nested dictionaries.
        """
        return {
            "segments": list(self.segments),
            "stages": [
                {"trained_on": trained_on, **runs.to_dict()}
                for trained_on, runs in self.stages.items()
            ],
        }

    def to_markdown(self, reference: Mapping[int, Mapping[int, float]] | None = None) -> str:
        """Lay the matrix out for a report, in percent.

        Args:
            reference: Published accuracy by segments trained on and evaluated on, to stand below
                the row of the same stage.

        Returns:
            A Markdown table: a row per stage, a column per length.
        """
        rows = []
        for trained_on, runs in self.stages.items():
            label = f"{len(runs.runs)} run{'s' if len(runs.runs) > 1 else ''}"
            rows.append((f"{trained_on}", label, *_cells(runs)))
            published = (reference or {}).get(trained_on)
            if published is not None:
                cells = (published.get(count) for count in self.segments)
                rows.append(("", "report", *(format_number(_percent(c), ".1f") for c in cells)))
        header = ("trained on", "accuracy (%) of", *(f"{count:,}" for count in self.segments))
        return markdown_table(Grid(self._title(), header, rows))

    def _title(self) -> str:
        first = next(iter(self.stages.values())).runs[0]
        several = any(len(runs.runs) > 1 for runs in self.stages.values())
        return (
            f"Accuracy of {first.task} ({first.form} form) by number of segments trained on (rows) "
            f"and evaluated on (columns), {first.measurements[0].num_samples:,} documents each, "
            f"chance {1 / first.num_labels:.1%}"
            f"{'; mean ± standard deviation' if several else ''}"
        )


def _cells(runs: RunsResult) -> list[str]:
    deviation = runs.deviation
    if deviation is None:
        return [f"{100 * mean:.1f}" for mean in runs.mean]
    return [
        f"{100 * mean:.1f} ±{100 * spread:.1f}"
        for mean, spread in zip(runs.mean, deviation, strict=True)
    ]


def _percent(share: float | None) -> float | None:
    return None if share is None else 100 * share
