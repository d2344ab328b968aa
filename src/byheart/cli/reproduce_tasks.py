"""`byheart reproduce` of the tasks: accuracy by length, and attention of memory."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from byheart.cli.common import err_console, find_device
from byheart.cli.reproduce_output import (
    JsonOption,
    OutOption,
    PlotOption,
    show_output,
    write_output,
)
from byheart.cli.task import DEFAULT_SEGMENTS, evaluation_progress, measure_run, parse_segments
from byheart.config import apply_overrides, write_text_atomic
from byheart.errors import CheckpointError
from byheart.recipes import TASK_RECIPES
from byheart.training.task_config import TaskRunConfig

if TYPE_CHECKING:
    from byheart.evaluation.segments_result import SegmentsResult

Name = Literal["memorize", "detect", "reason"]

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

# a few minutes on 2 CPU cores
_QUICK = (
    "curriculum.max_segments=4",
    "curriculum.continue_steps=200",
    "evaluation.segments=[1, 2, 4]",
    "evaluation.samples=200",
)
_QUICK_SEGMENTS, _QUICK_SAMPLES = "1,2,4,8,16,32,64", 200
_FULL_SEEDS, _FULL_SAMPLES = 3, 400
# as in the report's figure
_ATTENTION_SEGMENTS = 4

QuickOption = Annotated[bool, typer.Option("--quick", help="One seed, 4 segments: minutes.")]
SeedsOption = Annotated[
    int | None, typer.Option(min=1, help="Runs that differ in their seed; default: 3, quick: 1.")
]
SegmentsOption = Annotated[
    str | None, typer.Option(help="Lengths to measure; default: 1 to 4,096, quick: 1 to 64.")
]
SamplesOption = Annotated[
    int | None, typer.Option(min=1, help="Documents of each length; default: 400, quick: 200.")
]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", help="Change a field of the recipe: --set window=128. Repeatable."),
]


def memorize(
    *,
    out: OutOption = Path("reproduce/memorize"),
    quick: QuickOption = False,
    seeds: SeedsOption = None,
    segments: SegmentsOption = None,
    samples: SamplesOption = None,
    overrides: SetOption = None,
    plot: PlotOption = True,
    as_json: JsonOption = False,
) -> None:
    """Accuracy of keeping a fact, by length (RMT report, Figures 1 and 6)."""
    plan = _plan("memorize", quick, seeds, segments, samples, overrides)
    _reproduce(plan, out, plot=plot, as_json=as_json)


def detect(
    *,
    out: OutOption = Path("reproduce/detect"),
    quick: QuickOption = False,
    seeds: SeedsOption = None,
    segments: SegmentsOption = None,
    samples: SamplesOption = None,
    overrides: SetOption = None,
    plot: PlotOption = True,
    as_json: JsonOption = False,
) -> None:
    """Accuracy of finding and keeping a fact, by length (RMT report, Figures 1 and 6)."""
    plan = _plan("detect", quick, seeds, segments, samples, overrides)
    _reproduce(plan, out, plot=plot, as_json=as_json)


def reason(
    *,
    out: OutOption = Path("reproduce/reason"),
    quick: QuickOption = False,
    seeds: SeedsOption = None,
    segments: SegmentsOption = None,
    samples: SamplesOption = None,
    overrides: SetOption = None,
    plot: PlotOption = True,
    as_json: JsonOption = False,
) -> None:
    """Accuracy of answering by one of two facts, by length (RMT report, Figures 1 and 6)."""
    plan = _plan("reason", quick, seeds, segments, samples, overrides)
    _reproduce(plan, out, plot=plot, as_json=as_json)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Plan:
    name: Name
    run: TaskRunConfig
    seeds: int
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
    run = TASK_RECIPES[f"rmt-{name}"]()
    try:
        run = apply_overrides(run, [*(_QUICK if quick else ()), *(overrides or [])])
    except (ValueError, TypeError) as error:
        raise typer.BadParameter(str(error)) from error
    lengths = segments or (_QUICK_SEGMENTS if quick else DEFAULT_SEGMENTS)
    return _Plan(
        name=name,
        run=run,
        seeds=seeds or (1 if quick else _FULL_SEEDS),
        segments=parse_segments(lengths),
        samples=samples or (_QUICK_SAMPLES if quick else _FULL_SAMPLES),
    )


def _reproduce(plan: _Plan, out: Path, *, plot: bool, as_json: bool) -> None:
    """Train and measure one run per seed; what is done already is not done again."""
    from byheart.evaluation.segments_plot import plot_accuracy_by_segments
    from byheart.evaluation.segments_result import RunsResult

    published = PUBLISHED_ACCURACY[plan.name]
    outcomes, measured = [], []
    for seed in range(plan.seeds):
        directory = out / f"seed-{seed}"
        run = replace(plan.run, training=replace(plan.run.training, seed=seed))
        outcomes.append(_train(run, directory))
        measured.append(_measure(plan, directory))
    runs = RunsResult(runs=tuple(measured))
    table = runs.to_markdown(published)
    result = {
        "figure": "Bulatov et al. 2023 (arXiv:2304.11062v1), Figure 1",
        "report": {str(count): accuracy for count, accuracy in published.items()},
        "outcomes": outcomes,
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


def _write_attention(run: Path, out: Path, *, plot: bool) -> list[Path]:
    """Look at how memory is written, kept and read in one document (RMT report, Figure 6).

    Returns:
        The files written.
    """
    from byheart.evaluation.memory_attention import memory_attention, plot_memory_attention
    from byheart.training.task_run import load_task_run

    trained = load_task_run(run)
    attention = memory_attention(trained.memory_model, trained.task.sample(0, _ATTENTION_SEGMENTS))
    files = [out / "attention.json"]
    write_text_atomic(files[0], json.dumps(attention.to_dict()) + "\n")
    if plot:
        for name, head in attention.telling_heads().items():
            path = out / f"attention-{name}.png"
            try:
                files.append(plot_memory_attention(attention, head, path, title=name))
            except ImportError:
                break  # said already
    return files


def _train(run: TaskRunConfig, directory: Path) -> str:
    """Learn the task, go on with what was begun, or find that it is done.

    Returns:
        What became of it, in one sentence.
    """
    from byheart.training.checkpoint import find_checkpoint
    from byheart.training.task_run import train_task

    try:
        begun = find_checkpoint(directory).step > 0
    except CheckpointError:
        begun = False  # it was killed before its first checkpoint
    err_console.print(f"{'Going on with' if begun else 'Training'} {directory} ...", markup=False)
    with evaluation_progress() as on_progress:
        result = train_task(
            run, directory, resume=begun, overwrite=not begun, on_progress=on_progress
        )
    err_console.print(result.summary, highlight=False)
    return result.summary


def _measure(plan: _Plan, directory: Path) -> "SegmentsResult":
    """Measure a run, or find what was measured before of the same weights.

    Returns:
        Accuracy by length.
    """
    from byheart.evaluation.segments_result import SegmentsResult

    trained = json.loads((directory / "result.json").read_text(encoding="utf-8"))
    settings = {
        "model_fingerprint": trained["model_fingerprint"],
        "segments": list(plan.segments),
        "samples": plan.samples,
    }
    file = directory / "segments.json"
    if file.is_file():
        content = json.loads(file.read_text(encoding="utf-8"))
        if content["settings"] == settings:
            return SegmentsResult.from_dict(content["result"])
    result = measure_run(
        directory,
        plan.segments,
        samples=plan.samples,
        rows=plan.run.evaluation.rows,
        device=str(find_device(None)),
    )
    content = {"settings": settings, "result": result.to_dict()}
    write_text_atomic(file, json.dumps(content, indent=2) + "\n")
    return result
