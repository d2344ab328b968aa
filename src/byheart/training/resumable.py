"""The Hugging Face Trainer for runs that can be killed at any moment and resumed exactly."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import Trainer, TrainerControl, TrainingArguments, set_seed
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME
from transformers.trainer_callback import PrinterCallback

from byheart.training.callbacks import (
    ConsoleCallback,
    FlowCallback,
    TensorboardCallback,
    TrainEvent,
)
from byheart.training.checkpoint import (
    Checkpoint,
    checkpoint_directory,
    clear_checkpoint,
    complete_checkpoint,
    explained_write_errors,
    remove_checkpoints,
    rotate_checkpoints,
)
from byheart.training.config import TrainingConfig
from byheart.training.metrics import Meter, MetricsFile
from byheart.training.stop import StopSignals, TrainingInterruptedError

__all__ = ["METRICS", "ResumableTrainer"]

METRICS = "metrics.jsonl"


class ResumableTrainer(Trainer, ABC):  # type: ignore[misc]
    """The Hugging Face Trainer, with byheart's checkpoints, log and signals around it.

    What a run has besides weights, optimizer, schedule and random states is up to the subclass: it
    says what the run depends on, and writes and reads the rest.

    Args:
        model: What is trained, in place.
        dataset: Its items in the order of the steps.
        config: How to train.
        arguments: What `training_arguments` made of it; names the directory of the run.
        collate: Makes a batch of items.
        evaluates: Whether there is something to evaluate on.
        on_event: Called in the main process for each log line, evaluation and checkpoint.
    """

    control: TrainerControl
    optimizer: torch.optim.Optimizer | None

    def __init__(
        self,
        model: nn.Module,
        dataset: Dataset[Any],
        config: TrainingConfig,
        arguments: TrainingArguments,
        *,
        collate: Callable[[list[Any]], dict[str, Tensor]],
        evaluates: bool,
        on_event: Callable[[TrainEvent], None] | None,
    ) -> None:
        super().__init__(model=model, args=arguments, data_collator=collate, train_dataset=dataset)
        self.training_config = config
        self.out_dir = Path(arguments.output_dir)
        self.metrics = MetricsFile(self.out_dir / METRICS)
        self._meter = Meter(self.args.device)
        self._on_event = on_event
        self._stop = StopSignals()
        self._resumed_from: int | None = None
        self._displays: list[ConsoleCallback | TensorboardCallback] = [ConsoleCallback()]
        if TensorboardCallback.is_available():
            self._displays.append(TensorboardCallback(self.out_dir / "tensorboard"))
        # it prints to standard output
        self.remove_callback(PrinterCallback)
        self._flow = FlowCallback(config, evaluates=evaluates, should_stop=self._should_stop)
        for callback in (self._flow, *self._displays):
            self.add_callback(callback)

    @abstractmethod
    def identity(self) -> dict[str, Any]:
        """Return what the run depends on, as checkpoints keep it."""

    @abstractmethod
    def _begin(self) -> None:
        """Prepare for step 0."""

    @abstractmethod
    def _start(self) -> None:
        """Do what comes before the first step."""

    @abstractmethod
    def _restore(self, checkpoint: Checkpoint) -> None:
        """Take over what `_save_parts` has written."""

    @abstractmethod
    def _catch_up(self, checkpoint: Checkpoint) -> None:
        """Do what the run still owes for the step of the checkpoint."""

    @abstractmethod
    def _is_done(self, step: int) -> bool:
        """Tell whether no step follows."""

    @abstractmethod
    def _save_parts(self, path: Path) -> None:
        """Write what this process has besides weights, optimizer and random states."""

    @abstractmethod
    def _positions(self) -> Any:
        """Return what each row has read last."""

    def train(self, resume_from_checkpoint: Checkpoint | None = None) -> None:
        """Train to the last step.

        Args:
            resume_from_checkpoint: Where to go on; `None` starts at step 0. That of the last step
                only gives the model its weights.

        Raises:
            CheckpointError: If the checkpoint belongs to another run, or one cannot be written.
            TrainingInterruptedError: If SIGINT or SIGTERM came; the checkpoint is written.
        """
        checkpoint = resume_from_checkpoint
        if checkpoint is None:
            # with one seed for all, rows of different processes would share their dropout; NumPy
            # takes none above 32 bits
            set_seed((self.training_config.seed + self.args.process_index) % 2**32)
            self._meter = Meter(self.args.device)
            self._begin()
        else:
            checkpoint.require_same(self.identity())
            self._restore(checkpoint)
        self._resumed_from = None if checkpoint is None else checkpoint.step
        if self.is_world_process_zero():
            self.metrics.truncate(0 if checkpoint is None else checkpoint.step)
        self._emit("start", {"resumed_from": self._resumed_from})
        if checkpoint is None:
            self._start()
        else:
            self._catch_up(checkpoint)
            if self._is_done(checkpoint.step):
                return
        self._meter.restart_clock()
        try:
            with self._stop:
                super().train(
                    resume_from_checkpoint=None if checkpoint is None else str(checkpoint.path)
                )
        finally:
            for display in self._displays:
                display.close()
        step = self.state.global_step
        if not self._is_done(step):
            msg = (
                f"Training was stopped by {self._stop.received or 'a signal'} after step {step}; "
                f"{checkpoint_directory(self.out_dir, step)} is complete. "
                "Continue with resume=True (--resume)."
            )
            raise TrainingInterruptedError(msg)

    @contextmanager
    def _undisturbed(self, model: nn.Module) -> Iterator[None]:
        """Evaluate a model as if nothing had happened to its training."""
        device = self.args.device
        generators = [device] if device.type == "cuda" else []
        model.eval()
        try:
            with (
                self._meter.paused(),
                torch.no_grad(),
                torch.random.fork_rng(generators),
                self.accelerator.autocast(),
            ):
                yield
        finally:
            model.train()

    def _write(self, kind: Any, metrics: Mapping[str, float | int]) -> None:
        with explained_write_errors(self.metrics.path):
            if self.is_world_process_zero():
                self.metrics.append(self.state.global_step, metrics)
            self.control = self.callback_handler.on_log(
                self.args, self.state, self.control, metrics
            )
        self._emit(kind, metrics)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        path = checkpoint_directory(self.out_dir, self.state.global_step)
        wait, is_main = self.accelerator.wait_for_everyone, self.is_world_process_zero()
        with self._meter.paused(), explained_write_errors(path):
            if is_main:
                clear_checkpoint(path)
            wait()
            super()._save_checkpoint(model, trial)
            self._save_parts(path)
            wait()
            if is_main:
                # the lines up to here are part of what the checkpoint continues
                self.metrics.sync()
                complete_checkpoint(path, self.identity(), self._positions())
                if self._resumed_from is not None:
                    # damaged ones that were passed over would take the place of good ones
                    remove_checkpoints(
                        self.out_dir, after=self._resumed_from, but=self.state.global_step
                    )
                    self._resumed_from = None
                rotate_checkpoints(self.out_dir, self.training_config.keep_checkpoints)
            wait()
        self._emit("checkpoint", {"path": str(path)})

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        assert self.optimizer is not None
        # older Trainers cannot load on several CPU processes; torch moves the tensors itself
        for part, name in ((self.optimizer, OPTIMIZER_NAME), (self.lr_scheduler, SCHEDULER_NAME)):
            saved = torch.load(Path(checkpoint) / name, map_location="cpu", weights_only=True)
            part.load_state_dict(saved)
        # the length of the schedule may be another one now
        self._renew_rate()

    def _renew_rate(self) -> None:
        """Let a change of the schedule hold from the next step on."""
        schedule = self.lr_scheduler
        if schedule is None or self.optimizer is None:  # not trained yet
            return
        rates = [
            base * share(schedule.last_epoch)
            for base, share in zip(schedule.base_lrs, schedule.lr_lambdas, strict=True)
        ]
        for group, rate in zip(self.optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
        # what is logged
        schedule._last_lr = rates

    def _should_stop(self) -> bool:
        received = self._stop.received is not None
        if self.args.world_size == 1:
            return received
        # processes that stopped at different steps would wait for each other for ever
        flag = torch.tensor(float(received), device=self.args.device)
        return bool(self._add_up(flag) > 0)

    def _add_up(self, tensor: Tensor) -> Tensor:
        return self.accelerator.reduce(tensor, reduction="sum")  # type: ignore[no-any-return]

    def _emit(self, kind: Any, values: Mapping[str, Any]) -> None:
        if self._on_event is not None and self.is_world_process_zero():
            max_steps = self.training_config.max_steps
            step = self.state.global_step
            self._on_event(TrainEvent(kind=kind, step=step, max_steps=max_steps, values=values))
