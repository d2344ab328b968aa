"""Save what was added to a pretrained model, and put it back."""

import os
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from byheart.adapters.attach_config import AttachConfig
from byheart.adapters.attached_memory import AttachedMemory
from byheart.adapters.loading import load_saved_along, load_transformer
from byheart.adapters.memory_model import MemoryModel, is_added
from byheart.config import load_config, save_config
from byheart.errors import CheckpointError
from byheart.memory.files import complete_directory, read_manifest, recover, require_format
from byheart.models.checkpoint import require_tokenizer
from byheart.models.fingerprint import model_fingerprint

FORMAT = "byheart-memory-model"
FORMAT_VERSION = 1
_CONFIG = "memory_config.json"
_WEIGHTS = "memory_model.safetensors"
_MODEL = "model"


def save_attached(
    memory_model: MemoryModel,
    directory: str | os.PathLike[str],
    *,
    with_model: bool | None = None,
    tokenizer_fingerprint: str = "",
    max_shard_size: int | str = "50GB",
) -> None:
    """Write the added weights (safetensors) and the config (JSON) to a directory.

    The directory is replaced only when the new one is complete; a crash loses nothing.

    Args:
        memory_model: What to save.
        directory: Where to.
        with_model: Write the model inside, too, without what was added, as Hugging Face's
            checkpoints; `None`: if its own weights have changed since memory was put on it, if it
            was saved along before, or if the directory holds a model.
        tokenizer_fingerprint: Identifies the tokenizer that made the model's tokens;
            `load_attached` refuses another one.
        max_shard_size: Largest file of the model's own weights.

    Raises:
        ValueError: If the memory was taken off, or PEFT holds what would have to be written.
        CheckpointError: If the directory holds files of others.
    """
    memory_model.require_attached()
    directory = Path(directory)
    if with_model is None:
        recover(directory)
        # weights that were saved along may be in no other place
        holds_model = (directory / _MODEL).is_dir()
        with_model = holds_model or memory_model.was_saved_along or memory_model.has_learned
    added = _added_weights(memory_model)
    if with_model:
        require_no_adapters(
            memory_model.model,
            "with modules_to_save=['byheart_memory'] the memory learns and is saved there, too",
        )
    content = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "model_type": memory_model.config.model_type,
        "model_fingerprint": base_fingerprint(memory_model),
        "tokenizer_fingerprint": tokenizer_fingerprint,
    }
    with complete_directory(directory, content) as partial:
        save_config(memory_model.memory_config, partial / _CONFIG)
        save_file(added, partial / _WEIGHTS)
        if with_model:
            model = memory_model.model
            weights = {
                name: tensor for name, tensor in model.state_dict().items() if not is_added(name)
            }
            model.save_pretrained(
                partial / _MODEL, state_dict=weights, max_shard_size=max_shard_size
            )


def load_attached(
    model: PreTrainedModel | None,
    source: str | os.PathLike[str],
    *,
    check_model: bool = True,
    tokenizer_fingerprint: str = "",
) -> MemoryModel:
    """Put saved memory on a model.

    Args:
        model: The model it was saved from; `None` for the one saved along.
        source: Where `save_attached` has written, or a repository of the Hugging Face hub.
        check_model: Refuse a model whose weights are not those that the memory was saved with.
        tokenizer_fingerprint: If given, the model must have been trained with this tokenizer.

    Returns:
        The model with memory, in evaluation mode.

    Raises:
        CheckpointError: If the source is incomplete, damaged or of another format, holds no model
            where one is wanted, or belongs to another model or tokenizer. The model is not changed
            then.
    """
    directory = _local(source)
    manifest = read_manifest(directory)
    require_format(manifest, directory, FORMAT, FORMAT_VERSION)
    require_tokenizer(manifest, directory, tokenizer_fingerprint)
    if model is None:
        model = load_saved_along(directory / _MODEL, manifest["model_type"], load_transformer)
    if model.config.model_type != manifest["model_type"]:
        msg = (
            f"{directory} belongs to a model of type {manifest['model_type']}, got "
            f"{model.config.model_type}. Pass the model it was saved from."
        )
        raise CheckpointError(msg)
    if check_model and model_fingerprint(model) != manifest["model_fingerprint"]:
        msg = (
            f"{directory} belongs to a {manifest['model_type']} model with other weights, or of "
            "another precision. Pass the model it was saved from, None for one that was saved "
            "along, or check_model=False if it was changed on purpose."
        )
        raise CheckpointError(msg)
    memory_model = MemoryModel(model, load_config(AttachConfig, directory / _CONFIG))
    try:
        _put_back(memory_model, load_file(directory / _WEIGHTS))
    except (SafetensorError, OSError, RuntimeError, KeyError) as error:
        memory_model.detach()
        msg = f"{directory / _WEIGHTS} does not fit its config: {error}"
        raise CheckpointError(msg) from error
    memory_model.was_saved_along = (directory / _MODEL).is_dir()
    return memory_model.eval()


