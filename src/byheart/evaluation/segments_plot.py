"""Figure of accuracy by number of segments; needs `byheart[plots]`."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from byheart.evaluation.plots import figure_axes, line_style
from byheart.evaluation.segments_result import RunsResult

__all__ = ["plot_accuracy_by_segments"]


def plot_accuracy_by_segments(
    lines: Mapping[str, RunsResult],
    path: str | os.PathLike[str],
    *,
    references: Mapping[str, Mapping[int, float]] | None = None,
    scale: Literal["log", "linear"] = "log",
) -> Path:
    """Plot the accuracy against the number of segments, one line per entry.

    Several runs are drawn as their mean, with a band of one standard deviation to each side.

    Args:
        lines: Runs by the name of their line.
        path: The PNG file to write; its folder must exist.
        references: Published accuracy by number of segments, by the name of its line; dashed, in
            the colours of `lines` in the same order.
        scale: Of the lengths: powers of two, or as they are.

    Returns:
        The path of the file.

    Raises:
        ImportError: If matplotlib is missing.
        ValueError: If there is no line.
    """
    if not lines:
        msg = "lines must hold at least one entry, got none."
        raise ValueError(msg)
    with figure_axes(path) as axes:
        shown: set[int] = set()
        for index, (label, runs) in enumerate(lines.items()):
            style = line_style(index)
            mean = [100 * value for value in runs.mean]
            axes.plot(runs.segments, mean, label=label, **style)
            if runs.deviation is not None:
                spread = [100 * value for value in runs.deviation]
                low = [m - s for m, s in zip(mean, spread, strict=True)]
                high = [min(100.0, m + s) for m, s in zip(mean, spread, strict=True)]
                axes.fill_between(runs.segments, low, high, color=style["color"], alpha=0.2, lw=0)
            shown.update(runs.segments)
        for index, (label, published) in enumerate((references or {}).items()):
            counts = sorted(published)
            style = line_style(index, 1)
            axes.plot(counts, [100 * published[count] for count in counts], label=label, **style)
            shown.update(counts)
        chance = 100 / next(iter(lines.values())).runs[0].num_labels
        axes.axhline(chance, color="#808080", linestyle=":", linewidth=1.2, label="chance")
        ticks = sorted(shown)
        if scale == "log":
            axes.set_xscale("log", base=2)
        rotation = 45 if scale == "log" else 0
        axes.set_xticks(ticks, [f"{count:,}" for count in ticks], rotation=rotation)
        axes.minorticks_off()
        axes.set(
            xlabel="length of the document (segments)",
            ylabel="accuracy (%)",
            title="Accuracy by length",
            ylim=(0, 103),
        )
    return Path(path)
