"""Figures of results, written as PNG files; needs `byheart[plots]`."""

import json
import math
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from byheart.errors import DataError
from byheart.evaluation.result import Measurement, PerplexityResult, short_number

__all__ = ["plot_loss_by_position", "plot_perplexity", "plot_training_curves"]

# Okabe and Ito's colours, which stay distinct with every common colour vision, without the yellow
# that is hard to see on white. Markers tell the lines apart in print.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X")
_DASHES = ("-", "--", ":", "-.")
_MAX_MARKERS = 20
_SIZE_INCHES = (8.0, 4.2)
_STYLE = {
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlelocation": "left",
    "figure.dpi": 160,
    "font.size": 10,
    "grid.alpha": 0.3,
    "legend.frameon": False,
    "legend.handlelength": 3.0,
    "lines.linewidth": 1.8,
    "lines.markersize": 6,
}


def plot_perplexity(result: PerplexityResult, path: str | os.PathLike[str]) -> Path:
    """Plot perplexity against the memory size, one line with the XL cache and one without.

    Args:
        result: What `evaluate_perplexity` returned.
        path: The PNG file to write; its folder must exist.

    Returns:
        The path of the file.

    Raises:
        ImportError: If matplotlib is missing.
    """
    groups: dict[int, list[Measurement]] = {}
    for measurement in result.measurements:
        groups.setdefault(measurement.xl_cache_length, []).append(measurement)
    with figure_axes(path) as axes:
        for index, (length, group) in enumerate(groups.items()):
            ordered = sorted(group, key=lambda measurement: measurement.memory_size)
            sizes = [measurement.memory_size for measurement in ordered]
            perplexities = [_drawable(measurement.perplexity) for measurement in ordered]
            style = line_style(index)
            axes.plot(sizes, perplexities, label=_cache_name(length), **style)
            _annotate(axes, sizes, perplexities, style["color"])
        _memory_size_axis(axes, {measurement.memory_size for measurement in result.measurements})
        axes.margins(x=0.08, y=0.15)
        axes.set(
            xlabel="kNN memory size (entries per row and head)",
            ylabel="perplexity (per token)",
            title="Perplexity by memory size",
        )
    return Path(path)


def plot_loss_by_position(result: PerplexityResult, path: str | os.PathLike[str]) -> Path:
    """Plot the mean loss against the position in the document, one line per memory size.

    Buckets get wider by a factor of four, so that the axis is about logarithmic.

    Args:
        result: What `evaluate_perplexity` returned.
        path: The PNG file to write; its folder must exist.

    Returns:
        The path of the file.

    Raises:
        ImportError: If matplotlib is missing.
    """
    sizes = _distinct(measurement.memory_size for measurement in result.measurements)
    lengths = _distinct(measurement.xl_cache_length for measurement in result.measurements)
    buckets = result.measurements[0].buckets
    used = [index for index, bucket in enumerate(buckets) if bucket.num_tokens]
    with figure_axes(path) as axes:
        for measurement in result.measurements:
            # colour says the memory size, dashes the XL cache
            style = line_style(
                sizes.index(measurement.memory_size), lengths.index(measurement.xl_cache_length)
            )
            label = _memory_name(measurement.memory_size)
            if len(lengths) > 1:
                label += f", {_cache_name(measurement.xl_cache_length)}"
            losses = [_drawable(measurement.buckets[index].nats_per_token) for index in used]
            axes.plot(used, losses, label=label, **style)
        axes.set_xticks(
            used, [f"{buckets[index].label}\nn = {buckets[index].num_tokens:,}" for index in used]
        )
        axes.margins(x=0.08, y=0.1)
        axes.set(
            xlabel="position in the document (tokens; n = tokens predicted)",
            ylabel="loss (nats per token)",
            title="Loss by position in the document",
        )
    return Path(path)


