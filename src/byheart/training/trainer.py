"""Train a model on document-ordered rows: the Hugging Face Trainer with a memory per row."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import TrainingArguments

from byheart.config import to_dict
from byheart.data.rows import SegmentDataset, collate
from byheart.errors import CheckpointError
from byheart.memory.state import MemoryState, NewEntries
from byheart.models.decoder import Decoder
from byheart.ops.losses import IGNORED
from byheart.training.callbacks import TrainEvent
from byheart.training.checkpoint import MODEL, Checkpoint, load_memory, save_memory
from byheart.training.compiled import compiled, keep_addresses, require_compilable
from byheart.training.config import TrainingConfig
from byheart.training.identity import check_fit, run_identity
from byheart.training.metrics import memory_fill
from byheart.training.models import TrainableModel, load_model_weights, save_trained
from byheart.training.optim import make_optimizer
from byheart.training.resumable import METRICS, ResumableTrainer
from byheart.training.wrapper import TrainedModel

__all__ = ["METRICS", "MemoryTrainer", "require_trainable"]


class MemoryTrainer(ResumableTrainer):
    """The Hugging Face Trainer for models whose memory outlives a batch.

    Each process keeps one memory state per accumulated micro-batch, because micro-batches are rows,
    not consecutive segments. Forward reads a state; after backward the new entries are committed.
    The loss is the mean over the predicted tokens of the whole optimizer step, whatever part of
    them a process or micro-batch has. Checkpoints hold the states, and resuming repeats an
    uninterrupted run: on a CPU bit for bit.

    Of a model with layers of PEFT, checkpoints hold the weights that learn; at the end it still has
    those layers.

    Args:
        model: The model; it is trained in place.
        dataset: The segments of all rows in the order of the steps.
        config: How to train.
        arguments: What `training_arguments` made of it; names the directory of the run.
        identity: What the model is, for checkpoints; `None` for its config.
        tokenizer_fingerprint: Identifies the tokenizer of the dataset, for checkpoints.
        evaluate: Measures the model, with memory of its own, in each process. It must not change
            anything. Gives metrics by name.
        on_event: Called in the main process for each log line, evaluation and checkpoint.

    Raises:
        ValueError: If dataset, model and config do not fit together.
    """

    def __init__(
        self,
        model: TrainableModel,
        dataset: SegmentDataset,
        config: TrainingConfig,
        arguments: TrainingArguments,
        *,
        identity: Mapping[str, Any] | None = None,
        tokenizer_fingerprint: str = "",
        evaluate: Callable[[TrainableModel], Mapping[str, float]] | None = None,
        on_event: Callable[[TrainEvent], None] | None = None,
    ) -> None:
        require_trainable(model, dataset, config, arguments.world_size)
        super().__init__(
            TrainedModel(model, config.compile),
            dataset,
            config,
            arguments,
            collate=collate,
            evaluates=evaluate is not None,
            on_event=on_event,
        )
        self.trained = model
        self.dataset = dataset
        self.memory: list[MemoryState] = []
        """What the rows of this process have read, one state per micro-batch."""
        self._new_entries: NewEntries | None = None
        # never into CUDA graphs, which would overwrite the state that it returns
        self._commit = compiled(_commit, "no" if config.compile == "no" else "default")
        self._micro_batch = 0
        self._tokenizer_fingerprint = tokenizer_fingerprint
        self._measure = evaluate
        self.evaluates_first = False
        """Whether to measure once before the first step, too."""
        self._model_identity = _identity(model) if identity is None else identity

    def identity(self) -> dict[str, Any]:
        """Return what the run depends on, as checkpoints keep it."""
        return run_identity(
            self._model_identity, self.dataset, self.training_config,
            tokenizer_fingerprint=self._tokenizer_fingerprint, num_processes=self.args.world_size,
        )  # fmt: skip

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
        self.memory[self._micro_batch] = self._commit(state, self._new_entries)
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
        state = self.memory[self._micro_batch]
        if not self.dataset.plan.is_one_pass:
            # no row is idle: each begins a segment or a document
            state = self.memory[self._micro_batch] = state.at_segment_start(
                inputs["document_start"]
            )
        output = model(**inputs, state=state)
        assert output.token_losses is not None
        self._new_entries = output.new_entries
        nats = output.token_losses.sum()
        predicted = (inputs["labels"] != IGNORED).sum()
        self._meter.add(nats, predicted, inputs["num_tokens"].sum())
        loss: Tensor = nats / num_items_in_batch.clamp(min=1) * self.args.world_size
        return loss

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Build the optimizer with the parameter groups.

        Args:
            model: Not used: the model is not sharded.

        Returns:
            The optimizer.
        """
        if self.optimizer is None:
            self.optimizer = make_optimizer(self.trained, self.training_config)
        return self.optimizer

    def evaluate(self, **_: Any) -> dict[str, float]:
        """Measure the model; training goes on as if nothing had happened.

        A checkpoint of the same step is written first: an evaluation that fails must not cost the
        steps since the one before. Resuming makes the evaluation up.

        Returns:
            Metrics, their names preceded by `evaluation/`.
        """
        assert self._measure is not None
        if self.control.should_save:
            self._save_checkpoint(self.model, None)
            self.control = self.callback_handler.on_save(self.args, self.state, self.control)
        with self._undisturbed(self.trained):
            measured = self._measure(self.trained)
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
        metrics |= self.trained.memory_metrics()
        fill = memory_fill(self.memory)
        if fill is not None:
            shares = torch.tensor(fill, dtype=torch.float64, device=self.args.device)
            metrics["memory_fill"] = self._add_up(shares).item() / self.args.world_size
        self._write("log", metrics)

    def _save_parts(self, path: Path) -> None:
        save_memory(path, self.memory, self._meter.state(), self.args.process_index)

    def _positions(self) -> Any:
        return self.dataset.positions_at(self.state.global_step - 1)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        if self.args.should_save:
            save_trained(
                self.trained,
                Path(output_dir or self.out_dir) / MODEL,
                tokenizer_fingerprint=self._tokenizer_fingerprint,
            )

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        load_model_weights(self.trained, Path(resume_from_checkpoint) / MODEL)

    def _begin(self) -> None:
        self.memory = self._empty_memory()
        keep_addresses(self.memory, self.training_config.compile)
        self._micro_batch = 0

    def _restore(self, checkpoint: Checkpoint) -> None:
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
        keep_addresses(self.memory, self.training_config.compile)
        self._meter.load_state(sums)
        self._micro_batch = 0

    def _start(self) -> None:
        if self.evaluates_first and self._measure is not None:
            self.evaluate()

    def _catch_up(self, checkpoint: Checkpoint) -> None:
        step, lines = checkpoint.step, self.metrics.read()
        is_evaluated = any(line["step"] == step and "loss" not in line for line in lines)
        is_owed = self._flow.evaluates_after(step) and not is_evaluated
        # all have read the lines before one writes another
        self.accelerator.wait_for_everyone()
        if is_owed or self._is_done(step):
            load_model_weights(self.trained, checkpoint.path / MODEL)
        if is_owed:
            self.state.global_step = step
            self.evaluate()

    def _is_done(self, step: int) -> bool:
        return step >= self.training_config.max_steps

    def _empty_memory(self) -> list[MemoryState]:
        rows, count = self.training_config.rows_per_device, self.training_config.accumulation_steps
        return [self.trained.new_state(rows) for _ in range(count)]


def require_trainable(
    model: TrainableModel, dataset: SegmentDataset, config: TrainingConfig, num_processes: int
) -> None:
    """Refuse what a `MemoryTrainer` cannot train.

    Args:
        model: The model.
        dataset: The segments of all rows in the order of the steps.
        config: How to train.
        num_processes: Processes of the run.

    Raises:
        ValueError: If they do not fit together.
    """
    check_fit(model.memory_layout.segment_length, dataset, config, num_processes)
    require_compilable(model.memory_layout, config.compile)
    longest = int(dataset.plan.document_tokens.max()) - 1
    model.require_document_fits(longest, "Cut documents with data.max_document_tokens.")


def _identity(model: TrainableModel) -> dict[str, Any]:
    if isinstance(model, Decoder):
        return to_dict(model.config)
    return {"memory": to_dict(model.memory_config), "config": model.config.to_diff_dict()}


def _commit(state: MemoryState, new: NewEntries) -> MemoryState:
    return state.commit(new)
