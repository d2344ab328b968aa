"""`byheart reproduce` of the tasks: accuracy by length, and attention of memory."""

import json
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from byheart.cli.common import find_device, prepare_output
from byheart.cli.measured import measure_once
from byheart.cli.reproduce_output import (
    JsonOption,
    PlotOption,
    TasksOutOption,
    show_output,
    write_output,
)
from byheart.cli.reproduce_runs import (
    Name,
    QuickOption,
    SamplesOption,
    SeedsOption,
    SetOption,
    learn_seeds,
    make_run,
    num_samples,
    unreached,
)
from byheart.cli.task import DEFAULT_SEGMENTS, measure_run, parse_segments
from byheart.config import write_text_atomic
from byheart.training.task_config import TaskRunConfig

if TYPE_CHECKING:
    from byheart.data.tasks import TaskSample
    from byheart.evaluation.segments_result import SegmentsResult
    from byheart.training.task_files import TrainedTask

_LENGTHS = (2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)
PUBLISHED_ACCURACY: Mapping[Name, Mapping[int, float]] = {
    "memorize": dict(zip(_LENGTHS, (
        1.0, 1.0, 1.0, 0.9998, 0.9923, 0.9823, 0.9650, 0.9521, 0.9319, 0.9269, 0.9041, 0.9056,
    ), strict=True)),
    "detect": dict(zip(_LENGTHS, (
        1.0, 1.0, 1.0, 0.9990, 0.9981, 0.9971, 0.9885, 0.9847, 0.9856, 0.9708, 0.9708, 0.9607,
    ), strict=True)),
    "reason": dict(zip(_LENGTHS, (
        1.0, 0.9990, 0.9735, 0.9318, 0.9155, 0.8932, 0.8735, 0.8757, 0.8483, 0.8352, 0.8345, 0.8190,
    ), strict=True)),
}  # fmt: skip
"""Accuracy by number of segments of 499 tokens, of a pretrained BERT.

Source:
    Bulatov et al. 2023, Scaling Transformer to 1M tokens and beyond with RMT (arXiv:2304.11062v1),
    Figure 1: coordinates of the vector graphics.
"""

_QUICK_SEGMENTS = "1,2,4,8,16,32,64"
# as in the report's figure
_ATTENTION_SEGMENTS = 4
_MOST_DOCUMENTS = 50

SegmentsOption = Annotated[
    str | None, typer.Option(help="Lengths to measure; default: 1 to 4,096, quick: 1 to 64.")
]


def task_command(name: Name, summary: str) -> Callable[..., None]:
    """Make the command of a task.

    Args:
        name: The task.
        summary: Its help text.

    Returns:
        A function with the options of the command.
    """

    def command(
        *,
        out: TasksOutOption = None,
        quick: QuickOption = False,
        seeds: SeedsOption = None,
        segments: SegmentsOption = None,
        samples: SamplesOption = None,
        overrides: SetOption = None,
        plot: PlotOption = True,
        as_json: JsonOption = False,
    ) -> None:
        plan = _plan(name, quick, seeds, segments, samples, overrides)
        default = Path("reproduce", f"{name}-quick" if quick else name)
        _reproduce(plan, out or default, plot=plot, as_json=as_json)

    command.__doc__ = summary
    return command


@dataclass(frozen=True, kw_only=True, slots=True)
class _Plan:
    name: Name
    run: TaskRunConfig
    quick: bool
    seeds: int | None
    segments: tuple[int, ...]
    samples: int


def _plan(
    name: Name,
    quick: bool,
    seeds: int | None,
    segments: str | None,
    samples: int | None,
    overrides: list[str] | None,
) -> _Plan:
    return _Plan(
        name=name,
        run=make_run(name, quick=quick, overrides=overrides),
        quick=quick,
        seeds=seeds,
        segments=parse_segments(segments or (_QUICK_SEGMENTS if quick else DEFAULT_SEGMENTS)),
        samples=num_samples(samples, quick=quick),
    )


def _reproduce(plan: _Plan, out: Path, *, plot: bool, as_json: bool) -> None:
    """Train and measure one run per seed; what is done already is not done again."""
    from byheart.evaluation.segments_plot import plot_accuracy_by_segments
    from byheart.evaluation.segments_result import RunsResult

    prepare_output(out)
    published = PUBLISHED_ACCURACY[plan.name]
    outcomes, measured = [], []
    for outcome in learn_seeds(plan.run, out, plan.seeds, quick=plan.quick):
        outcomes.append(outcome)
        measured.append(_measure(plan, outcome.directory))
    runs = RunsResult(runs=tuple(measured))
    table = runs.to_markdown(published) + unreached(outcomes)
    result = {
        "figure": "Bulatov et al. 2023 (arXiv:2304.11062v1), Figure 1",
        "report": {str(count): accuracy for count, accuracy in published.items()},
        "outcomes": [outcome.summary for outcome in outcomes],
        **runs.to_dict(),
    }
    draw = None
    if plot:

        def draw(path: Path) -> Path:
            name = plan.name
            references = {f"{name}, report's BERT": published}
            return plot_accuracy_by_segments({name: runs}, path, references=references)

    files = write_output(out, plan.name, result, table, draw)
    files += _write_attention(out / "seed-0", out, plot=plot)
    show_output(result, table, files, as_json=as_json)
    if unreached(outcomes):
        raise typer.Exit(1)


def _write_attention(run: Path, out: Path, *, plot: bool) -> list[Path]:
    """Look at how memory is written, kept and read in one document (RMT report, Figure 6).

    Returns:
        The files written; none for a model without memory.
    """
    from byheart.evaluation.memory_attention import (
        memory_attention,
        plot_memory_attention,
        plot_memory_gates,
    )
    from byheart.training.task_files import load_task_run

    trained = load_task_run(run)
    if not trained.run.memory.num_memory_tokens:
        return []
    attention = memory_attention(trained.memory_model, _kept_document(trained))
    files = [out / "attention.json"]
    write_text_atomic(files[0], json.dumps(attention.to_dict()) + "\n")
    if not plot:
        return files
    with suppress(ImportError):  # said already
        for name, head in attention.telling_heads().items():
            path = out / f"attention-{name}.png"
            files.append(plot_memory_attention(attention, head, path, title=name))
        if attention.gates is not None:
            files.append(plot_memory_gates(attention, out / "attention-gates.png", title="gates"))
    return files


def _kept_document(trained: "TrainedTask") -> "TaskSample":
    """Find a document whose facts all stand before the last segment: memory alone has them there.

    Returns:
        The first; without one, document 0.
    """
    for index in range(_MOST_DOCUMENTS):
        sample = trained.task.sample(index, _ATTENTION_SEGMENTS)
        last_segment = sample.num_tokens - trained.run.segment_length
        if all(position + len(fact) <= last_segment for position, fact in sample.facts):
            return sample
    return trained.task.sample(0, _ATTENTION_SEGMENTS)


def _measure(plan: _Plan, directory: Path) -> "SegmentsResult":
    trained = json.loads((directory / "result.json").read_text(encoding="utf-8"))
    settings = {"model_fingerprint": trained["model_fingerprint"], "samples": plan.samples}

    def measure(length: int) -> "SegmentsResult":
        return measure_run(
            directory,
            (length,),
            samples=plan.samples,
            rows=plan.run.evaluation.rows,
            device=str(find_device(None)),
        )

    return measure_once(directory / "segments.json", settings, plan.segments, measure)
