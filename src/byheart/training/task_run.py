"""Learn a task from a config: documents, model, curriculum, result."""

import json
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from transformers import TrainingArguments

from byheart.adapters.recurrent import RecurrentMemory
from byheart.adapters.recurrent_saving import save_recurrent
from byheart.config import save_config, to_dict, write_text_atomic
from byheart.data.tasks import Task
from byheart.evaluation.segments import SegmentsProgress, evaluate_by_segments
from byheart.evaluation.segments_result import SegmentsResult
from byheart.models.fingerprint import model_fingerprint
from byheart.training.arguments import training_arguments
from byheart.training.callbacks import TrainEvent
from byheart.training.checkpoint import (
    MODEL,
    Checkpoint,
    explained_write_errors,
    find_start,
    remove_checkpoints,
)
from byheart.training.curriculum import Curriculum, Outcome
from byheart.training.resumable import METRICS
from byheart.training.run import refuse_existing
from byheart.training.stages import STAGES, kept_stages, remove_stages
from byheart.training.task_config import TaskRunConfig
from byheart.training.task_files import CONFIG, RESULT, TOKENIZER, final_task, listed
from byheart.training.task_model import TaskTokenizer, make_memory_model, make_task, make_tokenizer
from byheart.training.task_trainer import TaskTrainer, load_curriculum

__all__ = ["TaskResult", "train_task"]

_TENSORBOARD = "tensorboard"
# what may change when a run is resumed
_FREE = {
    "training": ("save_every", "keep_checkpoints", "log_every"),
    "curriculum": ("stage_steps", "continue_steps", "keep_stages"),
}
# what a run without a checkpoint may be begun again with
_FREE_NAMES = (
    "name", "evaluation", *(f"{part}.{name}" for part, names in _FREE.items() for name in names),
)  # fmt: skip


@dataclass(frozen=True, kw_only=True, slots=True)
class TaskResult:
    """What a finished run has made."""

    out_dir: Path
    """The run's directory."""
    model_dir: Path
    """The trained model, for `byheart.adapters.recurrent_saving.load_recurrent`."""
    outcome: Outcome
    """`reached`: all stages; `not reached`: a stage took longer than it may."""
    steps: int
    """Optimizer steps done, those before an interruption included."""
    resumed_from: int | None
    """Step of the checkpoint that this call went on from; `None` if it started at 0."""
    num_parameters: int
    """Parameters of encoder and memory."""
    curriculum: Curriculum
    """The stages, and every evaluation."""
    evaluation: SegmentsResult
    """Accuracy by number of segments, on held-out facts."""

    @property
    def summary(self) -> str:
        """What became of the curriculum, in one sentence."""
        last, config = self.curriculum.evaluations[-1], self.curriculum.config
        if self.outcome == "reached":
            return (
                f"All {config.num_stages} stages were reached with an accuracy of "
                f"{config.advance_accuracy:.1%}, the last after step "
                f"{self.curriculum.saturated_at:,} of {self.steps:,}."
            )
        kind = "lesson" if last.lesson else "stage"
        return (
            f"The {kind} of {last.num_segments} of {config.max_segments} segments was not reached: "
            f"after {last.step - self.curriculum.stage_start:,} steps the accuracy is "
            f"{last.accuracy:.1%}, and must be {config.advance_accuracy:.1%}. Raise "
            "curriculum.stage_steps and go on with resume=True (--resume), or change the training."
        )

    def to_dict(self) -> dict[str, object]:
        """Give what `result.json` holds.

        Returns:
            Nested dictionaries.
        """
        return {
            "outcome": self.outcome,
            "summary": self.summary,
            "steps": self.steps,
            "num_parameters": self.num_parameters,
            "stages": [
                {
                    "num_segments": e.num_segments,
                    "step": e.step,
                    "accuracy": e.accuracy,
                    "lesson": e.lesson,
                }
                for e in self.curriculum.reached
            ],
            "evaluation": self.evaluation.to_dict(),
        }


