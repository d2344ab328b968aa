"""Encoder, tokenizer and memory of a run that learns a task."""

import os
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    ModernBertConfig,
    ModernBertForSequenceClassification,
    PreTrainedModel,
)

from byheart.adapters.recurrent import RecurrentMemory
from byheart.data.tasks import Split, Task, train_task_tokenizer
from byheart.data.tokenize import Tokenizer, load_tokenizer
from byheart.errors import CheckpointError
from byheart.training.task_config import EncoderConfig, TaskRunConfig

__all__ = ["TaskTokenizer", "make_memory_model", "make_task", "make_tokenizer"]


@dataclass(frozen=True, kw_only=True, slots=True)
class TaskTokenizer:
    """A tokenizer, and the special tokens of the encoder."""

    tokenizer: Tokenizer
    """Makes the tokens of the documents."""
    start_id: int
    """BERT's `[CLS]`."""
    separator_id: int
    """BERT's `[SEP]`."""


def make_tokenizer(run: TaskRunConfig, saved: Path | None = None) -> TaskTokenizer:
    """Learn the vocabulary of a run, or load the pretrained encoder's.

    Args:
        run: The run.
        saved: Where the run has saved its tokenizer: it is not learned again.

    Returns:
        The tokenizer. A learned one leaves its special tokens to the encoder, whose embedding has
        three more entries: `[CLS]`, `[SEP]` and padding.

    Raises:
        CheckpointError: If there is no pretrained encoder, or its tokenizer has no `[CLS]` or
            `[SEP]`.
    """
    if run.encoder is not None:
        if saved is not None:
            tokenizer: Tokenizer = load_tokenizer(saved)
        else:
            config = run.task.resolve(run.segment_length, "train")
            tokenizer = train_task_tokenizer(config, run.encoder.vocab_size)
        size = tokenizer.vocab_size
        return TaskTokenizer(tokenizer=tokenizer, start_id=size, separator_id=size + 1)
    assert run.pretrained is not None
    if not Path(run.pretrained).is_dir():
        msg = (
            f"pretrained must be a folder as save_pretrained leaves it, with config.json and its "
            f"tokenizer, and there is none at {run.pretrained}. Check the path."
        )
        raise CheckpointError(msg)
    tokenizer = load_tokenizer(run.pretrained)
    special = AutoTokenizer.from_pretrained(run.pretrained, local_files_only=True)
    if special.cls_token_id is None or special.sep_token_id is None:
        msg = (
            f"The tokenizer in {run.pretrained} must have [CLS] and [SEP], or what stands for "
            "them. Use an encoder of BERT's family."
        )
        raise CheckpointError(msg)
    return TaskTokenizer(
        tokenizer=tokenizer, start_id=special.cls_token_id, separator_id=special.sep_token_id
    )


def make_task(
    run: TaskRunConfig,
    tokenizer: Tokenizer,
    *,
    is_training: bool,
    seed: int = 0,
    background: str | os.PathLike[str] | None = None,
) -> Task:
    """Make the documents of a run.

    Args:
        run: The run.
        tokenizer: Its tokenizer.
        is_training: Whether those to learn from, or those with held-out facts.
        seed: Another seed gives other documents.
        background: Documents around the facts; `None` for those of the run.

    Returns:
        The documents.

    Raises:
        DataError: If the background cannot be used.
    """
    split: Split = "train" if is_training else "validation"
    config = run.task.resolve(run.segment_length, split)
    if background is not None:
        config = replace(config, background=os.fspath(background))
    return Task(config, tokenizer, split=split, seed=seed)


def make_memory_model(
    run: TaskRunConfig, tokenizer: TaskTokenizer, num_labels: int
) -> RecurrentMemory:
    """Make encoder and memory with first weights that the seed decides.

    Args:
        run: The run.
        tokenizer: Its tokenizer.
        num_labels: Answers to choose from.

    Returns:
        The model, in evaluation mode.
    """
    torch.manual_seed(run.training.seed)
    if run.encoder is not None:
        encoder = _scratch(run.encoder, run.window, tokenizer.tokenizer.vocab_size, num_labels)
    else:
        encoder = _pretrained(run.pretrained, run.pretrained_dropout, num_labels)
    config = run.memory.resolve(
        run.segment_length,
        run.task.form,
        start_ids=(tokenizer.start_id,),
        separator_ids=(tokenizer.separator_id,),
    )
    return RecurrentMemory(encoder, config).eval()


def _pretrained(path: str | None, dropout: float | None, num_labels: int) -> PreTrainedModel:
    config = AutoConfig.from_pretrained(path, num_labels=num_labels, local_files_only=True)
    if dropout is not None:
        # `hidden_dropout_prob`, `attention_dropout`, `mlp_dropout`, ..., as each family calls them
        for name, value in config.to_dict().items():
            if "dropout" in name and type(value) in (int, float):
                setattr(config, name, dropout)
    return AutoModelForSequenceClassification.from_pretrained(
        # a checkpoint may be in half precision
        path,
        config=config,
        local_files_only=True,
        dtype=torch.float32,
    )


def _scratch(
    config: EncoderConfig, window: int, vocab_size: int, num_labels: int
) -> PreTrainedModel:
    shared = {
        "vocab_size": vocab_size + 3,
        # its embedding never learns, so it must be no token of the documents
        "pad_token_id": vocab_size + 2,
        "hidden_size": config.embed_dim,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "intermediate_size": config.hidden_dim,
        "max_position_embeddings": window,
        "num_labels": num_labels,
        "initializer_range": config.init_std,
    }
    if config.architecture == "bert":
        return BertForSequenceClassification(
            BertConfig(
                **shared,
                hidden_dropout_prob=config.dropout,
                attention_probs_dropout_prob=config.dropout,
            )
        )
    # its defaults are ids of its own vocabulary
    special = dict.fromkeys(("bos_token_id", "cls_token_id"), vocab_size)
    special |= dict.fromkeys(("eos_token_id", "sep_token_id"), vocab_size + 1)
    return ModernBertForSequenceClassification(
        ModernBertConfig(
            **shared,
            **special,
            layer_types=["sliding_attention"] * config.num_local_layers
            + ["full_attention"] * (config.num_layers - config.num_local_layers),
            local_attention=2 * config.local_reach,
            classifier_pooling=config.pooling,
            embedding_dropout=config.dropout,
            mlp_dropout=config.dropout,
            attention_dropout=config.dropout,
        )
    )
