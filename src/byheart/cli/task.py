"""`byheart train` with a recipe that learns a task, and `byheart evaluate-task`."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from byheart.cli.common import (
    Bar,
    DeviceOption,
    err_console,
    find_device,
    parse_sizes,
    prepare_output,
    print_json,
    progress_bar,
    run_kind,
)
from byheart.cli.measured import measure_once
from byheart.cli.reproduce_output import JsonOption, PlotOption, show_output, write_output
from byheart.errors import CheckpointError
from byheart.training.task_config import TaskEvaluationConfig, TaskRunConfig, TaskTrainingConfig

if TYPE_CHECKING:
    from byheart.evaluation.segments import SegmentsProgress
    from byheart.evaluation.segments_result import RunsResult, SegmentsResult
    from byheart.training.task_files import TrainedTask

DEFAULT_SEGMENTS = "1,2,4,8,16,32,64,128,256,512,1024,2048,4096"


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("evaluate-task")(evaluate_task)


def train_task(
    run: TaskRunConfig, directory: Path, *, resume: bool, overwrite: bool, as_json: bool
) -> None:
    """Learn a task, and print what became of it.

    Args:
        run: What to do.
        directory: Of the run.
        resume: Go on from the newest checkpoint.
        overwrite: Remove the run that the directory holds.
        as_json: Whether to print JSON.

    Raises:
        Exit: If a stage of the curriculum was not reached.
    """
    # brings transformers, which other commands and --help need not wait for
    from byheart.training.task_run import train_task as run_training

    with evaluation_progress() as on_progress:
        result = run_training(
            run, directory, resume=resume, overwrite=overwrite, on_progress=on_progress
        )
    if as_json:
        print_json({**result.to_dict(), "run_dir": str(directory)})
    else:
        print(result.evaluation.to_markdown())
        err_console.print(f"{result.summary} The run is in {directory}.", highlight=False)
        if result.outcome == "reached":
            line = f"Longer documents: byheart evaluate-task {directory}"
            err_console.print(line, highlight=False)
    if result.outcome != "reached":
        raise typer.Exit(1)


def evaluate_task(
    runs: Annotated[
        list[Path], typer.Argument(help="Directories of finished runs, such as those of 3 seeds.")
    ],
    *,
    segments: Annotated[
        str | None,
        typer.Option(
            help="Lengths of the documents in segments; default: 1 to 4,096 that hold all facts."
        ),
    ] = None,
    samples: Annotated[
        int,
        typer.Option(min=1, help="Documents of each length; of 4,096 segments hours on a CPU."),
    ] = 400,
    rows: Annotated[int, typer.Option(min=1, help="Documents read side by side.")] = 50,
    background: Annotated[
        Path | None,
        typer.Option(help="Documents around the facts; default: those of the run's evaluation."),
    ] = None,
    device: DeviceOption = None,
    out: Annotated[
        Path | None,
        typer.Option(
            help="Directory for result and plot; default: RUN/evaluation. Several runs and other "
            "documents need one."
        ),
    ] = None,
    plot: PlotOption = True,
    as_json: JsonOption = False,
) -> None:
    """Measure the accuracy on a task by number of segments."""
    _require_place(out, runs, background)
    wanted = None if segments is None else parse_segments(segments)
    where = find_device(device)
    from byheart.evaluation.segments_result import RunsResult

    lengths = _lengths(runs, wanted, background)
    directory = out or runs[0] / "evaluation"
    prepare_output(directory)
    kept = [directory / f"measured-{place}.json" for place in range(len(runs))]
    measure = partial(
        _measure_once,
        segments=lengths, samples=samples, rows=rows, device=str(where), background=background,
    )  # fmt: skip
    found = RunsResult(runs=tuple(map(measure, runs, kept)))
    result = {
        "models": [str(run) for run in runs],
        "background": None if background is None else str(background),
        **found.to_dict(),
    }
    table = found.to_markdown()
    if background is not None:
        table += f"\nBackground: {background}\n"
    draw = partial(_draw, found) if plot else None
    files = write_output(directory, "segments", result, table, draw)
    for file in kept:
        file.unlink(missing_ok=True)
    show_output(result, table, files, as_json=as_json)


def _require_place(out: Path | None, runs: Sequence[Path], background: Path | None) -> None:
    if out is not None or (len(runs) == 1 and background is None):
        return
    what = "in other documents is not the run's own"
    what = "of several runs belongs to none of them" if len(runs) > 1 else what
    msg = f"The result {what}. Name its directory with --out."
    raise typer.BadParameter(msg)


def _draw(found: "RunsResult", path: Path) -> Path:
    from byheart.evaluation.segments_plot import plot_accuracy_by_segments

    return plot_accuracy_by_segments({found.runs[0].task: found}, path)


def _measure_once(
    run: Path,
    kept: Path,
    segments: Sequence[int],
    *,
    samples: int,
    rows: int,
    device: str,
    background: Path | None,
) -> "SegmentsResult":
    """Measure a run, and keep each length until all runs are measured.

    Returns:
        Accuracy by length.
    """
    from byheart.models.fingerprint import model_fingerprint
    from byheart.training.task_files import load_task_run

    trained = load_task_run(run, background=background)
    settings = {
        "model_fingerprint": model_fingerprint(trained.memory_model),
        "samples": samples,
        "background": None if background is None else str(background.resolve()),
    }

    def measure(length: int) -> "SegmentsResult":
        return measure_trained(trained, (length,), samples=samples, rows=rows, device=device)

    return measure_once(kept, settings, segments, measure)


def _lengths(
    runs: Sequence[Path], wanted: tuple[int, ...] | None, background: Path | None
) -> tuple[int, ...]:
    """Choose what to measure once all runs have been opened: hours later it would be too late.

    Returns:
        What is wanted; without a wish the default, but for lengths that cannot hold all facts.

    Raises:
        BadParameter: If the runs have not learned the same, or a length cannot hold all facts.
    """
    from byheart.training.task_files import load_task_run, require_finished

    for run in runs:
        _require_task(run)
        require_finished(run)
    kinds: dict[tuple[str, object], Path] = {}
    least = 1
    twice = [run for run in runs if [one.resolve() for one in runs].count(run.resolve()) > 1]
    if twice:
        msg = f"Each run must be named once, got {twice[0]} twice. Leave one out."
        raise typer.BadParameter(msg)
    for run in runs:
        # one after the other: the models of all seeds need not fit into memory
        trained = load_task_run(run, background=background)
        config = trained.task.config
        kind = f"{config.name} ({config.form} form, segments of {config.segment_length} tokens)"
        kinds.setdefault((kind, _but_seed(trained.run)), run)
        least = max(least, trained.task.min_segments)
    if len({kind for kind, _ in kinds}) > 1:
        found = " and ".join(f"{kind} in {run}" for (kind, _), run in kinds.items())
        msg = (
            "Runs that are measured together must have learned the same task in segments of the "
            f"same length, got {found}. Measure them one by one."
        )
        raise typer.BadParameter(msg)
    if len(kinds) > 1:
        found = " and ".join(map(str, kinds.values()))
        msg = (
            "Runs that are measured together must differ in their seed alone, but the config.json "
            f"of {found} differ in more. Measure them one by one."
        )
        raise typer.BadParameter(msg)
    lengths = wanted or tuple(n for n in parse_segments(DEFAULT_SEGMENTS) if n >= least)
    if min(lengths) < least:
        msg = (
            f"--segments must be at least the {least} that hold all facts, got {min(lengths)}. "
            "Leave the shorter ones out."
        )
        raise typer.BadParameter(msg)
    return lengths


def _but_seed(run: TaskRunConfig) -> TaskRunConfig:
    """Leave out what runs may differ in: the seed, and what does not change what is learned.

    Returns:
        The rest of the config.
    """
    same = TaskTrainingConfig()
    names = ("seed", "save_every", "keep_checkpoints", "log_every", "precision")
    training = replace(run.training, **{name: getattr(same, name) for name in names})
    curriculum = replace(run.curriculum, keep_stages=False)
    return replace(
        run, name="", training=training, curriculum=curriculum, evaluation=TaskEvaluationConfig()
    )


def _require_task(run: Path) -> None:
    kind = run_kind(run / "config.json")
    if kind in ("documents", "pretrained"):
        found, hint = (
            ("one that has learned documents", f"Measure it with: byheart evaluate {run}")
            if kind == "documents"
            else ("a Hugging Face model", "Pass the --out directory of byheart train.")
        )
        msg = f"{run} must hold a run that has learned a task, and holds {found}. {hint}"
        raise CheckpointError(msg)


def parse_segments(text: str) -> tuple[int, ...]:
    """Read lengths of documents, such as `1,2,4,4K`.

    Returns:
        The numbers, each once and in order; K is 1024.

    Raises:
        BadParameter: If an item is no number above 0.
    """
    try:
        lengths = parse_sizes(text)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    if min(lengths) < 1:
        msg = f"--segments must be at least 1 each, got {text}."
        raise typer.BadParameter(msg)
    return tuple(sorted(set(lengths)))


def measure_run(
    run: Path,
    segments: Sequence[int],
    *,
    samples: int,
    rows: int,
    device: str,
    background: Path | None = None,
) -> "SegmentsResult":
    """Measure the accuracy of a finished run, with a progress bar.

    Args:
        run: Its directory.
        segments: Lengths of the documents.
        samples: Documents of each length.
        rows: Documents read at the same time.
        device: Where to.
        background: Documents around the facts; `None` for those of the run's evaluation.

    Returns:
        Accuracy by length.
    """
    from byheart.training.task_files import load_task_run

    trained = load_task_run(run, background=background)
    return measure_trained(trained, segments, samples=samples, rows=rows, device=device)


def measure_trained(
    trained: "TrainedTask", segments: Sequence[int], *, samples: int, rows: int, device: str
) -> "SegmentsResult":
    """Measure the accuracy of what a run has left, with a progress bar.

    A model that has learned in bfloat16 is read in it where that is fast.

    Args:
        trained: Model and documents.
        segments: Lengths of the documents.
        samples: Documents of each length.
        rows: Documents read at the same time.
        device: Where to.

    Returns:
        Accuracy by length.
    """
    import torch

    from byheart.evaluation.segments import evaluate_by_segments
    from byheart.ops.processor import multiplies_bfloat16

    is_fast = multiplies_bfloat16(torch.device(device))
    with evaluation_progress() as on_progress:
        return evaluate_by_segments(
            trained.memory_model.to(device),
            trained.task,
            segments=segments,
            samples=samples,
            rows=rows,
            precision=trained.run.training.precision if is_fast else "float32",
            on_progress=on_progress,
        )


@contextmanager
def evaluation_progress() -> "Iterator[Callable[[SegmentsProgress], None]]":
    """Show how far an evaluation by segments is; nothing before its first piece.

    Yields:
        What to pass as `on_progress`.
    """
    with ExitStack() as stack:
        bars: list[Bar] = []

        def show(now: "SegmentsProgress") -> None:
            # not earlier: training has a bar of its own
            if not bars:
                bars.append(Bar(stack.enter_context(progress_bar("tokens"))))
            bars[0].move("evaluate", now.num_tokens, now.total_tokens)

        yield show
