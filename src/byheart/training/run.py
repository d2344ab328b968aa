"""Train a model from a config: data, model, checkpoints, result."""

import json
import logging
import os
import shutil
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments

from byheart.adapters.memory_model import MemoryModel
from byheart.config import load_config, save_config, write_text_atomic
from byheart.data.corpus import TokenizedCorpus
from byheart.data.rows import SegmentDataset
from byheart.data.token_cache import TokenizeProgress
from byheart.data.tokenize import Tokenizer
from byheart.evaluation.perplexity import evaluate_perplexity
from byheart.training.arguments import training_arguments
from byheart.training.callbacks import TrainEvent
from byheart.training.checkpoint import (
    CONFIG,
    MODEL,
    RESULT,
    Checkpoint,
    explained_write_errors,
    find_start,
    has_checkpoints,
    remove_checkpoints,
)
from byheart.training.config import SHORT_LOSS, EvaluationConfig, RunConfig
from byheart.training.data import RunData, load_data, make_dataset
from byheart.training.identity import FREE_TO_CHANGE, run_identity
from byheart.training.lora import merge_lora
from byheart.training.metrics import MetricsFile, plain_number
from byheart.training.models import (
    TrainableModel,
    make_model,
    model_identity,
    require_model,
    save_trained,
)
from byheart.training.trainer import METRICS, MemoryTrainer, require_trainable

__all__ = ["TrainResult", "refuse_existing", "train"]

_LOGGER = logging.getLogger(__name__)
_TOKENIZER, _TENSORBOARD = "tokenizer", "tensorboard"
# what a run without a checkpoint may be begun again with: the vocabulary is not known to a recipe
_FREE = ("name", "evaluation", "model.vocab_size", *(f"training.{one}" for one in FREE_TO_CHANGE))


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainResult:
    """What a finished run has made."""

    out_dir: Path
    """The run's directory."""
    model_dir: Path
    """The trained model, for `byheart.models.checkpoint.load_model`."""
    steps: int
    """Optimizer steps done, those before an interruption included."""
    resumed_from: int | None
    """Step of the checkpoint that this call went on from; `None` if it started at 0."""
    num_parameters: int
    """Parameters of the model."""
    num_tokens: int | None
    """Tokens read; `None` if `metrics.jsonl` was removed after the last step."""
    loss: float
    """Last logged loss: mean over the predicted tokens, nats. NaN if `metrics.jsonl` was removed
    after the last step."""
    evaluation: Mapping[str, float]
    """Metrics of the last evaluation; empty without validation documents."""
    evaluation_before: Mapping[str, float]
    """Metrics before the first step; empty unless `evaluation.short_tokens` asks for them."""


def train(
    run: RunConfig,
    out_dir: str | os.PathLike[str],
    *,
    resume: bool = False,
    overwrite: bool = False,
    on_event: Callable[[TrainEvent], None] | None = None,
) -> TrainResult:
    """Train a model, or go on where a killed or stopped run was.

    The directory then holds `config.json` (everything resolved), `tokenizer/`, `metrics.jsonl`,
    `checkpoint-N/`, `model/`, `result.json` and, if TensorBoard is installed, `tensorboard/`. Under
    `torchrun` each process takes its part of the rows; all must see the same directory.

    Args:
        run: What to do.
        out_dir: Directory of the run.
        resume: Go on from the newest complete checkpoint, or at step 0 if the run was killed before
            its first. The result is that of a run that was never interrupted. `max_steps`, and how
            often to log, evaluate and save, may differ.
        overwrite: Remove the run that is in the directory.
        on_event: Called in the main process for each log line, evaluation and checkpoint.

    Returns:
        What was made.

    Raises:
        ValueError: If the directory holds a run and it is not said what to do with it.
        CheckpointError: If there is nothing to resume, it belongs to another
            run, or something cannot be written.
        TrainingInterruptedError: If SIGINT or SIGTERM came; a checkpoint is written.
    """
    if resume and overwrite:
        msg = "resume and overwrite cannot both be True. Choose one."
        raise ValueError(msg)
    out = Path(out_dir)
    arguments = training_arguments(run.training, out)
    with arguments.main_process_first(local=False):
        # the others come when the main process has begun the directory
        if arguments.process_index == 0 and not resume and not overwrite:
            refuse_existing(out)
        parts = _prepare(run, out, arguments, resume=resume, on_event=on_event)
        if arguments.process_index == 0:
            _begin_directory(out, parts)
    model = _train(parts, arguments, on_event)
    fingerprint = parts.data.tokenizer.fingerprint
    if arguments.process_index == 0:
        with explained_write_errors(out / MODEL):
            save_trained(model, out / MODEL, tokenizer_fingerprint=fingerprint)
    arguments.distributed_state.wait_for_everyone()
    result = _result(out, model, parts)
    if arguments.process_index == 0:
        with explained_write_errors(out / RESULT):
            _write_result(result, parts)
        if on_event is not None:
            values = {"model_dir": str(result.model_dir), "loss": result.loss, **result.evaluation}
            steps = result.steps
            on_event(TrainEvent(kind="end", step=steps, max_steps=steps, values=values))
    return result


