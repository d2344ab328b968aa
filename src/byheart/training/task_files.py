"""What a finished run that learned a task has left: its result, its models, its documents."""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from byheart.adapters.recurrent import RecurrentMemory
from byheart.adapters.recurrent_saving import load_recurrent
from byheart.config import load_config
from byheart.data.tasks import Task
from byheart.data.tokenize import Tokenizer, load_tokenizer
from byheart.errors import CheckpointError, DataError
from byheart.training.checkpoint import CONFIG, MODEL, RESULT
from byheart.training.stages import kept_stages, stage_directory
from byheart.training.task_config import TaskRunConfig
from byheart.training.task_model import make_task

__all__ = [
    "CONFIG",
    "RESULT",
    "TOKENIZER",
    "TrainedTask",
    "final_task",
    "find_result",
    "listed",
    "load_task_run",
    "require_finished",
]

TOKENIZER = "tokenizer"
# documents of the final evaluation are not those that the curriculum has looked at
_FINAL_SEED = 1


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainedTask:
    """What a run has left."""

    run: TaskRunConfig
    """Its config."""
    memory_model: RecurrentMemory
    """The trained model, or that of a stage, in evaluation mode."""
    task: Task
    """Documents with held-out facts, which the curriculum has not looked at."""


def find_result(run_dir: str | os.PathLike[str], run: TaskRunConfig) -> dict[str, Any] | None:
    """Find what a finished run has left. Its checkpoints may be gone, and its model too.

    Args:
        run_dir: Directory of the run.
        run: What it should have done.

    Returns:
        The content of `result.json`; `None` if the run is not finished, or goes on with `run`.

    Raises:
        CheckpointError: If a finished run without checkpoints did something else: it cannot go on,
            and must not be overwritten. Or if a file is damaged.
    """
    directory = Path(run_dir)
    if not (directory / RESULT).is_file():
        return None
    if _load_run(directory) == run:
        return _load_result(directory)
    if not any(directory.glob("checkpoint-*")):
        msg = (
            f"{directory} must hold a run with these settings, or one with checkpoints to go on "
            "from: it holds a finished run with others. Name another directory, or remove it."
        )
        raise CheckpointError(msg)
    return None


def load_task_run(
    run_dir: str | os.PathLike[str],
    *,
    stage: int | None = None,
    background: str | os.PathLike[str] | None = None,
) -> TrainedTask:
    """Load what a run has left.

    Args:
        run_dir: Directory of the run.
        stage: Segments of the stage whose model is wanted, as it was when the stage was reached;
            the run may be unfinished. `None` for the model of the finished run.
        background: Documents around the facts, in any format `iter_documents` reads. `None` for
            those of the run's own evaluation.

    Returns:
        Model and documents.

    Raises:
        CheckpointError: If the run is not finished, has not kept the stage or has another
            tokenizer than it was trained with, or a file is damaged.
        DataError: If its documents are not where its config says, or the background cannot be
            used.
    """
    directory = Path(run_dir)
    if stage is not None:
        _require_stage(directory, stage)
    else:
        require_finished(directory)
    model = directory / MODEL if stage is None else stage_directory(directory, stage)
    run = _load_run(directory)
    _require_files(run, directory, has_background=background is not None)
    tokenizer = _load_tokenizer(directory)
    return TrainedTask(
        run=run,
        memory_model=load_recurrent(None, model),
        task=final_task(run, tokenizer, background=background),
    )


def require_finished(run_dir: str | os.PathLike[str]) -> None:
    """Refuse what is not a finished run, without loading it.

    Args:
        run_dir: Directory of the run.

    Raises:
        CheckpointError: If the run is not finished.
    """
    directory = Path(run_dir)
    has_checkpoints = any(directory.glob("checkpoint-*"))
    # a run that goes on has the model from before, until it is finished again
    goes_on = has_checkpoints and not (directory / RESULT).is_file()
    if goes_on or not (directory / MODEL).is_dir():
        what = f"{directory} must hold a finished run with {MODEL}/, {TOKENIZER}/ and {RESULT}"
        if not directory.is_dir():
            msg = f"{what}, but there is no such directory. Check the path."
        elif not has_checkpoints:
            msg = f"{what}, and has no checkpoint to finish it from. Name another."
        else:
            msg = f"{what}. Finish it with resume=True (--resume), or name another."
        raise CheckpointError(msg)


