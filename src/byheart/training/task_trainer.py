"""Learn a task on documents that grow: the Hugging Face Trainer with a curriculum."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import Dataset
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from byheart.adapters.recurrent import RecurrentMemory
from byheart.data.tasks import Task, collate
from byheart.evaluation.segments import count_right
from byheart.memory.files import load_directory, save_directory
from byheart.training.burn_in import draw_documents
from byheart.training.callbacks import TrainEvent
from byheart.training.checkpoint import (
    MODEL,
    Checkpoint,
    explained_write_errors,
    load_memory,
    save_memory,
)
from byheart.training.curriculum import Curriculum, CurriculumConfig
from byheart.training.resumable import ResumableTrainer
from byheart.training.stages import stage_directory
from byheart.training.task_config import TaskRunConfig

__all__ = ["CURRICULUM", "TaskTrainer", "load_curriculum"]

CURRICULUM = "curriculum.json"
_AVERAGE = "average"


class TaskTrainer(ResumableTrainer):
    """Trains a model with recurrent memory on documents made as they are needed.

    Row r of step s reads the document s * rows + r, in a length that the curriculum chooses for the
    step. So seed and evaluations decide everything, and resuming repeats an uninterrupted run: on a
    CPU bit for bit.

    Args:
        memory_model: The model; it is trained in place.
        train: Documents to learn from.
        validation: Documents with held-out facts.
        run: How to train.
        arguments: What `training_arguments` made of it; names the directory of the run.
        identity: What the run depends on, for checkpoints.
        on_event: Called in the main process for each log line, evaluation and checkpoint.
    """

    lr_scheduler: LambdaLR | None

    def __init__(
        self,
        memory_model: RecurrentMemory,
        train: Task,
        validation: Task,
        run: TaskRunConfig,
        arguments: TrainingArguments,
        *,
        identity: dict[str, Any],
        on_event: Callable[[TrainEvent], None] | None = None,
    ) -> None:
        config = run.training.resolve(run.curriculum)
        num_rows = config.rows_per_device * config.accumulation_steps * arguments.world_size
        super().__init__(
            memory_model,
            _Indices(config.max_steps * num_rows),
            config,
            arguments,
            collate=_index_batch,
            evaluates=True,
            on_event=on_event,
        )
        self.memory_model = memory_model
        self.task, self.validation, self.run = train, validation, run
        has_lessons = run.curriculum.lessons
        self._lesson = (train.lesson(), validation.lesson()) if has_lessons else None
        self.curriculum = Curriculum(config=run.curriculum)
        """How far the run has come."""
        self._average: AveragedModel | None = None
        self._identity = identity
        self._num_rows = num_rows
        self.add_callback(_LastStep(self))

    @property
    def best_model(self) -> RecurrentMemory:
        """What has been learned: the model, or the running average of its weights."""
        return self.memory_model if self._average is None else cast(Any, self._average.module)

    @property
    def _documents(self) -> tuple[Task, Task]:
        # to learn from, and with held-out facts
        if self._lesson is not None and self.curriculum.lesson:
            return self._lesson
        return self.task, self.validation

    def average_weights(self) -> None:
        """Take the weights after a step into their running average, if there is one."""
        if self._average is not None:
            self._average.update_parameters(self.memory_model)

    def identity(self) -> dict[str, Any]:
        """Return what the run depends on, as checkpoints keep it."""
        return self._identity

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | None = None,
    ) -> Float[Tensor, ""]:
        """Make the documents of a micro-batch and read them.

        They are made here and not by the data loader, which is ahead of the curriculum.

        Args:
            model: The model, perhaps wrapped.
            inputs: Indices of the documents.
            return_outputs: Must be `False`.
            num_items_in_batch: Not used: all micro-batches have the same number of documents.

        Returns:
            Mean loss of the documents.
        """
        assert not return_outputs
        samples, state, num_read_before = draw_documents(
            self.memory_model,
            self._documents[0],
            inputs["index"].tolist(),
            self.curriculum,
            step=self.state.global_step,
            seed=self.run.training.seed,
            precision=self.run.training.precision,
        )
        batch = {name: part.to(self.args.device) for name, part in collate(samples).items()}
        out = model(**batch, state=state)
        loss: Tensor = out.loss
        count = torch.tensor(len(samples), device=self.args.device)
        self._meter.add(loss * count, count, batch["attention_mask"].sum() + num_read_before)
        if out.write_share is not None:
            self._meter.add_write_share(out.write_share)
        cost = self.run.training.write_cost
        has_cost = cost > 0 and self.curriculum.saturated_at is not None
        return loss + cost * out.write_share if has_cost else loss

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Build AdamW; biases, norms, embeddings and memory tokens do not decay.

        Args:
            model: Not used: the model is not sharded.

        Returns:
            The optimizer.
        """
        if self.optimizer is None:
            config = self.training_config
            self.optimizer = torch.optim.AdamW(
                _parameter_groups(self.memory_model, config.weight_decay),
                lr=config.learning_rate,
                betas=config.betas,
                fused=True if self.args.device.type == "cuda" else None,
            )
        return self.optimizer

    def create_scheduler(
        self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None
    ) -> LambdaLR:
        """Let the curriculum decide the rate.

        Args:
            num_training_steps: Not used: the run may end earlier.
            optimizer: The optimizer; `None` for the Trainer's own.

        Returns:
            The schedule.
        """
        optimizer = optimizer or self.optimizer
        if self.lr_scheduler is None:
            assert optimizer is not None
            training = self.run.training

            def share(step: int) -> float:
                return self.curriculum.rate_share(
                    step, training.schedule, training.warmup_steps, training.length_decay
                )

            self.lr_scheduler = LambdaLR(optimizer, share)
        return self.lr_scheduler

    def evaluate(self, **_: Any) -> dict[str, float | int]:
        """Measure the accuracy of the stage on held-out facts, and move the curriculum.

        Each process reads its part of the documents.

        Returns:
            Metrics, their names preceded by `evaluation/`.
        """
        samples, num_segments = self.run.curriculum.evaluate_samples, self.curriculum.stage
        mine = range(self.args.process_index, samples, self.args.world_size)
        with self._undisturbed(self.memory_model):
            right = count_right(
                self.best_model.eval(),
                self._documents[1],
                num_segments,
                mine,
                rows=self.run.evaluation.rows,
                precision=self.run.training.precision,
            )
        total = self._add_up(torch.tensor(float(right), device=self.args.device)).item()
        accuracy = total / samples
        before, lesson = len(self.curriculum.reached), self.curriculum.lesson
        self.curriculum = self.curriculum.record(self.state.global_step, accuracy)
        # the rate was set before, and a run resumed from here sets it by the new curriculum
        self._renew_rate()
        is_reached = len(self.curriculum.reached) > before and not lesson
        if self.run.curriculum.keep_stages and is_reached:
            self._keep_stage(num_segments)
        logs: dict[str, float | int] = {
            "evaluation/num_segments": num_segments,
            "evaluation/accuracy": accuracy,
            "evaluation/stages_reached": len(self.curriculum.reached),
        }
        self._write("evaluation", logs)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, logs)
        if self._is_done(self.state.global_step):
            self.control.should_save = self.control.should_training_stop = True
        return logs

    def _keep_stage(self, num_segments: int) -> None:
        # before the checkpoint of this step: a run that goes on from there has the stage, and one
        # that goes on from an earlier checkpoint comes here again
        path = stage_directory(self.out_dir, num_segments)
        if self.is_world_process_zero():
            with self._meter.paused(), explained_write_errors(path):
                self.best_model.save_pretrained(path, with_model=True)

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
        lengths = {"stage": self.curriculum.stage, "longest": self.curriculum.longest}
        self._write("log", metrics | lengths)

    def _start(self) -> None:
        """Stages are evaluated when their steps are due, and nothing before."""

    def _begin(self) -> None:
        self.curriculum = Curriculum(config=self.run.curriculum)
        decay = self.run.training.average_decay
        if decay > 0:
            average = get_ema_multi_avg_fn(decay)  # type: ignore[no-untyped-call]
            self._average = AveragedModel(self.memory_model, multi_avg_fn=average)

    def _restore(self, checkpoint: Checkpoint) -> None:
        self._begin()
        if self._average is not None:
            _load_weights(self._average.module, checkpoint.path / _AVERAGE)
            # the first update of an average takes the weights as they are
            self._average.n_averaged.fill_(checkpoint.step)
        self.curriculum = load_curriculum(checkpoint, self.run.curriculum)
        _, sums = load_memory(checkpoint.path, [], self.args.process_index)
        self._meter.load_state(sums)

    def _catch_up(self, checkpoint: Checkpoint) -> None:
        # evaluations come before the checkpoint of their step, so none is owed
        if self._is_done(checkpoint.step):
            self.state.global_step = checkpoint.step
            self._load_from_checkpoint(str(checkpoint.path))

    def _is_done(self, step: int) -> bool:
        return self.curriculum.outcome(step) != "running"

    def _save_parts(self, path: Path) -> None:
        save_memory(path, [], self._meter.state(), self.args.process_index)
        if self.is_world_process_zero():
            text = json.dumps({"evaluations": self.curriculum.to_list()}, indent=1)
            (path / CURRICULUM).write_text(text, encoding="utf-8")
            if self._average is not None:
                _save_weights(self._average.module, path / _AVERAGE)

    def _positions(self) -> Any:
        first = (self.state.global_step - 1) * self._num_rows
        return list(range(first, first + self._num_rows))

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        if self.args.should_save:
            _save_weights(self.memory_model, Path(output_dir or self.out_dir) / MODEL)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        _load_weights(self.memory_model, Path(resume_from_checkpoint) / MODEL)


