"""Train a decoder on document-ordered rows: the Hugging Face Trainer with a memory per row."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import Trainer, TrainerControl, TrainingArguments, set_seed
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME
from transformers.trainer_callback import PrinterCallback

from byheart.data.rows import SegmentDataset, collate
from byheart.errors import CheckpointError
from byheart.memory.state import MemoryState, NewEntries
from byheart.models.checkpoint import load_weights, save_model
from byheart.models.decoder import Decoder, DecoderOutput
from byheart.ops.losses import IGNORED
from byheart.training.callbacks import (
    ConsoleCallback,
    FlowCallback,
    TensorboardCallback,
    TrainEvent,
)
from byheart.training.checkpoint import (
    MODEL,
    Checkpoint,
    checkpoint_directory,
    clear_checkpoint,
    complete_checkpoint,
    explained_write_errors,
    load_memory,
    remove_checkpoints,
    rotate_checkpoints,
    save_memory,
)
from byheart.training.config import TrainingConfig
from byheart.training.identity import check_fit, run_identity
from byheart.training.metrics import Meter, MetricsFile, memory_fill
from byheart.training.optim import make_optimizer
from byheart.training.stop import StopSignals, TrainingInterruptedError
from byheart.training.wrapper import TrainedDecoder

__all__ = ["METRICS", "MemoryTrainer"]

METRICS = "metrics.jsonl"


class MemoryTrainer(Trainer):  # type: ignore[misc]
    """The Hugging Face Trainer for models whose memory outlives a batch.

    Each process keeps one memory state per accumulated micro-batch, because micro-batches are rows,
    not consecutive segments. Forward reads a state; after backward the new entries are committed.
    The loss is the mean over the predicted tokens of the whole optimizer step, whatever part of
    them a process or micro-batch has. Checkpoints hold the states, and resuming repeats an
    uninterrupted run: on a CPU bit for bit.

    Args:
        decoder: The model; it is trained in place.
        dataset: The segments of all rows in the order of the steps.
        config: How to train.
        arguments: What `training_arguments` made of it; names the directory of the run.
        tokenizer_fingerprint: Identifies the tokenizer of the dataset, for checkpoints.
        evaluate: Measures the decoder, with memory of its own, in each process. It must not change
            anything. Gives metrics by name.
        on_event: Called in the main process for each log line, evaluation and checkpoint.

    Raises:
        ValueError: If dataset, model and config do not fit together.
    """

    control: TrainerControl
    optimizer: torch.optim.Optimizer | None

    def __init__(
        self,
        decoder: Decoder,
        dataset: SegmentDataset,
        config: TrainingConfig,
        arguments: TrainingArguments,
        *,
        tokenizer_fingerprint: str = "",
        evaluate: Callable[[Decoder], Mapping[str, float]] | None = None,
        on_event: Callable[[TrainEvent], None] | None = None,
    ) -> None:
        check_fit(decoder.config, dataset, config, arguments.world_size)
        super().__init__(
            model=TrainedDecoder(decoder),
            args=arguments,
            data_collator=collate,
            train_dataset=dataset,
        )
        self.decoder = decoder
        self.dataset = dataset
        self.training_config = config
        self.out_dir = Path(arguments.output_dir)
        self.metrics = MetricsFile(self.out_dir / METRICS)
        self.memory: list[MemoryState] = []
        """What the rows of this process have read, one state per micro-batch."""
        self._new_entries: NewEntries | None = None
        self._micro_batch = 0
        self._meter = Meter(self.args.device)
        self._tokenizer_fingerprint = tokenizer_fingerprint
        self._measure = evaluate
        self._on_event = on_event
        self._stop = StopSignals()
        self._resumed_from: int | None = None
        self._displays: list[ConsoleCallback | TensorboardCallback] = [ConsoleCallback()]
        if TensorboardCallback.is_available():
            self._displays.append(TensorboardCallback(self.out_dir / "tensorboard"))
        # it prints to standard output
        self.remove_callback(PrinterCallback)
        self._flow = FlowCallback(
            config, evaluates=evaluate is not None, should_stop=self._should_stop
        )
        for callback in (self._flow, *self._displays):
            self.add_callback(callback)

    def identity(self) -> dict[str, Any]:
        """Return what the run depends on, as checkpoints keep it."""
        return run_identity(
            self.decoder.config, self.dataset, self.training_config,
            tokenizer_fingerprint=self._tokenizer_fingerprint, num_processes=self.args.world_size,
        )  # fmt: skip

    def train(self, resume_from_checkpoint: Checkpoint | None = None) -> None:
        """Train to the last step.

        Args:
            resume_from_checkpoint: Where to go on; `None` starts at step 0. That of the last step
                only gives the decoder its weights.

        Raises:
            CheckpointError: If the checkpoint belongs to another run, or one cannot be written.
            TrainingInterruptedError: If SIGINT or SIGTERM came; the checkpoint is written.
        """
        checkpoint = resume_from_checkpoint
        if checkpoint is None:
            # with one seed for all, rows of different processes would share their dropout
            set_seed(self.training_config.seed + self.args.process_index)
            self.memory = self._empty_memory()
            self._meter = Meter(self.args.device)
        else:
            self._restore(checkpoint)
        self._micro_batch = 0
        self._resumed_from = None if checkpoint is None else checkpoint.step
        if self.is_world_process_zero():
            self.metrics.truncate(0 if checkpoint is None else checkpoint.step)
        self._emit("start", {"resumed_from": self._resumed_from})
        if checkpoint is not None:
            self._catch_up(checkpoint)
            if checkpoint.step == self.training_config.max_steps:
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
        if step < self.training_config.max_steps:
            msg = (
                f"Training was stopped by {self._stop.received or 'a signal'} after step {step}; "
                f"{checkpoint_directory(self.out_dir, step)} is complete. "
                "Continue with resume=True (--resume)."
            )
            raise TrainingInterruptedError(msg)

    def training_step(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        num_items_in_batch: Tensor | None = None,
    ) -> Float[Tensor, ""]:
        """Run forward and backward, then commit what was read.

        Args:
            model: The model, perhaps wrapped.
            inputs: One micro-batch.
            num_items_in_batch: Predicted tokens of the optimizer step, in all processes.

        Returns:
            The detached loss.
        """
        loss: Tensor = super().training_step(model, inputs, num_items_in_batch)
        assert self._new_entries is not None
        state = self.memory[self._micro_batch]
        self.memory[self._micro_batch] = state.commit(self._new_entries)
        self._new_entries = None
        self._micro_batch = (self._micro_batch + 1) % len(self.memory)
        return loss

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | None = None,
    ) -> Float[Tensor, ""]:
        """Compute the micro-batch's part of the loss of the optimizer step.

        Args:
            model: The model, perhaps wrapped.
            inputs: One micro-batch.
            return_outputs: Must be `False`.
            num_items_in_batch: Predicted tokens of the optimizer step, in all processes.

        Returns:
            Summed loss of the micro-batch over `num_items_in_batch`, times the number of processes
            because gradients are averaged over them.
        """
        assert not return_outputs
        assert num_items_in_batch is not None
        output: DecoderOutput = model(**inputs, state=self.memory[self._micro_batch])
        assert output.token_losses is not None
        self._new_entries = output.new_entries
        nats = output.token_losses.sum()
        predicted = (inputs["labels"] != IGNORED).sum()
        self._meter.add(nats, predicted, inputs["num_tokens"].sum())
        loss: Tensor = nats / num_items_in_batch.clamp(min=1) * self.args.world_size
        return loss

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Build the optimizer with the decoder's parameter groups.

        Args:
            model: Not used: the decoder is not sharded.

        Returns:
            The optimizer.
        """
        if self.optimizer is None:
            self.optimizer = make_optimizer(self.decoder, self.training_config)
        return self.optimizer

    def evaluate(self, **_: Any) -> dict[str, float]:
        """Measure the decoder; training goes on as if nothing had happened.

        A checkpoint of the same step is written first: an evaluation that fails must not cost the
        steps since the one before. Resuming makes the evaluation up.

        Returns:
            Metrics, their names preceded by `evaluation/`.
        """
        assert self._measure is not None
        if self.control.should_save:
            self._save_checkpoint(self.model, None)
            self.control = self.callback_handler.on_save(self.args, self.state, self.control)
        device = self.args.device
        generators = [device] if device.type == "cuda" else []
        self.decoder.eval()
        try:
            with (
                self._meter.paused(),
                torch.no_grad(),
                torch.random.fork_rng(generators),
                self.accelerator.autocast(),
            ):
                measured = self._measure(self.decoder)
        finally:
            self.decoder.train()
        logs = {f"evaluation/{name}": value for name, value in measured.items()}
        self._write("evaluation", logs)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, logs)
        return logs

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Replace the Trainer's numbers by exact ones, and write them everywhere.

        Args:
            logs: What the Trainer would log.
            start_time: Not used.
        """
        # the summary at the end covers this session only, so it would differ after a resume
        if "train_runtime" in logs:
            return
        metrics = self._meter.take(self._add_up)
        metrics |= {"learning_rate": logs["learning_rate"], "gradient_norm": logs["grad_norm"]}
        metrics |= self.decoder.memory_metrics()
        fill = memory_fill(self.memory)
        if fill is not None:
            shares = torch.tensor(fill, dtype=torch.float64, device=self.args.device)
            metrics["memory_fill"] = self._add_up(shares).item() / self.args.world_size
        self._write("log", metrics)

    def _write(self, kind: Any, metrics: dict[str, float]) -> None:
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
            save_memory(path, self.memory, self._meter.state(), self.args.process_index)
            wait()
            if is_main:
                # the lines up to here are part of what the checkpoint continues
                self.metrics.sync()
                positions = self.dataset.positions_at(self.state.global_step - 1)
                complete_checkpoint(path, self.identity(), positions)
                if self._resumed_from is not None:
                    # damaged ones that were passed over would take the place of good ones
                    remove_checkpoints(
                        self.out_dir, after=self._resumed_from, but=self.state.global_step
                    )
                    self._resumed_from = None
                rotate_checkpoints(self.out_dir, self.training_config.keep_checkpoints)
            wait()
        self._emit("checkpoint", {"path": str(path)})

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        if self.args.should_save:
            save_model(
                self.decoder,
                Path(output_dir or self.out_dir) / MODEL,
                tokenizer_fingerprint=self._tokenizer_fingerprint,
            )

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        load_weights(self.decoder, Path(resume_from_checkpoint) / MODEL)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        assert self.optimizer is not None
        # older Trainers cannot load on several CPU processes; torch moves the tensors itself
        for part, name in ((self.optimizer, OPTIMIZER_NAME), (self.lr_scheduler, SCHEDULER_NAME)):
            saved = torch.load(Path(checkpoint) / name, map_location="cpu", weights_only=True)
            part.load_state_dict(saved)

    def _restore(self, checkpoint: Checkpoint) -> None:
        checkpoint.require_same(self.identity())
        read = self.dataset.positions_at(checkpoint.step - 1)
        if checkpoint.positions() != read:
            msg = (
                f"Checkpoint {checkpoint.path} has rows that read other segments than the schedule "
                "of this run. Start anew with another directory or overwrite=True."
            )
            raise CheckpointError(msg)
        self.memory, sums = load_memory(
            checkpoint.path, self._empty_memory(), self.args.process_index
        )
        self._meter.load_state(sums)

    def _catch_up(self, checkpoint: Checkpoint) -> None:
        step, lines = checkpoint.step, self.metrics.read()
        is_evaluated = any(line["step"] == step and "loss" not in line for line in lines)
        is_owed = self._flow.evaluates_after(step) and not is_evaluated
        # all have read the lines before one writes another
        self.accelerator.wait_for_everyone()
        if is_owed or step == self.training_config.max_steps:
            load_weights(self.decoder, checkpoint.path / MODEL)
        if is_owed:
            self.state.global_step = step
            self.evaluate()

    def _empty_memory(self) -> list[MemoryState]:
        rows, count = self.training_config.rows_per_device, self.training_config.accumulation_steps
        return [self.decoder.new_state(rows) for _ in range(count)]

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
