"""`byheart reproduce generalization`: every stage of a curriculum on documents of every length."""

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import replace
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
    Outcome,
    QuickOption,
    SamplesOption,
    SeedsOption,
    SetOption,
    learn_seeds,
    make_run,
    num_samples,
    unreached,
)
from byheart.cli.task import measure_trained, parse_segments

if TYPE_CHECKING:
    from byheart.evaluation.generalization import GeneralizationResult
    from byheart.evaluation.segments_result import SegmentsResult


def _by_stage(*rows: str) -> Mapping[int, Mapping[int, float]]:
    return {
        trained_on: {count: float(cell) / 100 for count, cell in enumerate(row.split(), start=1)}
        for trained_on, row in enumerate(rows, start=1)
    }


PUBLISHED_GENERALIZATION: Mapping[Name, Mapping[int, Mapping[int, float]]] = {
    "memorize": _by_stage(
        "100 16.6 15.1 16.3 16.6 16.9 17.1 16 16.5 17.6 16.9 16.8 16.6 16.4 17.7",
        "100 100 99.6 90.6 76.1 67.9 48.5 39.8 33.1 27.6 23.8 23.1 21.4 21 19.4",
        "100 100 100 100 100 97.6 95.5 93.8 91.7 86.7 81.2 74.5 69 63.1 61.4",
        "99.9 100 100 100 100 97.7 95.5 93.8 91.4 86.4 81.3 75.3 69.3 64.9 61",
        "99.6 100 100 100 100 97.6 95.6 93.9 91.1 86.5 79.8 75.8 69.3 62.7 61.1",
        "100 100 100 100 100 100 100 100 100 100 100 100 100 100 100",
        "100 100 100 100 100 100 100 100 100 100 100 100 100 100 100",
    ),
    "detect": _by_stage(
        "100 18.6 16.1 17.4 17.9 17.3 17.5 16.9 17.3 17.9 17.2 17.4 17.3 16.4 17",
        "100 100 99.7 97 92 80.1 65.8 60.6 47.7 40.1 37.9 34 31.4 28.2 27.5",
        "100 100 100 100 100 100 100 99.9 99.9 99.9 99.9 100 100 100 99.9",
        "100 100 100 100 100 100 100 99.9 100 99.9 100 100 99.9 100 99.9",
        "100 100 100 100 100 100 100 100 100 100 100 100 100 100 100",
        "100 100 100 100 100 100 100 100 100 99.9 100 100 100 100 99.9",
        "100 100 100 100 100 100 100 100 100 99.9 100 99.9 100 99.9 100",
    ),
    "reason": _by_stage(
        "99.8 15.8 19.9 18.3 16.4 15.9 17.5 15.6 16.8 16.7 17.3 17 18.6 16.2 17",
        "52 96.6 91.3 84.3 75.3 68.7 63 54.5 53.2 46.5 42.7 39.4 36.1 36.7 34.6",
        "56 99.8 99.6 97.2 89.2 81 77.4 73.4 68.7 64.1 61.4 60.2 57.3 52.1 56.5",
        "51.2 100 99.9 100 99.8 99.2 98.5 96.9 95.1 94.3 91.4 91 89.1 85.8 84.2",
        "53.8 100 99.9 99.9 100 100 99.6 99.4 98.8 98 95 94 91.9 90 86.9",
        "54.7 100 100 99.9 99.9 99.7 99.2 98.2 96.8 97.1 94.2 93.1 91.8 92.1 92.5",
        "54.4 100 100 99.9 100 99.7 98.9 97.4 97.6 96.2 95.1 92.4 94 92.1 91",
    ),
}
"""Accuracy by segments trained on (1 to 7) and evaluated on (1 to 15), of a pretrained BERT.

Its segments have 499 tokens, and each stage all documents of one length.

Source:
    Bulatov et al. 2023, Scaling Transformer to 1M tokens and beyond with RMT (arXiv:2304.11062v1),
    Figure 5: coordinates of the vector graphics.
"""

_SEGMENTS = ",".join(map(str, range(1, 16)))


def generalization(
    *,
    task: Annotated[Name, typer.Option(help="What is learned.")] = "memorize",
    out: TasksOutOption = None,
    quick: QuickOption = False,
    seeds: SeedsOption = None,
    segments: Annotated[str, typer.Option(help="Lengths to measure.")] = _SEGMENTS,
    samples: SamplesOption = None,
    overrides: SetOption = None,
    plot: PlotOption = True,
    as_json: JsonOption = False,
) -> None:
    """Accuracy by segments trained on and evaluated on (RMT report, Figure 5)."""
    lengths, count = parse_segments(segments), num_samples(samples, quick=quick)
    run = make_run(task, quick=quick, overrides=overrides)
    out = out or Path("reproduce", "generalization-quick" if quick else "generalization")
    prepare_output(out)
    run = replace(run, curriculum=replace(run.curriculum, keep_stages=True))
    from byheart.evaluation.generalization import GeneralizationResult
    from byheart.evaluation.segments_result import RunsResult
    from byheart.training.stages import kept_stages

    outcomes: list[Outcome] = []
    measured: dict[int, list[SegmentsResult]] = defaultdict(list)
    for outcome in learn_seeds(run, out / task, seeds, quick=quick):
        outcomes.append(outcome)
        for stage in kept_stages(outcome.directory):
            found = _measure(
                outcome.directory, stage, lengths, samples=count, rows=run.evaluation.rows
            )
            measured[stage].append(found)
    if not measured:
        msg = f"At least one stage must be reached to be measured. {outcomes[-1].summary}"
        raise ValueError(msg)
    result = GeneralizationResult(
        stages={stage: RunsResult(runs=tuple(measured[stage])) for stage in sorted(measured)}
    )
    published = PUBLISHED_GENERALIZATION[task]
    table = result.to_markdown(published) + unreached(outcomes)
    content = {
        "figure": "Bulatov et al. 2023 (arXiv:2304.11062v1), Figure 5",
        "report": {
            str(stage): {str(length): share for length, share in row.items()}
            for stage, row in published.items()
        },
        "outcomes": [outcome.summary for outcome in outcomes],
        **result.to_dict(),
    }
    draw = (lambda path: _plot(result, published, path)) if plot else None
    files = write_output(out, task, content, table, draw)
    show_output(content, table, files, as_json=as_json)
    if unreached(outcomes):
        raise typer.Exit(1)


def _plot(
    result: "GeneralizationResult", published: Mapping[int, Mapping[int, float]], path: Path
) -> Path:
    from byheart.evaluation.segments_plot import plot_accuracy_by_segments

    lines = {f"trained on {stage}": runs for stage, runs in result.stages.items()}
    references = {
        f"report, {stage}": shown
        for stage in result.stages
        if (shown := _only(published.get(stage, {}), result.segments))
    }
    return plot_accuracy_by_segments(lines, path, references=references, scale="linear")


def _only(published: Mapping[int, float], lengths: tuple[int, ...]) -> Mapping[int, float]:
    return {length: share for length, share in published.items() if length in lengths}


def _measure(
    directory: Path, stage: int, lengths: tuple[int, ...], *, samples: int, rows: int
) -> "SegmentsResult":
    from byheart.models.fingerprint import model_fingerprint
    from byheart.training.task_files import load_task_run

    trained = load_task_run(directory, stage=stage)
    settings = {
        "model_fingerprint": model_fingerprint(trained.memory_model),
        "samples": samples,
    }
    return measure_once(
        directory / f"segments-stage-{stage}.json",
        settings,
        lengths,
        lambda length: measure_trained(
            trained, (length,), samples=samples, rows=rows, device=str(find_device(None))
        ),
    )