def _save_weights(model: nn.Module, path: Path) -> None:
    save_directory(path, dict(model.named_parameters()), {})


def _load_weights(model: nn.Module, path: Path) -> None:
    weights, _ = load_directory(path)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(weights[name])


def load_curriculum(checkpoint: Checkpoint, config: CurriculumConfig) -> Curriculum:
    """Read how far a run had come.

    Args:
        checkpoint: Of the run.
        config: Its stages.

    Returns:
        The curriculum at the step of the checkpoint.
    """
    saved = json.loads((checkpoint.path / CURRICULUM).read_text(encoding="utf-8"))
    return Curriculum.from_list(config, saved["evaluations"])


class _LastStep(TrainerCallback):  # type: ignore[misc]
    """Keeps the Trainer's last step at the curriculum's: there the run logs, saves and stops.

    And after each step the average of the weights.
    """

    def __init__(self, trainer: TaskTrainer) -> None:
        self._trainer = trainer

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        state.max_steps = self._trainer.curriculum.last_step

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        self._trainer.average_weights()

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        state.max_steps = self._trainer.curriculum.last_step


class _Indices(Dataset[dict[str, int]]):
    """The numbers of the documents of a run."""

    def __init__(self, length: int) -> None:
        self._length = length

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> dict[str, int]:
        return {"index": index}


def _index_batch(items: list[dict[str, int]]) -> dict[str, Tensor]:
    return {"index": torch.tensor([item["index"] for item in items])}


def _parameter_groups(model: RecurrentMemory, weight_decay: float) -> list[dict[str, Any]]:
    embeddings = {
        id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)
    }
    embeddings.add(id(model.memory.memory))
    decayed: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for parameter in model.parameters():
        if parameter.requires_grad:
            is_matrix = parameter.dim() >= 2 and id(parameter) not in embeddings
            (decayed if is_matrix else others).append(parameter)
    return [
        {"params": decayed, "weight_decay": weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