@dataclass(frozen=True, kw_only=True, slots=True)
class _Parts:
    run: RunConfig
    """The run with everything resolved."""
    data: RunData
    dataset: SegmentDataset
    checkpoint: Checkpoint | None
    """Where to go on."""
    model: TrainableModel
    evaluate: Callable[[TrainableModel], dict[str, float]] | None
    """Measures the model, if there are validation documents."""


def _prepare(
    run: RunConfig,
    out: Path,
    arguments: TrainingArguments,
    *,
    resume: bool,
    on_event: Callable[[TrainEvent], None] | None,
) -> _Parts:
    """Make everything and check that it fits together, changing nothing in the directory.

    Returns:
        What the run is made of.
    """
    is_main = arguments.process_index == 0
    require_model(run)
    checkpoint = find_start(out, run, _FREE) if resume else None
    data = load_data(
        run.data,
        out / _TOKENIZER if not is_main or (resume and _saves_same_tokenizer(run, out)) else None,
        _tokenize_events(run, on_event) if on_event is not None and is_main else None,
    )
    vocab_size = data.tokenizer.vocab_size
    if run.model is not None:
        if checkpoint is None:
            run.model.resolve(vocab_size)
        run = replace(run, model=replace(run.model, vocab_size=vocab_size))
    dataset = make_dataset(run, data.train, arguments.world_size)
    described = model_identity(run, vocab_size)
    if checkpoint is not None:
        identity = run_identity(
            described, dataset, run.training,
            tokenizer_fingerprint=data.tokenizer.fingerprint, num_processes=arguments.world_size,
        )  # fmt: skip
        checkpoint.require_same(identity)
        _check_steps(checkpoint, run, out)
    torch.manual_seed(run.training.seed)
    model = make_model(run, vocab_size)
    evaluate = _tried_evaluation(run, data, model)
    require_trainable(model, dataset, run.training, arguments.world_size)
    return _Parts(
        run=run, data=data, dataset=dataset, checkpoint=checkpoint, model=model, evaluate=evaluate
    )


def _train(
    parts: _Parts,
    arguments: TrainingArguments,
    on_event: Callable[[TrainEvent], None] | None,
) -> TrainableModel:
    run, tokenizer, model = parts.run, parts.data.tokenizer, parts.model
    trainer = MemoryTrainer(
        model,
        parts.dataset,
        run.training,
        arguments,
        identity=model_identity(run, tokenizer.vocab_size),
        tokenizer_fingerprint=tokenizer.fingerprint,
        evaluate=parts.evaluate,
        on_event=on_event,
    )
    trainer.evaluates_first = run.evaluation.short_tokens is not None
    trainer.train(parts.checkpoint)
    if isinstance(model, MemoryModel):
        merge_lora(model)
    return model


def _tried_evaluation(
    run: RunConfig, data: RunData, model: TrainableModel
) -> Callable[[TrainableModel], dict[str, float]] | None:
    if data.validation is None:
        if run.training.evaluate_every is not None:
            _LOGGER.warning("training.evaluate_every has no effect without data.validation.")
        return None
    lengths = data.validation.lengths[: run.evaluation.max_documents]
    longest = min(int(lengths.max()), run.evaluation.max_tokens or sys.maxsize) - 1
    model.require_document_fits(longest, "Cut them with evaluation.max_tokens.")
    # two tokens of each setting: what cannot be measured is refused now, not hours later
    first = replace(run.evaluation, max_documents=1, max_tokens=2)
    _evaluation(data.validation, data.tokenizer, first)(model)
    return _evaluation(data.validation, data.tokenizer, run.evaluation)


def _evaluation(
    corpus: TokenizedCorpus, tokenizer: Tokenizer, config: EvaluationConfig
) -> Callable[[TrainableModel], dict[str, float]]:
    def evaluate(model: TrainableModel) -> dict[str, float]:
        result = evaluate_perplexity(
            model,
            corpus,
            memory_sizes=(None,) if config.memory_sizes is None else config.memory_sizes,
            rows=config.rows,
            max_documents=config.max_documents,
            max_tokens_per_document=config.max_tokens,
            tokenizer=tokenizer,
        )
        metrics = {}
        if config.short_tokens is not None:
            short = evaluate_perplexity(
                model,
                corpus,
                memory_sizes=(0,),
                rows=config.rows,
                max_documents=config.max_documents,
                max_tokens_per_document=min(config.short_tokens, config.max_tokens or sys.maxsize),
                tokenizer=tokenizer,
            )
            metrics[SHORT_LOSS] = short.measurements[0].nats_per_token
        for measurement in result.measurements:
            suffix = f"memory_{measurement.memory_size}"
            metrics[f"nats_per_token/{suffix}"] = measurement.nats_per_token
            metrics[f"perplexity/{suffix}"] = measurement.perplexity
            if measurement.bits_per_byte is not None:
                metrics[f"bits_per_byte/{suffix}"] = measurement.bits_per_byte
        return metrics

    return evaluate


