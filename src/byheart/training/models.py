"""The models that a run on documents can train, and what it asks of them."""

from pathlib import Path
from typing import Any, TypeAlias

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from byheart.adapters.loading import load_transformer
from byheart.adapters.memory_model import MemoryModel
from byheart.adapters.memory_saving import first_adapter, load_attached_weights, save_attached
from byheart.config import to_dict
from byheart.errors import CheckpointError
from byheart.models.checkpoint import load_weights, save_model
from byheart.models.decoder import Decoder
from byheart.training.config import PretrainedConfig, RunConfig
from byheart.training.lora import add_lora, load_learned, save_learned

__all__ = [
    "TrainableModel",
    "load_model_weights",
    "make_model",
    "model_identity",
    "require_model",
    "save_trained",
]

TrainableModel: TypeAlias = Decoder | MemoryModel
"""What a run can train."""


def make_model(run: RunConfig, vocab_size: int) -> TrainableModel:
    """Make the model of a run, as it is before the first step.

    Args:
        run: The run.
        vocab_size: Tokens of its tokenizer.

    Returns:
        The model.

    Raises:
        CheckpointError: If a pretrained model has layers of PEFT.
    """
    if run.pretrained is None:
        assert run.model is not None
        return Decoder(run.model.resolve(vocab_size))
    transformer = _transformer(run.pretrained)
    name = first_adapter(transformer)
    if name is not None:
        msg = (
            f"The model in {run.pretrained.path} must have no adapter of PEFT, got one, such as "
            f"{name}. Merge it with merge_and_unload() and save the model without it."
        )
        raise CheckpointError(msg)
    model = MemoryModel(transformer, run.pretrained.memory)
    if run.pretrained.gradient_checkpointing:
        model.gradient_checkpointing_enable()
    if run.pretrained.trains == "lora":
        add_lora(model.model, run.pretrained)
        for weight in model.memory_parameters():
            weight.requires_grad_()
    elif run.pretrained.trains != "all":
        kept = model.memory_parameters()
        if run.pretrained.trains == "memory_layers":
            blocks = [model.layers.block_of(model.model, layer) for layer in model.memories()]
            kept += [weight for block in blocks for weight in block.parameters()]
        _freeze_all_but(model, kept)
    return model


def require_model(run: RunConfig) -> None:
    """Refuse a pretrained model that is not there, before its tokenizer is missed.

    Args:
        run: The run.
    """
    if run.pretrained is None:
        return
    config = _config(run.pretrained)
    if run.pretrained.trains == "lora":
        # without memory for its weights
        with torch.device("meta"):
            add_lora(AutoModelForCausalLM.from_config(config), run.pretrained)


def model_identity(run: RunConfig, vocab_size: int) -> dict[str, Any]:
    """Describe the model of a run, for checkpoints, without making it.

    Args:
        run: The run.
        vocab_size: Tokens of its tokenizer.

    Returns:
        Nested dictionaries that JSON can hold.

    Raises:
        ValueError: If the tokenizer has more tokens than the model.
    """
    if run.pretrained is None:
        assert run.model is not None
        return to_dict(run.model.resolve(vocab_size))
    description = to_dict(run.pretrained)
    # the folder may be moved; what is trained is in the checkpoint
    del description["path"]
    # bit for bit the same gradients
    del description["gradient_checkpointing"]
    if run.pretrained.trains != "lora":
        for name in ("lora_rank", "lora_alpha", "lora_modules"):
            del description[name]
    config = _config(run.pretrained)
    known = config.get_text_config().vocab_size
    if vocab_size > known:
        msg = (
            f"The tokenizer must have at most the {known} tokens of {run.pretrained.path}, got "
            f"{vocab_size}. Set data.tokenizer to the one that belongs to the model."
        )
        raise ValueError(msg)
    return {**description, "config": config.to_diff_dict()}


def save_trained(model: TrainableModel, directory: Path, *, tokenizer_fingerprint: str) -> None:
    """Write a model to a directory, replaced only when the new one is complete.

    Args:
        model: What to save; of one with layers of PEFT, what learns.
        directory: Where to.
        tokenizer_fingerprint: Identifies the tokenizer that made the model's tokens.
    """
    if isinstance(model, Decoder):
        save_model(model, directory, tokenizer_fingerprint=tokenizer_fingerprint)
    elif first_adapter(model) is not None:
        save_learned(model, directory, tokenizer_fingerprint)
    else:
        save_attached(
            model, directory, with_model=True, tokenizer_fingerprint=tokenizer_fingerprint
        )


def load_model_weights(model: TrainableModel, directory: Path) -> None:
    """Give a model the weights that `save_trained` wrote, in place.

    Args:
        model: A model of the same shape.
        directory: Where the weights are.
    """
    if isinstance(model, Decoder):
        load_weights(model, directory)
    elif first_adapter(model) is not None:
        load_learned(model, directory)
    else:
        load_attached_weights(model, directory)


def _transformer(config: PretrainedConfig) -> Any:
    # a checkpoint may be in half precision, in which most steps of an optimizer are lost
    if not config.from_scratch:
        return load_transformer(config.path, dtype=torch.float32)
    return AutoModelForCausalLM.from_config(_config(config), dtype=torch.float32)


def _config(config: PretrainedConfig) -> Any:
    if not (Path(config.path) / "config.json").is_file():
        problem = (
            "it has no config.json" if Path(config.path).is_dir() else "there is no such folder"
        )
        msg = (
            "pretrained.path (--model) must be a folder with config.json and weights of a Hugging "
            f"Face model, got {config.path}: {problem}. Check the path."
        )
        raise CheckpointError(msg)
    try:
        return AutoConfig.from_pretrained(config.path, local_files_only=True)
    except (OSError, ValueError) as error:
        msg = f"{config.path} cannot be read as a Hugging Face model: {error}"
        raise CheckpointError(msg) from error


def _freeze_all_but(model: MemoryModel, kept: list[Any]) -> None:
    learning = {id(weight) for weight in kept}
    for weight in model.parameters():
        weight.requires_grad_(id(weight) in learning)
