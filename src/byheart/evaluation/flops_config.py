"""The shape of a transformer by its name, or from a Hugging Face `config.json`."""

import difflib
import json
import logging
import os
from pathlib import Path
from typing import Any

from byheart.errors import DataError
from byheart.evaluation.flops_shapes import NAMED_SHAPES, ModelKind, ModelShape

__all__ = ["find_shape", "shape_from_config"]

logger = logging.getLogger(__name__)

# whether it is an encoder or a decoder, and whether its feed-forward block is gated, is in no
# config.json but follows from the model type
_FAMILIES: dict[str, tuple[ModelKind, bool]] = {
    **dict.fromkeys(
        ("bloom", "gpt2", "gpt_neox", "gptj", "opt", "phi", "starcoder2"), ("decoder", False)
    ),
    **dict.fromkeys(
        (
            "cohere", "gemma", "gemma2", "gemma3_text", "granite", "llama", "mistral", "olmo",
            "olmo2", "phi3", "qwen2", "qwen3", "smollm3", "stablelm",
        ),
        ("decoder", True),
    ),
    **dict.fromkeys(
        (
            "albert", "bert", "camembert", "distilbert", "electra", "mpnet", "roberta",
            "xlm-roberta",
        ),
        ("encoder", False),
    ),
    "modernbert": ("encoder", True),
}  # fmt: skip
_KEYS = {
    "num_layers": ("num_hidden_layers", "n_layer", "n_layers", "num_layers"),
    "embed_dim": ("hidden_size", "n_embd", "d_model", "dim"),
    "hidden_dim": ("intermediate_size", "ffn_dim", "n_inner", "hidden_dim"),
    "num_heads": ("num_attention_heads", "n_head", "n_heads"),
    "vocab_size": ("vocab_size",),
}
_OPTIONAL_KEYS = {
    "num_kv_heads": ("num_key_value_heads",),
    "head_dim": ("head_dim",),
    "embedding_dim": ("embedding_size", "word_embed_proj_dim"),
}
# their configs leave the feed-forward width out, or null, where it is four times the model's
_FOUR_TIMES = ("bloom", "gpt2", "gptj")
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")


def find_shape(model: str) -> ModelShape:
    """Look a model up by name, or read it from a file.

    Args:
        model: One of `NAMED_SHAPES`, in any case, or the path of a `config.json` or its folder.

    Returns:
        The shape.

    Raises:
        ValueError: If it is neither.
    """
    shape = NAMED_SHAPES.get(model.lower())
    if shape is not None:
        return shape
    path = Path(model)
    if path.exists():
        return shape_from_config(path / "config.json" if path.is_dir() else path)
    close = difflib.get_close_matches(model.lower(), NAMED_SHAPES, n=1)
    hint = f" Did you mean {close[0]}?" if close else ""
    msg = (
        f"model must be the path of a config.json or one of {', '.join(NAMED_SHAPES)}; got "
        f"{model!r}.{hint}"
    )
    raise ValueError(msg)


def shape_from_config(path: str | os.PathLike[str]) -> ModelShape:
    """Read the shape of a dense transformer from a Hugging Face `config.json`.

    The file is read as plain JSON, under all key names in common use. What it cannot say, whether
    the model is an encoder and whether its feed-forward block is gated, follows from `model_type`;
    for other types add `"kind": "decoder"` or `"encoder"` and `"gated_mlp": true` or `false` to it.
    A sliding window is ignored, with a warning: every layer attends to all tokens.

    Args:
        path: The file.

    Returns:
        The shape, named after the file's folder.

    Raises:
        DataError: If the file is no JSON object, a width is missing or no whole number, or the
            model is of a kind that the counts do not hold for: an encoder-decoder or a mixture of
            experts.
    """
    path = Path(path)
    if path.parent.is_dir() and not path.exists():
        msg = f"{path.parent} must hold a {path.name}, and does not. Pass the folder of a model."
        raise DataError(msg)
    config = _read(path)
    kind, gated_mlp = _family(config, path)
    widths = {field: _width(config, keys, path) for field, keys in _KEYS.items()}
    if widths["hidden_dim"] is None and config.get("model_type") in _FOUR_TIMES:
        widths["hidden_dim"] = 4 * (widths["embed_dim"] or 0)
    for field, value in widths.items():
        if value is None:
            msg = (
                f"{path} must give the model's {field} as {' or '.join(_KEYS[field])}, but has no "
            )
            msg += "such key. Add it."
            raise DataError(msg)
    for key in ("sliding_window", "local_attention"):
        window = config.get(key)
        if window is not None and config.get("use_sliding_window") is not False:
            logger.warning("%s has %s %s: counted is attention to all.", path, key, window)
    values: dict[str, Any] = {
        **widths,
        **{field: _width(config, keys, path) for field, keys in _OPTIONAL_KEYS.items()},
    }
    name = path.resolve().parent.name if path.name == "config.json" else path.stem
    try:
        return ModelShape(name=name, kind=kind, gated_mlp=gated_mlp, **values)
    except ValueError as error:
        msg = f"{path}: {error}"
        raise DataError(msg) from error


def _read(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        msg = f"{path} must be a JSON file: {error}. Pass the config.json of a model."
        raise DataError(msg) from error
    if not isinstance(config, dict):
        msg = f"{path} must hold a JSON object, got {type(config).__name__}. Pass a config.json."
        raise DataError(msg)
    return config


def _family(config: dict[str, Any], path: Path) -> tuple[ModelKind, bool]:
    if config.get("is_encoder_decoder"):
        msg = f"{path} must be of an encoder or a decoder, got an encoder-decoder, whose cross-"
        msg += "attention is not counted. Pass another model."
        raise DataError(msg)
    for key in _EXPERTS:
        if config.get(key) not in (None, 0, 1):
            msg = f"{path} must be of a dense model, got {key} {config[key]}. Set it to 1 and give "
            msg += "the width of the experts that a token passes as intermediate_size."
            raise DataError(msg)
    kind, gated_mlp = _FAMILIES.get(config.get("model_type", ""), (None, None))
    if config.get("is_decoder"):
        kind = "decoder"
    kind, gated_mlp = config.get("kind", kind), config.get("gated_mlp", gated_mlp)
    if kind not in ("decoder", "encoder") or not isinstance(gated_mlp, bool):
        msg = (
            f"{path} must have a model_type among {', '.join(sorted(_FAMILIES))}, got "
            f'{config.get("model_type")!r}. For others add "kind": "decoder" or "encoder" and '
            '"gated_mlp": true or false to it.'
        )
        raise DataError(msg)
    return kind, gated_mlp


def _width(config: dict[str, Any], keys: tuple[str, ...], path: Path) -> int | None:
    for key in keys:
        value = config.get(key)
        if value is None:
            continue
        if not isinstance(value, int) or isinstance(value, bool):
            msg = f"{path}: {key} must be a whole number, got {value!r}. Correct the file."
            raise DataError(msg)
        return value
    return None