def final_task(
    run: TaskRunConfig,
    tokenizer: Tokenizer,
    *,
    background: str | os.PathLike[str] | None = None,
) -> Task:
    """Make the documents of the final evaluation, which the curriculum has not looked at.

    Args:
        run: The run.
        tokenizer: Its tokenizer.
        background: Documents around the facts; `None` for those of the run.

    Returns:
        Documents with held-out facts.

    Raises:
        DataError: If the background cannot be used, or is what the run was trained on.
    """
    own = run.task.background
    if (
        background is not None
        and own is not None
        and Path(background).resolve() == Path(own).resolve()
    ):
        msg = (
            f"background must be documents that the run was not trained on, got {background}. Name "
            "others."
        )
        raise DataError(msg)
    seed = run.training.seed + _FINAL_SEED
    return make_task(run, tokenizer, is_training=False, seed=seed, background=background)


def _load_run(directory: Path) -> TaskRunConfig:
    path = directory / CONFIG
    try:
        return load_config(TaskRunConfig, path)
    except (OSError, TypeError, ValueError) as error:
        msg = (
            f"{path} must hold the settings of a run that has learned a task, and does not "
            f"({error}). Restore the file, or name another run."
        )
        raise CheckpointError(msg) from error


def _load_result(directory: Path) -> dict[str, Any]:
    path = directory / RESULT
    problem = "it has no summary"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        content, problem = None, str(error)
    if not isinstance(content, dict) or "summary" not in content:
        msg = (
            f"{path} must hold the result of a run that has learned a task, and does not "
            f"({problem}). Restore the file, or remove it and finish the run with resume=True "
            "(--resume)."
        )
        raise CheckpointError(msg)
    return content


def _load_tokenizer(directory: Path) -> Tokenizer:
    path = directory / TOKENIZER
    try:
        tokenizer = load_tokenizer(path)
    except (OSError, ValueError) as error:
        msg = (
            f"{path} must hold the tokenizer of the run, and does not ({error}). Restore it, or "
            "train anew."
        )
        raise CheckpointError(msg) from error
    if (directory / RESULT).is_file():
        # results of earlier versions do not name it
        saved = _load_result(directory).get("tokenizer_fingerprint", tokenizer.fingerprint)
        if tokenizer.fingerprint != saved:
            msg = (
                f"{path} must be the one of the run, {saved[:12]}, got "
                f"{tokenizer.fingerprint[:12]}. Put the tokenizer back that the run has saved."
            )
            raise CheckpointError(msg)
    return tokenizer


def _require_files(run: TaskRunConfig, directory: Path, *, has_background: bool) -> None:
    # the background of training is not read again
    own = None if has_background else run.task.validation_background
    for path in (run.task.facts, own):
        if path is not None and not Path(path).exists():
            msg = (
                f"The documents of the run must be where {directory / CONFIG} says, {path}, and "
                f"are not there (relative paths are sought from here, {Path.cwd()}). Go where the "
                "run was trained, or write the path into that file."
            )
            raise DataError(msg)


def _require_stage(directory: Path, stage: int) -> None:
    kept = kept_stages(directory)
    if stage not in kept:
        msg = (
            f"{directory} must hold the model of stage {stage}, it has kept those of stages "
            f"{listed(kept) or 'none'}. Train with curriculum.keep_stages=true until the stage is "
            "reached, or name another."
        )
        raise CheckpointError(msg)


def listed(stages: Sequence[int]) -> str:
    """Write stages as a list for a message.

    Args:
        stages: Their numbers.

    Returns:
        The list; empty if there are none.
    """
    return ", ".join(map(str, stages))
