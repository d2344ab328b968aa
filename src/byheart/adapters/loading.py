"""Load Hugging Face models from a directory."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch
import transformers
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel

from byheart.errors import CheckpointError

ModelT = TypeVar("ModelT")


def load_saved_along(directory: Path, model_type: str, load: Callable[[Path], ModelT]) -> ModelT:
    """Load the model that memory was saved along with.

    Args:
        directory: Where it is.
        model_type: What kind of model it is, for the message.
        load: Reads it.

    Returns:
        The model.

    Raises:
        CheckpointError: If the memory was saved alone.
    """
    if not directory.is_dir():
        msg = (
            f"{directory.parent} holds the memory alone, not the {model_type} model that it "
            "belongs to. Pass that model."
        )
        raise CheckpointError(msg)
    return load(directory)


def load_config_of(source: str | os.PathLike[str]) -> PreTrainedConfig:
    """Read the config of a model, and nothing else of it.

    Args:
        source: Folder with the model's config.json, or its name on the Hugging Face hub.

    Returns:
        The config.

    Raises:
        CheckpointError: If there is no such config.
    """
    try:
        config: PreTrainedConfig = AutoConfig.from_pretrained(os.fspath(source))
    except (OSError, ValueError) as error:
        msg = f"{os.fspath(source)} cannot be read as a Hugging Face model: {error}"
        raise CheckpointError(msg) from error
    return config


def count_layers(config: PreTrainedConfig) -> int | None:
    """Read from its config how many layers a model has.

    Args:
        config: Of the model.

    Returns:
        Their number; `None` if it does not say.
    """
    count = getattr(config.get_text_config(decoder=True), "num_hidden_layers", None)
    return count if isinstance(count, int) else None


def load_transformer(
    directory: str | os.PathLike[str], *, dtype: torch.dtype | None = None
) -> PreTrainedModel:
    """Load a model as the class that its config names.

    Args:
        directory: A Hugging Face checkpoint on this machine.
        dtype: Precision of the weights; `None` for the checkpoint's own. What an optimizer changes
            should be float32: most steps are smaller than what bfloat16 can add to a weight.

    Returns:
        The model, in evaluation mode.

    Raises:
        CheckpointError: If it cannot be read, names no class that transformers has, or lacks
            weights of it.
    """
    if not Path(directory).is_dir():
        msg = f"There is no model directory {directory}. Check the path."
        raise CheckpointError(msg)
    try:
        config = AutoConfig.from_pretrained(directory, local_files_only=True)
        name = (config.architectures or ["none"])[0]
        model_class = getattr(transformers, name, None)
        if model_class is None:
            msg = f"config.json in {directory} must name a class of transformers, got {name}."
            raise CheckpointError(msg)
        model, report = model_class.from_pretrained(
            directory,
            local_files_only=True,
            dtype="auto" if dtype is None else dtype,
            output_loading_info=True,
        )
    except (OSError, ValueError) as error:
        msg = f"{directory} cannot be read as a Hugging Face model: {error}"
        raise CheckpointError(msg) from error
    if report["missing_keys"]:
        # transformers would draw them at random
        msg = (
            f"{directory} must hold all weights of its {name}, but lacks "
            f"{len(report['missing_keys'])}, such as {min(report['missing_keys'])}. Save the whole "
            "model again, with its head and without layers of PEFT."
        )
        raise CheckpointError(msg)
    assert isinstance(model, PreTrainedModel)
    return model.eval()