def _tokenize_events(
    run: RunConfig, on_event: Callable[[TrainEvent], None]
) -> Callable[[TokenizeProgress], None]:
    def report(progress: TokenizeProgress) -> None:
        max_steps = run.training.max_steps
        on_event(TrainEvent(kind="tokenize", step=0, max_steps=max_steps, values=asdict(progress)))

    return report


def refuse_existing(out: Path) -> None:
    """Refuse to begin a run where there is one.

    Args:
        out: Directory of the run.

    Raises:
        ValueError: If it holds anything of a run.
    """
    names = (CONFIG, METRICS, MODEL, RESULT)
    found = [name for name in names if (out / name).exists()]
    if found or has_checkpoints(out):
        msg = (
            f"{out} must not hold a run already, found {found[0] if found else 'checkpoints'}. Go "
            "on with resume=True (--resume), replace it with overwrite=True (--overwrite), or "
            "choose another directory."
        )
        raise ValueError(msg)


def _begin_directory(out: Path, parts: _Parts) -> None:
    with explained_write_errors(out / CONFIG, is_begun=parts.checkpoint is not None):
        out.mkdir(parents=True, exist_ok=True)
        (out / RESULT).unlink(missing_ok=True)
        for left_by_a_kill in out.glob(f".{MODEL}.*"):
            shutil.rmtree(left_by_a_kill, ignore_errors=True)
        if parts.checkpoint is None:
            # only what a run writes: the directory may be somebody's home
            remove_checkpoints(out)
            for name in (METRICS, CONFIG):
                (out / name).unlink(missing_ok=True)
            for name in (MODEL, _TOKENIZER, _TENSORBOARD):
                shutil.rmtree(out / name, ignore_errors=True)
            parts.data.tokenizer.save(out / _TOKENIZER)
        save_config(parts.run, out / CONFIG)


def _saves_same_tokenizer(run: RunConfig, out: Path) -> bool:
    try:
        saved = load_config(RunConfig, out / CONFIG)
    except (OSError, TypeError, ValueError):
        return False
    return saved.data.tokenizer == run.data.tokenizer


def _check_steps(checkpoint: Checkpoint, run: RunConfig, out: Path) -> None:
    max_steps = run.training.max_steps
    if checkpoint.step > max_steps:
        msg = (
            f"max_steps must be at least the {checkpoint.step} steps of {checkpoint.path}, got "
            f"{max_steps}. Raise max_steps."
        )
        raise ValueError(msg)
    before = load_config(RunConfig, out / CONFIG).training.max_steps
    if before != max_steps and run.training.schedule in ("cosine", "linear"):
        _LOGGER.warning(
            "max_steps was %d and is %d: from here on the learning rate follows the %s schedule of "
            "the new length.",
            before,
            max_steps,
            run.training.schedule,
        )


def _result(out: Path, model: TrainableModel, parts: _Parts) -> TrainResult:
    lines = MetricsFile(out / METRICS).read()
    logs = [line for line in lines if "loss" in line]
    if not logs:
        # the model is whole, so a log that somebody removed must not keep it from being used
        _LOGGER.warning("%s has no log line: loss and tokens read are unknown.", out / METRICS)
        logs = [{"loss": "nan", "num_tokens": None}]
    evaluations = [line for line in lines if "loss" not in line]

    def metrics_of(line: Mapping[str, Any]) -> dict[str, float]:
        return {
            name.removeprefix("evaluation/"): float(value)
            for name, value in line.items()
            if name != "step"
        }

    return TrainResult(
        out_dir=out,
        model_dir=out / MODEL,
        steps=parts.run.training.max_steps,
        resumed_from=None if parts.checkpoint is None else parts.checkpoint.step,
        num_parameters=sum(parameter.numel() for parameter in model.parameters()),
        num_tokens=logs[-1]["num_tokens"],
        loss=float(logs[-1]["loss"]),
        evaluation=metrics_of(evaluations[-1]) if evaluations else {},
        evaluation_before=(
            metrics_of(evaluations[0]) if evaluations and evaluations[0]["step"] == 0 else {}
        ),
    )


def _write_result(result: TrainResult, parts: _Parts) -> None:
    content = {
        "name": parts.run.name,
        "steps": result.steps,
        "num_parameters": result.num_parameters,
        "num_tokens": result.num_tokens,
        "loss": plain_number(result.loss),
        "evaluation": _plain(result.evaluation),
        "evaluation_before": _plain(result.evaluation_before),
        "num_documents": parts.data.train.num_documents,
        "documents_fingerprint": parts.data.train.fingerprint,
        "tokenizer_fingerprint": parts.data.tokenizer.fingerprint,
        "versions": {name: version(name) for name in ("byheart", "torch", "transformers")},
    }
    write_text_atomic(result.out_dir / RESULT, json.dumps(content, indent=2) + "\n")


def _plain(metrics: Mapping[str, float]) -> dict[str, Any]:
    return {name: plain_number(value) for name, value in metrics.items()}