def train_task(
    run: TaskRunConfig,
    out_dir: str | os.PathLike[str],
    *,
    resume: bool = False,
    overwrite: bool = False,
    on_event: Callable[[TrainEvent], None] | None = None,
    on_progress: Callable[[SegmentsProgress], None] | None = None,
) -> TaskResult:
    """Learn a task, or go on where a killed or stopped run was.

    The directory then holds `config.json`, `tokenizer/`, `metrics.jsonl`, `checkpoint-N/`,
    `model/`, `result.json`, with `curriculum.keep_stages` a model `stages/N/` for each stage that
    was reached and, if TensorBoard is installed, `tensorboard/`. Under `torchrun` each
    process takes its part of the documents; all must see the same directory.

    Args:
        run: What to do.
        out_dir: Directory of the run.
        resume: Go on from the newest complete checkpoint, or at step 0 if the run was killed before
            its first. The result is that of a run that was never interrupted. How often to log and
            save and the final evaluation may differ, `stage_steps` and `continue_steps` be any
            number that is not exceeded already (the rate falls from then on as if it had always
            been that), and stages be kept from now on if none was reached, or no longer.
        overwrite: Remove the run that is in the directory.
        on_event: Called in the main process for each log line, evaluation and checkpoint.
        on_progress: Called during the final evaluation.

    Returns:
        What was made.

    Raises:
        ValueError: If the directory holds a run and it is not said what to do with it, or stages
            are to be kept that are past.
        CheckpointError: If there is nothing to resume, it belongs to another
            run, or something cannot be written.
        TrainingInterruptedError: If SIGINT or SIGTERM came; a checkpoint is written.
    """
    if resume and overwrite:
        msg = "resume and overwrite cannot both be True. Choose one."
        raise ValueError(msg)
    out = Path(out_dir)
    arguments = training_arguments(run.training.resolve(run.curriculum), out)
    # the weights of a gate take no part in documents of one segment
    arguments.ddp_find_unused_parameters = True
    is_main = arguments.process_index == 0
    with arguments.main_process_first(local=False):
        # the others come when the main process has begun the directory
        if is_main and not resume and not overwrite:
            refuse_existing(out)
        parts = _prepare(run, out, arguments, resume=resume)
        if is_main:
            _begin_directory(out, parts)
    trainer = TaskTrainer(
        parts.memory_model,
        parts.train,
        parts.validation,
        run,
        arguments,
        identity=parts.identity,
        on_event=on_event,
    )
    trainer.train(parts.checkpoint)
    if is_main:
        with explained_write_errors(out / MODEL):
            save_recurrent(trainer.best_model, out / MODEL, with_model=True)
    result = _result(trainer, parts, on_progress)
    if is_main:
        with explained_write_errors(out / RESULT):
            _write_result(result, parts, trainer.best_model)
    arguments.distributed_state.wait_for_everyone()
    return result


@dataclass(frozen=True, kw_only=True, slots=True)
class _Parts:
    run: TaskRunConfig
    tokenizer: TaskTokenizer
    train: Task
    validation: Task
    memory_model: RecurrentMemory
    identity: dict[str, Any]
    """What the run depends on, for checkpoints."""
    checkpoint: Checkpoint | None
    """Where to go on."""


def _prepare(
    run: TaskRunConfig, out: Path, arguments: TrainingArguments, *, resume: bool
) -> _Parts:
    """Make everything and check that it fits together, changing nothing in the directory.

    Returns:
        What the run is made of.
    """
    checkpoint = find_start(out, run, _FREE_NAMES) if resume else None
    saved = out / TOKENIZER if resume or arguments.process_index > 0 else None
    tokenizer = make_tokenizer(run, saved)
    identity = _identity(run, tokenizer, arguments.world_size)
    if checkpoint is not None:
        checkpoint.require_same(identity)
        _check_steps(run, out, checkpoint)
        _check_stages(run, out, checkpoint)
    train, validation = (
        make_task(run, tokenizer.tokenizer, is_training=is_training, seed=run.training.seed)
        for is_training in (True, False)
    )
    _check_shortest(run, train)
    if run.curriculum.lessons:
        # refused now, while what the directory holds is still there
        train.lesson(), validation.lesson()
    memory_model = make_memory_model(run, tokenizer, train.num_labels)
    if run.training.precision == "bfloat16" and arguments.device.type == "cpu":
        # the backward pass of torch's fused attention takes 7 times as long there as in float32
        memory_model.model.set_attn_implementation("eager")
    return _Parts(
        run=run, tokenizer=tokenizer, train=train, validation=validation,
        memory_model=memory_model, identity=identity, checkpoint=checkpoint,
    )  # fmt: skip


