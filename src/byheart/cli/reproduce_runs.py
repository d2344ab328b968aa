"""The runs behind reproduced figures: trained and measured once, whatever interrupts them."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

import typer

from byheart.cli.common import err_console
from byheart.cli.task import evaluation_progress
from byheart.config import apply_overrides
from byheart.errors import CheckpointError
from byheart.recipes import TASK_RECIPES
from byheart.training.task_config import TaskRunConfig

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
    "curriculum.continue_steps=200",
    "evaluation.segments=[1, 2, 4]",
    "evaluation.samples=200",
)
_LONGEST, _LONGEST_LATER = "curriculum.max_segments", "curriculum.continue_segments"
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
    shorter = list(_QUICK) if quick else []
    if run.curriculum.continue_segments is not None and not _is_set(overrides, _LONGEST):
        # the recipe goes on with longer documents, which must not be shorter than its stages
        shorter += [f"{_LONGEST_LATER}=4"] if quick else []
    try:
        changed = apply_overrides(run, [*shorter, *overrides])
    except (ValueError, TypeError) as error:
        raise typer.BadParameter(str(error)) from error
    if _is_set(overrides, "training.seed") or changed.training.seed != run.training.seed:
        msg = (
            "training.seed must not be set here: the runs have the seeds 0, 1, 2 and so on. Use "
            "--seeds to say how many, or byheart train for one of your own."
        )
        raise typer.BadParameter(msg)
    return changed


def _is_set(overrides: list[str], name: str) -> bool:
    return any(item.partition("=")[0].strip() == name for item in overrides)


def num_samples(samples: int | None, *, quick: bool) -> int:
    """Choose how many documents of each length are read.

    Returns:
        What the user asked for, or the default.
    """
    return samples or (_QUICK_SAMPLES if quick else _FULL_SAMPLES)


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """What became of a run."""

    directory: Path
    """Where it is."""
    is_reached: bool
    """Whether all stages were."""
    summary: str
    """The same in one sentence."""


def unreached(outcomes: list[Outcome]) -> str:
    """Say below a table which runs have not learned the task.

    Args:
        outcomes: Of all runs.

    Returns:
        Lines; empty if all have.
    """
    return "".join(
        f"\n{one.directory.name}: {one.summary}\n" for one in outcomes if not one.is_reached
    )


def learn_seeds(
    run: TaskRunConfig, out: Path, seeds: int | None, *, quick: bool
) -> Iterator[Outcome]:
    """Learn a task with several seeds, go on with what was begun, or find that it is done.

    Args:
        run: What to do; its seed is replaced.
        out: Where the directories of the runs are.
        seeds: How many; `None` for the default.
        quick: Which default.

    Yields:
        What became of each run.
    """
    for seed in range(seeds or (1 if quick else _FULL_SEEDS)):
        directory = out / f"seed-{seed}"
        yield _learn(replace(run, training=replace(run.training, seed=seed)), directory)


def _learn(run: TaskRunConfig, directory: Path) -> Outcome:
    from byheart.training.checkpoint import MODEL, has_checkpoints
    from byheart.training.task_files import find_result
    from byheart.training.task_run import train_task

    finished = find_result(directory, run)
    if finished is not None:
        err_console.print(f"{directory} is finished.", markup=False)
        is_reached, summary = finished.get("outcome") == "reached", str(finished["summary"])
        return Outcome(directory=directory, is_reached=is_reached, summary=summary)
    begun = has_checkpoints(directory)
    if not begun and (directory / MODEL).exists():
        msg = (
            f"{directory} must hold a run of this recipe, or nothing: it holds the model of a run "
            "that left neither result nor checkpoints. Name another directory with --out."
        )
        raise CheckpointError(msg)
    err_console.print(f"{'Going on with' if begun else 'Training'} {directory} ...", markup=False)
    with evaluation_progress() as on_progress:
        result = train_task(
            run, directory, resume=begun, overwrite=not begun, on_progress=on_progress
        )
    err_console.print(result.summary, highlight=False)
    return Outcome(
        directory=directory, is_reached=result.outcome == "reached", summary=result.summary
    )
