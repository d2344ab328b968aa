"""`byheart reproduce flops`."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, NamedTuple

import typer

from byheart.cli.common import prepare_output
from byheart.cli.flops import REPORT_MEMORY_TOKENS, REPORT_MODELS
from byheart.cli.reproduce_output import (
    JsonOption,
    OutOption,
    PlotOption,
    show_output,
    write_output,
)
from byheart.errors import DataError
from byheart.evaluation.flops import HONEST
from byheart.evaluation.flops_compare import FlopsComparison, compare_flops
from byheart.evaluation.flops_plot import plot_flops_growth
from byheart.evaluation.flops_shapes import NAMED_SHAPES

_SEGMENT_LENGTH = 512
_SEGMENTS = (1, 2, 4, 8, 16, 32, 64, 125, 250, 500, 1000, 2000, 4000)
_RATIOS_KEY = "fig3_ratio_to_rmt_at_4000_segments"
# the vector graphics give coordinates to about five digits
_TOLERANCE = 1e-4

PUBLISHED_RATIOS = {
    "opt-125m": 295.0658,
    "opt-1.3b": 154.4158,
    "opt-6.7b": 81.6490,
    "opt-30b": 48.3848,
    "opt-175b": 29.0154,
}
"""FLOPs of full attention over those of RMT at 4,000 segments of 512 tokens.

Source:
    Bulatov et al. 2023, Scaling Transformer to 1M tokens and beyond with RMT (arXiv:2304.11062v1),
    Figure 3: coordinates of the vector graphics. The text names 295 and 29.
"""


def flops(
    *,
    out: OutOption = Path("reproduce/flops"),
    paper: Annotated[
        Path | None,
        typer.Option(help=f"JSON with the paper's ratios under {_RATIOS_KEY}; default: built in."),
    ] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="As the other figures have it; this is quick anyway.")
    ] = False,
    plot: PlotOption = True,
    as_json: JsonOption = False,
) -> None:
    """FLOPs of full attention and RMT by length (RMT report, Figure 3)."""
    del quick
    prepare_output(out)
    published = PUBLISHED_RATIOS if paper is None else _read_ratios(paper)
    curves = [_curve(name) for name in REPORT_MODELS]
    rows = [_row(curve[-1], published[curve[-1].shape.name]) for curve in curves]
    result = {
        "figure": "Bulatov et al. 2023 (arXiv:2304.11062v1), Figure 3",
        "paper": "built in" if paper is None else str(paper),
        "segment_length": _SEGMENT_LENGTH,
        "agrees": all(row.agrees for row in rows),
        "tolerance": _TOLERANCE,
        "models": [
            {**row._asdict(), "agrees": row.agrees, "curve": [point.to_dict() for point in curve]}
            for row, curve in zip(rows, curves, strict=True)
        ],
    }
    table = _markdown(rows)
    draw = (lambda path: plot_flops_growth(curves, path)) if plot else None
    files = write_output(out, "flops", result, table, draw)
    show_output(result, table, files, as_json=as_json)
    if not result["agrees"]:
        wrong = ", ".join(row.model for row in rows if not row.agrees)
        msg = f"Ratios must be within {_TOLERANCE:.0e} of the paper's, but not those of {wrong}. "
        msg += f"See {files[1]}."
        raise ValueError(msg)


class _Row(NamedTuple):
    model: str
    ratio: float
    paper_ratio: float
    honest_ratio: float

    @property
    def agrees(self) -> bool:
        return abs(self.ratio / self.paper_ratio - 1) <= _TOLERANCE


def _curve(name: str) -> list[FlopsComparison]:
    shape = NAMED_SHAPES[name]
    return [
        compare_flops(shape, count * _SEGMENT_LENGTH, segment_length=_SEGMENT_LENGTH)
        for count in _SEGMENTS
    ]


def _row(longest: FlopsComparison, published: float) -> _Row:
    honest = compare_flops(
        longest.shape,
        longest.num_tokens,
        segment_length=_SEGMENT_LENGTH,
        num_memory_tokens=REPORT_MEMORY_TOKENS,
        convention=HONEST,
    )
    return _Row(
        model=longest.shape.name,
        ratio=longest.ratio,
        paper_ratio=published,
        honest_ratio=honest.ratio,
    )


def _read_ratios(path: Path) -> dict[str, float]:
    try:
        ratios = json.loads(path.read_text(encoding="utf-8"))[_RATIOS_KEY]
        found = {str(name).lower(): float(ratio) for name, ratio in ratios.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        msg = f"{path} must be a JSON object with ratios by model under {_RATIOS_KEY}: {error!r}."
        raise DataError(msg) from error
    missing = [name for name in REPORT_MODELS if not 0 < found.get(name, 0) < math.inf]
    if missing:
        msg = f"{path} must give a ratio for each model of the figure, it has none for "
        msg += f"{', '.join(missing)}. Add them under {_RATIOS_KEY}."
        raise DataError(msg)
    return found


def _markdown(rows: Sequence[_Row]) -> str:
    tokens = _SEGMENTS[-1] * _SEGMENT_LENGTH
    lines = [
        f"**FLOPs of full attention over FLOPs of RMT, {tokens:,} tokens, segments of "
        f"{_SEGMENT_LENGTH}**",
        "",
        f"| model | ratio | paper | difference | honest, {REPORT_MEMORY_TOKENS} memory tokens |",
        "| --- | ---: | ---: | ---: | ---: |",
        *(
            f"| {row.model} | {row.ratio:.3f} | {row.paper_ratio:.3f} | "
            f"{row.ratio / row.paper_ratio - 1:+.1e} | {row.honest_ratio:.3f} |"
            for row in rows
        ),
        "",
    ]
    return "\n".join(lines)
