"""Save a decoder to a directory and load it again."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from byheart.config import load_config, save_config
from byheart.errors import CheckpointError
from byheart.memory.files import complete_directory, read_manifest, require_format
from byheart.models.config import DecoderConfig
from byheart.models.decoder import Decoder

__all__ = ["load_model", "load_weights", "save_model"]

FORMAT = "byheart-decoder"
FORMAT_VERSION = 1
_WEIGHTS = "model.safetensors"
_CONFIG = "config.json"


def save_model(
    decoder: Decoder, directory: str | os.PathLike[str], *, tokenizer_fingerprint: str = ""
) -> None:
    """Write weights (safetensors) and config (JSON) to a directory.

    The directory is replaced only when the new one is complete; a crash loses nothing.

    Args:
        decoder: What to save. Tied parameters are written once.
        directory: Where to.
        tokenizer_fingerprint: Identifies the tokenizer that made the model's tokens;
            `load_model` refuses another one.
    """
    tensors = {
        name: parameter.detach().cpu().contiguous()
        for name, parameter in decoder.named_parameters()
    }
    content = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "tokenizer_fingerprint": tokenizer_fingerprint,
    }
    with complete_directory(Path(directory), content) as partial:
        save_file(tensors, partial / _WEIGHTS)
        save_config(decoder.config, partial / _CONFIG)


def load_model(
    directory: str | os.PathLike[str],
    *,
    tokenizer_fingerprint: str = "",
    device: torch.device | str | None = None,
) -> Decoder:
    """Read a decoder that `save_model` wrote.

    Args:
        directory: Where it is.
        tokenizer_fingerprint: If given, the model must have been trained with this tokenizer.
        device: Where the model shall live.

    Returns:
        The decoder, in evaluation mode.

    Raises:
        CheckpointError: If the directory is incomplete, damaged, of another format, or was made
            with another tokenizer.
    """
    directory = Path(directory)
    _check(directory, tokenizer_fingerprint)
    decoder = Decoder(load_config(DecoderConfig, directory / _CONFIG))
    _fill(decoder, directory / _WEIGHTS)
    return decoder.eval() if device is None else decoder.eval().to(device)


def load_weights(decoder: Decoder, directory: str | os.PathLike[str]) -> None:
    """Give a decoder the weights that `save_model` wrote, in place.

    Args:
        decoder: A decoder of the same shape.
        directory: Where the weights are.

    Raises:
        CheckpointError: If the directory is incomplete or damaged, or the weights do not fit.
    """
    directory = Path(directory)
    _check(directory, "")
    _fill(decoder, directory / _WEIGHTS)


def _check(directory: Path, tokenizer_fingerprint: str) -> None:
    if not directory.is_dir():
        msg = f"There is no model directory {directory}. Check the path."
        raise CheckpointError(msg)
    manifest = read_manifest(directory)
    require_format(manifest, directory, FORMAT, FORMAT_VERSION)
    require_tokenizer(manifest, directory, tokenizer_fingerprint)


def require_tokenizer(
    manifest: Mapping[str, Any], directory: Path, tokenizer_fingerprint: str
) -> None:
    """Refuse a tokenizer that a model was not trained with.

    Args:
        manifest: The model's.
        directory: Where the model is, for the message.
        tokenizer_fingerprint: The tokenizer's; empty if it is not known.

    Raises:
        CheckpointError: If both are known and differ.
    """
    saved = manifest["tokenizer_fingerprint"]
    if tokenizer_fingerprint and saved and tokenizer_fingerprint != saved:
        msg = (
            f"The model {directory} was trained with the tokenizer {saved[:12]}, got the tokenizer "
            f"{tokenizer_fingerprint[:12]}. Use the tokenizer that was saved with the model."
        )
        raise CheckpointError(msg)


def _fill(decoder: Decoder, weights: Path) -> None:
    try:
        tensors = load_file(weights)
    except (SafetensorError, OSError) as error:
        msg = f"{weights} cannot be read: {error}."
        raise CheckpointError(msg) from error
    parameters = dict(decoder.named_parameters())
    wanted = {name: list(parameter.shape) for name, parameter in parameters.items()}
    found = {name: list(tensor.shape) for name, tensor in tensors.items()}
    differing = sorted(
        name for name in wanted.keys() | found.keys() if wanted.get(name) != found.get(name)
    )
    if differing:
        name = differing[0]
        msg = (
            f"{weights} must have the parameters of the decoder; {name} has shape "
            f"{found.get(name)}, not {wanted.get(name)} ({len(differing)} differ). "
            "Build the decoder from the config beside the weights."
        )
        raise CheckpointError(msg)
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(tensors[name])
