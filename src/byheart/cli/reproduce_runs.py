"""The runs behind reproduced figures: trained and measured once, whatever interrupts them."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from byheart.cli.common import err_console
from byheart.cli.task import evaluation_progress
from byheart.config import apply_overrides, write_text_atomic
from byheart.errors import CheckpointError
from byheart.recipes import TASK_RECIPES
from byheart.training.task_config import TaskRunConfig

if TYPE_CHECKING:
    from byheart.evaluation.segments_result import SegmentsResult

Name = Literal["memorize", "detect", "reason"]

QuickOption = Annotated[
    bool, typer.Option("--quick", help="One seed, 4 segments: minutes (reason: half an hour).")
]
SeedsOption = Annotated[
    int | None, typer.Option(min=1, help="Runs that differ in their seed; default: 3, quick: 1.")
]
SamplesOption = Annotated[
    int | None, typer.Option(min=1, help="Documents of each length; default: 400, quick: 200.")
]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", help="Change a field of the recipe: --set window=128. Repeatable."),
]

# a few minutes on 2 CPU cores; of *reason*, whose lessons come first, up to half an hour
_QUICK = (
    "curriculum.max_segments=4",
    "curriculum.continue_segments=4",
    "curriculum.continue_steps=200",
    "evaluation.segments=[1, 2, 4]",
    "evaluation.samples=200",
)
_QUICK_SAMPLES = 200
_FULL_SEEDS, _FULL_SAMPLES = 3, 400


def make_run(name: Name, *, quick: bool, overrides: list[str] | None) -> TaskRunConfig:
    """Make the config of the runs of a figure.

    Args:
        name: The task.
        quick: Whether minutes must be enough.
        overrides: What the user sets.

    Returns:
        The recipe, changed.

    Raises:
        BadParameter: If a setting is refused, or is the seed, which every run has of its own.
    """
    run = TASK_RECIPES[f"rmt-{name}"]()
    overrides = overrides or []
    try:
        changed = apply_overrides(run, [*(_QUICK if quick else ()), *overrides])
    except (ValueError, TypeError) as error:
        raise typer.BadParameter(str(error)) from error
    names_seed = any(item.partition("=")[0].strip() == "training.seed" for item in overrides)
    if names_seed or changed.training.seed != run.training.seed:
        msg = (
            "training.seed must not be set here: the runs have the seeds 0, 1, 2 and so on. Use "
            "--seeds to say how many, or byheart train for one of your own."
        )
        raise typer.BadParameter(msg)
    return changed


def num_samples(samples: int | None, *, quick: bool) -> int:
    """Choose how many documents of each length are read.

    Returns:
        What the user asked for, or the default.
    """
    return samples or (_QUICK_SAMPLES if quick else _FULL_SAMPLES)


def learn_seeds(
    run: TaskRunConfig, out: Path, seeds: int | None, *, quick: bool
) -> Iterator[tuple[Path, str]]:
    """Learn a task with several seeds, go on with what was begun, or find that it is done.

    Args:
        run: What to do; its seed is replaced.
        out: Where the directories of the runs are.
        seeds: How many; `None` for the default.
        quick: Which default.

    Yields:
        Directory of a run, and what became of it, in one sentence.
    """
    for seed in range(seeds or (1 if quick else _FULL_SEEDS)):
        directory = out / f"seed-{seed}"
        yield directory, _learn(replace(run, training=replace(run.training, seed=seed)), directory)


def measure_once(
    file: Path,
    settings: Mapping[str, object],
    lengths: Sequence[int],
    measure: Callable[[int], "SegmentsResult"],
) -> "SegmentsResult":
    """Measure a model at some lengths, but for those where it was measured before.

    Args:
        file: Where the result is kept; it is written after each length.
        settings: What the result depends on.
        lengths: Numbers of segments.
        measure: Called with each length that is not there with these settings.

    Returns:
        Accuracy by length.

    Raises:
        CheckpointError: If the file is damaged.
    """
    from byheart.evaluation.segments_result import SegmentsResult

    known = _measured_before(file, settings)
    for length in lengths:
        if length in known:
            continue
        known[length] = measure(length)
        content = {
            "settings": settings,
            "result": SegmentsResult.joined([known[one] for one in sorted(known)]).to_dict(),
        }
        write_text_atomic(file, json.dumps(content, indent=2) + "\n")
    return SegmentsResult.joined([known[length] for length in lengths])


def _measured_before(file: Path, settings: Mapping[str, object]) -> "dict[int, SegmentsResult]":
    from byheart.evaluation.segments_result import SegmentsResult

    if not file.is_file():
        return {}
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        if content["settings"] != settings:
            return {}
        return SegmentsResult.from_dict(content["result"]).by_length()
    # whatever else the file may hold
    except (ValueError, LookupError, TypeError, AssertionError) as error:
        msg = (
            f"{file} must hold what was measured before, and does not ({error!r}). Remove it to "
            "measure again."
        )
        raise CheckpointError(msg) from error


def _learn(run: TaskRunConfig, directory: Path) -> str:
    from byheart.training.checkpoint import has_checkpoints
    from byheart.training.task_files import find_result
    from byheart.training.task_run import train_task

    finished = find_result(directory, run)
    if finished is not None:
        err_console.print(f"{directory} is finished.", markup=False)
        return str(finished["summary"])
    begun = has_checkpoints(directory)
    err_console.print(f"{'Going on with' if begun else 'Training'} {directory} ...", markup=False)
    with evaluation_progress() as on_progress:
        result = train_task(
            run, directory, resume=begun, overwrite=not begun, on_progress=on_progress
        )
    err_console.print(result.summary, highlight=False)
    return result.summary