def load_attached_weights(memory_model: MemoryModel, directory: Path) -> None:
    """Give a model with memory the weights that `save_attached` wrote, in place.

    Args:
        memory_model: A model of the same shape.
        directory: Where they are, those of the model, too.
    """
    saved = load_attached(None, directory)
    memory_model.load_state_dict(saved.state_dict())


def base_fingerprint(memory_model: MemoryModel) -> str:
    """Hash the weights of the model below, without what was added.

    Args:
        memory_model: The model with memory.

    Returns:
        SHA-256, hexadecimal.
    """
    return model_fingerprint(memory_model.model, leave_out=is_added)


def _added_weights(memory_model: MemoryModel) -> dict[str, Tensor]:
    if not all(isinstance(memory, AttachedMemory) for memory in memory_model.memories().values()):
        msg = "PEFT holds the weights of the memory. Save it with PEFT's save_pretrained."
        raise ValueError(msg)
    return {
        f"{layer}.{name}": tensor.detach().cpu().contiguous()
        for layer, memory in memory_model.memories().items()
        for name, tensor in memory.state_dict().items()
    }


def require_no_adapters(model: nn.Module, remedy: str) -> None:
    """Refuse to write a model that transformers could not read again.

    Args:
        model: What is to be saved.
        remedy: What else to do if PEFT saves the model.

    Raises:
        ValueError: If PEFT has put layers of its own into it.
    """
    name = first_adapter(model)
    if name is not None:
        msg = (
            f"The model has layers of PEFT, such as {name}, and cannot be saved with them. "
            f"Merge them with merge_and_unload(), or save it with PEFT's save_pretrained; {remedy}."
        )
        raise ValueError(msg)


def first_adapter(model: nn.Module) -> str | None:
    """Look for a layer that PEFT has put into a model.

    Args:
        model: The model.

    Returns:
        The name of the first; `None` if there is none.
    """
    return next(
        (
            name
            for name, module in model.named_modules()
            if type(module).__module__.partition(".")[0] == "peft"
        ),
        None,
    )


def _put_back(memory_model: MemoryModel, weights: dict[str, Tensor]) -> None:
    with torch.no_grad():
        for layer, memory in memory_model.memories().items():
            prefix = f"{layer}."
            own = [name for name in weights if name.startswith(prefix)]
            memory.load_state_dict({name.removeprefix(prefix): weights.pop(name) for name in own})
    if weights:
        msg = f"it holds {sorted(weights)}, which the config has no place for"
        raise KeyError(msg)


def _local(source: str | os.PathLike[str]) -> Path:
    """Return the directory of a source, fetched from the hub if it is none here.

    Raises:
        CheckpointError: If it is nowhere.
    """
    directory = Path(source)
    recover(directory)
    if directory.is_dir():
        return directory
    try:
        return Path(snapshot_download(str(source)))
    except (OSError, ValueError) as error:
        msg = f"There is neither a directory nor a repository {source}: {error}"
        raise CheckpointError(msg) from error
