"""Figure of FLOPs against the length of the document; needs `byheart[plots]`."""

import os
from collections.abc import Sequence
from pathlib import Path

from byheart.evaluation.flops_compare import FlopsComparison
from byheart.evaluation.plots import figure_axes, line_style

__all__ = ["plot_flops_growth"]


def plot_flops_growth(
    curves: Sequence[Sequence[FlopsComparison]], path: str | os.PathLike[str]
) -> Path:
    """Plot how FLOPs grow with the number of segments, in units of a document of one segment.

    There is one line per model for full attention, and one for the recurrent memory of the first
    model; where memory tokens cost nothing, that line is the same for all models. The legend gives
    the ratio of the two at the longest document.

    Args:
        curves: One per model: documents of growing length, the first of one segment.
        path: The PNG file to write; its folder must exist.

    Returns:
        The path of the file.

    Raises:
        ImportError: If matplotlib is missing.
        ValueError: If there is no curve, or one does not begin with a document of one segment.
    """
    if not curves or any(not curve or curve[0].num_segments != 1 for curve in curves):
        msg = "curves must hold one or more models, each beginning with a document of one segment."
        raise ValueError(msg)
    with figure_axes(path) as axes:
        for index, curve in enumerate(curves):
            unit = curve[0].full_attention.total
            segments = [point.num_segments for point in curve]
            growth = [point.full_attention.total / unit for point in curve]
            label = f"{curve[-1].shape.name} (ratio {curve[-1].ratio:.1f})"
            axes.plot(segments, growth, label=label, **line_style(index))
        unit = curves[0][0].full_attention.total
        axes.plot(
            [point.num_segments for point in curves[0]],
            [point.recurrent.total / unit for point in curves[0]],
            label="recurrent memory",
            **{**line_style(len(curves), 1), "color": "#000000"},
        )
        segments = [point.num_segments for point in curves[0]]
        axes.set_xscale("log", base=2)
        axes.set_xticks(segments[::2], [f"{count:,}" for count in segments[::2]])
        axes.set_yscale("log")
        axes.set(
            xlabel="length of the document (segments)",
            ylabel="FLOPs (1 = one segment)",
            title="Full attention and recurrent memory",
        )
    return Path(path)
