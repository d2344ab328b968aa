"""The settings of the Hugging Face Trainer that a run needs."""

import logging
from pathlib import Path

import torch
from transformers import TrainingArguments

from byheart.training.config import TrainingConfig
from byheart.training.optim import schedule_arguments

__all__ = ["training_arguments"]

_LOGGER = logging.getLogger(__name__)


def training_arguments(config: TrainingConfig, out_dir: Path) -> TrainingArguments:
    """Translate a config for the Trainer. This also joins the process group, if there is one.

    Args:
        config: How to train.
        out_dir: Directory of the run.

    Returns:
        The arguments of `MemoryTrainer`.

    Raises:
        ValueError: If the directory of the run is a file, or in one.
    """
    existing = next(path for path in (out_dir, *out_dir.absolute().parents) if path.exists())
    if not existing.is_dir():
        msg = (
            f"out_dir (--out) must be a directory, and {existing} is a file. Choose another place."
        )
        raise ValueError(msg)
    on_gpu = torch.cuda.is_available()
    arguments = TrainingArguments(
        output_dir=str(out_dir),
        per_device_train_batch_size=config.rows_per_device,
        gradient_accumulation_steps=config.accumulation_steps,
        max_steps=config.max_steps,
        learning_rate=config.learning_rate,
        max_grad_norm=config.max_gradient_norm,
        bf16=config.precision == "bfloat16",
        seed=config.seed,
        use_cpu=not on_gpu,
        dataloader_pin_memory=on_gpu,
        # the dataset is in the order in which rows read their documents
        train_sampling_strategy="sequential",
        remove_unused_columns=False,
        # every parameter takes part in every step
        ddp_find_unused_parameters=False,
        # decided by FlowCallback
        logging_strategy="no",
        save_strategy="no",
        eval_strategy="no",
        # the Trainer would write the mean of earlier losses instead of NaN
        logging_nan_inf_filter=False,
        report_to="none",
        disable_tqdm=True,
        **schedule_arguments(config),
    )
    if arguments.n_gpu > 1:
        _LOGGER.warning(
            "One process uses one GPU, and %d are visible. For all of them start one process each: "
            "torchrun --nproc-per-node %d ...",
            arguments.n_gpu,
            arguments.n_gpu,
        )
        # otherwise the Trainer splits batches over threads, and rows would lose their memory
        arguments._n_gpu = 1
    return arguments
