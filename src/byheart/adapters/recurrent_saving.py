"""Save recurrent memory without the model it was put around, and put it back."""

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from byheart.adapters.families import input_embedding
from byheart.adapters.loading import load_saved_along, load_transformer
from byheart.adapters.memory_model import MemoryModel
from byheart.adapters.memory_saving import FORMAT as ATTACHED
from byheart.adapters.memory_saving import load_attached, require_no_adapters, save_attached
from byheart.adapters.recurrent import RecurrentMemory
from byheart.config import load_config, save_config
from byheart.errors import CheckpointError
from byheart.memory.files import complete_directory, read_manifest, recover, require_format
from byheart.models.checkpoint import FORMAT as DECODER
from byheart.models.checkpoint import load_model, save_model
from byheart.models.decoder import Decoder
from byheart.models.recurrent_config import RecurrentMemoryConfig
from byheart.models.segment_model import SegmentModel

FORMAT = "byheart-recurrent-memory"
FORMAT_VERSION = 1
_CONFIG = "recurrent_memory_config.json"
_WEIGHTS = "recurrent_memory.safetensors"
_MODEL = "model"


def save_recurrent(
    memory_model: RecurrentMemory, directory: str | os.PathLike[str], *, with_model: bool = False
) -> None:
    """Write the added weights (safetensors) and the config (JSON) to a directory.

    The directory is replaced only when the new one is complete; a crash loses nothing.

    Args:
        memory_model: What to save.
        directory: Where to.
        with_model: Write the model inside, too, as `save_model` or Hugging Face's checkpoints do,
            and what was attached to it; for models whose own weights were trained.

    Raises:
        ValueError: If the model is to be written and PEFT has put layers of its own into it.
    """
    model, weights = memory_model.model, memory_model.memory.state_dict()
    if with_model and not isinstance(model, MemoryModel):
        require_no_adapters(model, "and the memory with with_model=False")
    content = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "model_type": _model_type(model),
        "embed_dim": memory_model.layout.embed_dim,
    }
    with complete_directory(Path(directory), content) as partial:
        save_config(memory_model.memory_config, partial / _CONFIG)
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}
        save_file(tensors, partial / _WEIGHTS)
        if with_model and isinstance(model, Decoder):
            save_model(model, partial / _MODEL)
        elif with_model and isinstance(model, MemoryModel):
            save_attached(model, partial / _MODEL, with_model=True)
        elif with_model:
            model.save_pretrained(partial / _MODEL)


def load_recurrent(
    model: PreTrainedModel | SegmentModel | None, directory: str | os.PathLike[str]
) -> RecurrentMemory:
    """Put saved recurrent memory around a model.

    Args:
        model: The model it was saved from; `None` for the one saved along.
        directory: Where `save_recurrent` has written.

    Returns:
        The model with memory, in evaluation mode.

    Raises:
        CheckpointError: If the directory is incomplete, damaged or of another format, holds no
            model where one is wanted, or belongs to another kind of model.
    """
    directory = Path(directory)
    recover(directory)
    if not directory.is_dir():
        msg = f"There is no directory {directory}. Check the path."
        raise CheckpointError(msg)
    manifest = read_manifest(directory)
    require_format(manifest, directory, FORMAT, FORMAT_VERSION)
    if model is None:
        kind = manifest["model_type"]
        model = load_saved_along(directory / _MODEL, kind, _loader(kind))
    mine = (_model_type(model), input_embedding(model).weight.shape[1])
    theirs = (manifest["model_type"], manifest["embed_dim"])
    if mine != theirs:
        msg = (
            f"{directory} belongs to a {theirs[0]} model of width {theirs[1]}, got a {mine[0]} "
            f"model of width {mine[1]}. Pass the model it was saved from."
        )
        raise CheckpointError(msg)
    memory_model = RecurrentMemory(model, load_config(RecurrentMemoryConfig, directory / _CONFIG))
    try:
        weights = load_file(directory / _WEIGHTS)
        like = next(iter(weights.values()), memory_model.memory.memory)
        with torch.no_grad():
            memory_model.memory.to(like.dtype).load_state_dict(weights)
    except (SafetensorError, OSError, RuntimeError) as error:
        msg = f"{directory / _WEIGHTS} does not fit its config: {error}"
        raise CheckpointError(msg) from error
    return memory_model.eval()


def _model_type(model: Any) -> str:
    if isinstance(model, Decoder):
        return DECODER
    family = str(model.config.model_type)
    return f"{ATTACHED}/{family}" if isinstance(model, MemoryModel) else family


def _loader(model_type: str) -> Callable[[Path], PreTrainedModel | SegmentModel]:
    if model_type.startswith(ATTACHED):
        return partial(load_attached, None)
    return load_model if model_type == DECODER else load_transformer