def plot_training_curves(
    logs: Sequence[str | os.PathLike[str]],
    labels: Sequence[str],
    path: str | os.PathLike[str],
    *,
    metric: str = "loss",
    unit: str = "nats per token",
) -> Path:
    """Plot a logged metric of several runs against the step.

    Lines of a log without the metric, and a last line cut short by a killed run, are passed over.

    Args:
        logs: JSON lines files, one object with `step` and metrics a line.
        labels: Name of each run in the legend.
        path: The PNG file to write; its folder must exist.
        metric: Key of the metric.
        unit: Unit of the metric; empty for none.

    Returns:
        The path of the file.

    Raises:
        ImportError: If matplotlib is missing.
        ValueError: If there is not one label per log, or no log at all.
        DataError: If a log holds no value of the metric, or a line that is no JSON object.
    """
    if not logs or len(logs) != len(labels):
        msg = f"There must be one label per log, got {len(logs)} logs and {len(labels)} labels."
        raise ValueError(msg)
    curves = [_read_curve(Path(log), metric) for log in logs]
    with figure_axes(path) as axes:
        for index, (label, (steps, values)) in enumerate(zip(labels, curves, strict=True)):
            style = line_style(index, index // len(_COLOURS))
            # hundreds of markers would hide the line
            marker = style["marker"] if len(steps) <= _MAX_MARKERS else None
            axes.plot(steps, values, label=label, **{**style, "marker": marker})
        axes.set(
            xlabel="optimizer step",
            ylabel=f"{metric} ({unit})" if unit else metric,
            title=f"Training: {metric}",
        )
    return Path(path)


@contextmanager
def figure_axes(path: str | os.PathLike[str]) -> Iterator[Any]:
    """Give axes to draw on, then add the legend and write the figure.

    Drawn without pyplot: no window is opened and no global setting changed.

    Args:
        path: Where the figure goes.

    Yields:
        Matplotlib axes.

    Raises:
        ImportError: If matplotlib is missing.
    """
    try:
        import matplotlib as mpl
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as err:
        msg = "Plots need the matplotlib package: pip install 'byheart[plots]'."
        raise ImportError(msg) from err
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=_SIZE_INCHES, layout="constrained")
        canvas = FigureCanvasAgg(figure)
        axes = figure.add_subplot()
        yield axes
        if len(axes.lines) > 1:
            figure.legend(loc="outside right upper")
        canvas.print_figure(path, format="png")


def line_style(index: int, dashes: int = 0) -> dict[str, str]:
    """Return how to draw line number `index`; lines that belong together differ in `dashes`."""
    return {
        "color": _COLOURS[index % len(_COLOURS)],
        "marker": _MARKERS[index % len(_MARKERS)],
        "linestyle": _DASHES[dashes % len(_DASHES)],
    }


def _distinct(values: Iterable[int]) -> list[int]:
    return list(dict.fromkeys(values))


def _annotate(axes: Any, sizes: list[int], perplexities: list[float], colour: str) -> None:
    for size, perplexity in zip(sizes, perplexities, strict=True):
        axes.annotate(
            f"{perplexity:.4g}",
            (size, perplexity),
            textcoords="offset points",
            xytext=(0, 7),
            ha="center",
            color=colour,
            fontsize=8,
        )


def _memory_size_axis(axes: Any, sizes: set[int]) -> None:
    ordered = sorted(sizes)
    positive = [size for size in ordered if size]
    if positive:
        # logarithmic, and linear below the smallest memory so that 0 has a place
        axes.set_xscale("symlog", base=2, linthresh=positive[0] / 2, linscale=0.5)
    axes.set_xticks(ordered, ["none" if not size else short_number(size) for size in ordered])
    axes.minorticks_off()


def _memory_name(size: int) -> str:
    return f"memory {short_number(size)}" if size else "no memory"


def _cache_name(length: int) -> str:
    return f"XL cache {short_number(length)}" if length else "no XL cache"


def _drawable(value: float) -> float:
    # matplotlib leaves a gap for NaN, but cannot place infinity
    return value if math.isfinite(value) else math.nan


def _read_curve(log: Path, metric: str) -> tuple[list[float], list[float]]:
    steps: list[float] = []
    values: list[float] = []
    known: set[str] = set()
    lines = log.read_text(encoding="utf-8").splitlines()
    for number, line in enumerate(lines, start=1):
        record = _parse(line, log, number, is_last=number == len(lines))
        known.update(record)
        value = record.get(metric)
        if "step" in record and isinstance(value, (int, float)):
            steps.append(float(record["step"]))
            values.append(_drawable(float(value)))
    if not steps:
        names = ", ".join(sorted(known - {"step"})) or "nothing"
        msg = f"{log} must hold values of {metric!r} with a step, it has {names}. Check metric."
        raise DataError(msg)
    return steps, values


def _parse(line: str, log: Path, number: int, *, is_last: bool) -> dict[str, Any]:
    if not line.strip():
        return {}
    try:
        record = json.loads(line)
    except ValueError as err:
        if is_last:
            return {}
        msg = f"{log}:{number} must be a JSON object: {err}. Correct or remove the line."
        raise DataError(msg) from err
    if not isinstance(record, dict):
        msg = f"{log}:{number} must be a JSON object, got {type(record).__name__}. Remove the line."
        raise DataError(msg)
    return record