def _identity(run: TaskRunConfig, tokenizer: TaskTokenizer, num_processes: int) -> dict[str, Any]:
    """Collect what a run depends on, without what may change when it is resumed.

    Returns:
        Nested dictionaries that JSON can hold.
    """
    plain: dict[str, Any] = to_dict(run)
    for name in ("name", "evaluation"):
        del plain[name]
    for part, names in _FREE.items():
        for name in names:
            del plain[part][name]
    fingerprint = tokenizer.tokenizer.fingerprint
    return plain | {"tokenizer": fingerprint, "num_processes": num_processes}


def _check_steps(run: TaskRunConfig, out: Path, checkpoint: Checkpoint) -> None:
    curriculum = load_curriculum(checkpoint, run.curriculum)
    for name, least in (
        ("stage_steps", curriculum.longest_stage(checkpoint.step)),
        ("continue_steps", curriculum.num_continued(checkpoint.step)),
    ):
        wanted = getattr(run.curriculum, name)
        if wanted < least:
            msg = (
                f"curriculum.{name} must be at least the {least} that {out} has done, got {wanted}."
                " Raise it."
            )
            raise ValueError(msg)


def _check_stages(run: TaskRunConfig, out: Path, checkpoint: Checkpoint) -> None:
    reached = _reached(run, checkpoint)
    missing = [n for n in reached if n not in kept_stages(out)]
    if run.curriculum.keep_stages and missing:
        msg = (
            f"curriculum.keep_stages must be false for {out}: it has reached the stages "
            f"{listed(missing)} without keeping them. Resume it so, or start anew with another "
            "directory or overwrite=True."
        )
        raise ValueError(msg)


def _reached(run: TaskRunConfig, checkpoint: Checkpoint) -> list[int]:
    curriculum = load_curriculum(checkpoint, run.curriculum)
    return [e.num_segments for e in curriculum.reached if not e.lesson]


def _check_shortest(run: TaskRunConfig, train: Task) -> None:
    for name, shortest in (
        ("curriculum.min_segments", run.curriculum.min_segments),
        ("evaluation.segments", min(run.evaluation.segments)),
    ):
        if shortest < train.min_segments:
            msg = (
                f"{name} must be at least the {train.min_segments} that hold all facts, got "
                f"{shortest}. Raise it, or raise window."
            )
            raise ValueError(msg)


def _begin_directory(out: Path, parts: _Parts) -> None:
    run, checkpoint = parts.run, parts.checkpoint
    with explained_write_errors(out / CONFIG, is_begun=checkpoint is not None):
        out.mkdir(parents=True, exist_ok=True)
        (out / RESULT).unlink(missing_ok=True)
        if checkpoint is not None:
            # those that the run will come to again
            remove_stages(out, but=_reached(run, checkpoint))
        else:
            # only what a run writes: the directory may be somebody's home
            remove_checkpoints(out)
            for name in (METRICS, CONFIG):
                (out / name).unlink(missing_ok=True)
            for name in (MODEL, STAGES, TOKENIZER, _TENSORBOARD):
                shutil.rmtree(out / name, ignore_errors=True)
            parts.tokenizer.tokenizer.save(out / TOKENIZER)
        save_config(run, out / CONFIG)


def _result(
    trainer: TaskTrainer,
    parts: _Parts,
    on_progress: Callable[[SegmentsProgress], None] | None,
) -> TaskResult:
    model, run, checkpoint = trainer.best_model, parts.run, parts.checkpoint
    step = trainer.state.global_step
    return TaskResult(
        out_dir=trainer.out_dir,
        model_dir=trainer.out_dir / MODEL,
        outcome=trainer.curriculum.outcome(step),
        steps=step,
        resumed_from=None if checkpoint is None else checkpoint.step,
        num_parameters=sum(parameter.numel() for parameter in model.parameters()),
        curriculum=trainer.curriculum,
        evaluation=evaluate_by_segments(
            model,
            final_task(run, parts.tokenizer.tokenizer),
            segments=run.evaluation.segments,
            samples=run.evaluation.samples,
            rows=run.evaluation.rows,
            precision=run.training.precision,
            on_progress=on_progress,
        ),
    )


def _write_result(result: TaskResult, parts: _Parts, model: RecurrentMemory) -> None:
    content: Mapping[str, object] = {
        "name": parts.run.name,
        **result.to_dict(),
        "model_fingerprint": model_fingerprint(model),
        "tokenizer_fingerprint": parts.tokenizer.tokenizer.fingerprint,
        "versions": {name: version(name) for name in ("byheart", "torch", "transformers")},
    }
    write_text_atomic(result.out_dir / RESULT, json.dumps(content, indent=2) + "\n")
