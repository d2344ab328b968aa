"""When to log, evaluate, save and stop; and where the numbers are shown."""

import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeRemainingColumn,
)
from rich.text import Text
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from byheart.training.config import TrainingConfig

__all__ = ["ConsoleCallback", "FlowCallback", "TensorboardCallback", "TrainEvent"]


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainEvent:
    """Something that a program around the training may want to know."""

    kind: Literal["tokenize", "start", "log", "evaluation", "checkpoint", "end"]
    """What happened."""
    step: int
    """Optimizer steps done."""
    max_steps: int
    """Optimizer steps of the whole run."""
    values: Mapping[str, Any]
    """Metrics by name, the `path` of a checkpoint, or how far tokenizing has come."""


class FlowCallback(TrainerCallback):  # type: ignore[misc]
    """Decides after each step what happens next.

    The Trainer's own rules are switched off: on resume they are read from the checkpoint, so that
    another `log_every` or `save_every` would have no effect.

    Args:
        config: How often what happens.
        evaluates: Whether there is something to evaluate on.
        should_stop: Whether the user asked for the end; all processes must get the same answer.
    """

    def __init__(
        self, config: TrainingConfig, *, evaluates: bool, should_stop: Callable[[], bool]
    ) -> None:
        self.config = config
        self.evaluates = evaluates
        self.should_stop = should_stop

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Set the flags of the Trainer."""
        step, config = state.global_step, self.config
        is_last = step >= state.max_steps
        stops = self.should_stop()
        control.should_log = is_last or step % config.log_every == 0
        control.should_evaluate = self.evaluates_after(step)
        control.should_save = is_last or stops or step % config.save_every == 0
        control.should_training_stop = is_last or stops

    def evaluates_after(self, step: int) -> bool:
        """Tell whether an evaluation follows a step.

        Returns:
            `True` if one does.
        """
        every = self.config.evaluate_every
        is_due = step >= self.config.max_steps or (every is not None and step % every == 0)
        return self.evaluates and is_due


class ConsoleCallback(TrainerCallback):  # type: ignore[misc]
    """Shows a progress bar with rate and time left on a terminal, and log lines everywhere.

    All of it goes to standard error: standard output belongs to results.
    """

    def __init__(self) -> None:
        self._console = Console(stderr=True, soft_wrap=True, highlight=False, markup=False)
        self._progress: Progress | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Open the bar, at the step that training goes on from."""
        if state.is_world_process_zero and self._console.is_terminal:
            self._progress = Progress(
                TextColumn("training"),
                BarColumn(),
                MofNCompleteColumn(),
                _RateColumn(),
                TimeRemainingColumn(),
                console=self._console,
            )
            self._progress.add_task("training", total=state.max_steps, completed=state.global_step)
            self._progress.start()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Move the bar."""
        if self._progress is not None:
            # a run may learn on its way when it ends
            self._progress.update(
                self._progress.task_ids[0], completed=state.global_step, total=state.max_steps
            )

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: Mapping[str, Any],
        **_: Any,
    ) -> None:
        """Write a line above the bar."""
        if state.is_world_process_zero:
            shown = "  ".join(
                f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}"
                for name, value in logs.items()
            )
            self._console.print(f"step {state.global_step}  {shown}")

    def close(self) -> None:
        """Close the bar, also after an error."""
        if self._progress is not None:
            self._progress.stop()
            self._progress = None


class _RateColumn(ProgressColumn):
    def render(self, task: Task) -> Text:
        return Text("" if task.speed is None else f"{task.speed:.3g} steps/s")


class TensorboardCallback(TrainerCallback):  # type: ignore[misc]
    """Writes all metrics for TensorBoard, if it is installed.

    Args:
        directory: Where to.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._writer: Any = None

    @staticmethod
    def is_available() -> bool:
        """Tell whether TensorBoard is installed (`byheart[track]`).

        Returns:
            `True` if it is.
        """
        return importlib.util.find_spec("tensorboard") is not None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Open the log; what it holds of steps that will be done again is hidden."""
        if state.is_world_process_zero:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(str(self._directory), purge_step=state.global_step + 1)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: Mapping[str, Any],
        **_: Any,
    ) -> None:
        """Write the numbers."""
        if self._writer is not None:
            for name, value in logs.items():
                self._writer.add_scalar(name, value, state.global_step)
            self._writer.flush()

    def close(self) -> None:
        """Close the log, also after an error."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None
