"""LoRA: small matrices that learn beside those of a pretrained model, made by PEFT."""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from byheart.adapters.memory_model import MemoryModel
from byheart.adapters.memory_saving import first_adapter
from byheart.errors import CheckpointError
from byheart.memory.files import load_directory, save_directory
from byheart.models.fingerprint import model_fingerprint
from byheart.training.config import PretrainedConfig

__all__ = ["add_lora", "load_learned", "merge_lora", "save_learned"]

_FROZEN = "frozen_fingerprint"


def add_lora(model: nn.Module, config: PretrainedConfig) -> None:
    """Put LoRA on a model of Hugging Face, in place; nothing else of it learns then.

    Args:
        model: The model, with or without memory.
        config: Rank, scale and which layers.

    Raises:
        ImportError: If PEFT is not installed.
        ValueError: If there are no such layers.
    """
    try:
        import peft
    except ImportError as error:
        msg = "pretrained.trains='lora' needs the peft package: pip install 'byheart[peft]'."
        raise ImportError(msg) from error
    modules = config.lora_modules
    settings = peft.LoraConfig(
        r=config.lora_rank,
        lora_alpha=config.lora_alpha,
        target_modules=None if modules is None else list(modules),
        # GPT-2's layers hold their matrix the other way round
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in model.modules()),
    )
    try:
        peft.inject_adapter_in_model(settings, model)
    except ValueError as error:
        named = "left to PEFT" if modules is None else f"{list(modules)}"
        msg = (
            "pretrained.lora_modules must name linear layers of the model, as q_proj and v_proj "
            f"are in a Llama, got {named}: {error}"
        )
        raise ValueError(msg) from error
    _check_layers(model, modules)


def merge_lora(memory_model: MemoryModel) -> None:
    """Add what LoRA has learned to the weights, and take it off, in place.

    Args:
        memory_model: A model with memory, and perhaps with LoRA.
    """
    model = memory_model.model
    if first_adapter(model) is None:
        return
    for name, layer in list(_adapters(model)):
        layer.merge()
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, layer.get_base_layer())
    if hasattr(model, "peft_config"):
        del model.peft_config


def save_learned(memory_model: MemoryModel, directory: Path, tokenizer_fingerprint: str) -> None:
    """Write the weights that learn, replacing older ones only when they are complete.

    Args:
        memory_model: A model of which a part learns.
        directory: Where to.
        tokenizer_fingerprint: Identifies the tokenizer that made the model's tokens.
    """
    content = {
        _FROZEN: _frozen_fingerprint(memory_model),
        "tokenizer_fingerprint": tokenizer_fingerprint,
    }
    save_directory(directory, _learned(memory_model), content)


def load_learned(memory_model: MemoryModel, directory: Path) -> None:
    """Give a model the weights that `save_learned` wrote, in place.

    Args:
        memory_model: The same model, with the same parts that learn.
        directory: Where they are.

    Raises:
        CheckpointError: If the rest of the model has other weights, or other parts learn.
    """
    saved, content = load_directory(directory)
    learned = _learned(memory_model)
    is_other = content.get(_FROZEN) != _frozen_fingerprint(memory_model)
    shapes = [{name: weight.shape for name, weight in one.items()} for one in (saved, learned)]
    if is_other or shapes[0] != shapes[1]:
        msg = (
            f"{directory} holds what was learned beside the weights of another model. Name the "
            "folder (pretrained.path, --model) that the run began with."
        )
        raise CheckpointError(msg)
    with torch.no_grad():
        for name, weight in learned.items():
            weight.copy_(saved[name])


def _check_layers(model: nn.Module, modules: tuple[str, ...] | None) -> None:
    found = dict(_adapters(model))
    missing = [
        one for one in modules or () if not any(f".{name}".endswith(f".{one}") for name in found)
    ]
    if missing:
        msg = f"pretrained.lora_modules must name linear layers of the model, got {missing}."
        raise ValueError(msg)
    places = Counter(id(weight) for _, weight in model.named_parameters(remove_duplicate=False))
    shared = [
        name for name, layer in found.items() if places[id(layer.get_base_layer().weight)] > 1
    ]
    if shared:
        # merged, what was learned in one place would be in the others, too
        msg = (
            "pretrained.lora_modules must name layers whose weights are used in no other place, "
            f"got {shared[0]}. Leave it out."
        )
        raise ValueError(msg)


def _adapters(model: nn.Module) -> Iterator[tuple[str, Any]]:
    from peft.tuners.lora import LoraLayer

    return (
        (name, module) for name, module in model.named_modules() if isinstance(module, LoraLayer)
    )


def _learned(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: weight for name, weight in model.named_parameters() if weight.requires_grad}


def _frozen_fingerprint(model: nn.Module) -> str:
    learned = _learned(model)
    return model_fingerprint(model, leave_out=lambda name: name in learned)
