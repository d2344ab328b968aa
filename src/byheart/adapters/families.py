"""What kind of model a model is, and what fits into its window."""

from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
)

from byheart.adapters.window_models import (
    CausalWindowModel,
    ClassifierWindowModel,
    Seq2SeqWindowModel,
)
from byheart.memory.state import MemoryState
from byheart.models.decoder import Decoder
from byheart.models.recurrent_config import RecurrentMemoryConfig
from byheart.models.recurrent_decoder import DecoderReader, require_decoder_fits

Kind = Literal["decoder", "encoder", "encoder-decoder"]
"""How a model reads: causally with a language-model head, in both directions with a head for whole
texts, or in both directions with a decoder that answers."""

# they multiply what they look up themselves, and what is given to them not at all
_SCALED_OUTSIDE = ("blenderbot-small", "falcon_h1", "mvp", "pegasus")

# what configs call a layer that sees everything
_GLOBAL = ("full_attention", "global")

# among transformers' causal language models, but tokens see those behind them
_LOOK_AHEAD = ("bert-generation", "xlnet")

# they pass what is in the places of padding on to the text beside it
_MIX_PADDING = ("convbert", "fnet", "mobilebert", "nystromformer", "yoso")

_SUPPORTED = (
    "a causal language model (of Hugging Face, or a byheart Decoder), an encoder for sequence "
    "classification, or an encoder-decoder for conditional generation"
)


def model_kind(model: PreTrainedModel | Decoder) -> Kind:
    """Find out how a model reads.

    Args:
        model: A `Decoder`, or a Hugging Face model with its head.

    Returns:
        Its kind.

    Raises:
        ValueError: If it is no model that recurrent memory can be put around.
        TypeError: If it is no model, or a wrapper around one.
    """
    if isinstance(model, Decoder):
        return "decoder"
    name = type(model).__name__
    if not isinstance(model, PreTrainedModel):
        msg = (
            f"model must be {_SUPPORTED}, got {name}. Pass the model itself, not what was put "
            "around it."
        )
        raise TypeError(msg)
    family = model.config.model_type
    if model.config.is_encoder_decoder and name.endswith("ForConditionalGeneration"):
        return "encoder-decoder"
    is_language_model = name == MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(family)
    looks_ahead = family in MODEL_FOR_MASKED_LM_MAPPING_NAMES or family in _LOOK_AHEAD
    if is_language_model and (not looks_ahead or getattr(model.config, "is_decoder", False)):
        return "decoder"
    if (
        name.endswith("ForSequenceClassification")
        and family in MODEL_FOR_MASKED_LM_MAPPING_NAMES
        and not model.config.is_encoder_decoder
    ):
        return "encoder"
    remedy = "Set is_decoder=True in its config" if is_language_model else "Load it with its head"
    msg = f"model must be {_SUPPORTED}, got {name}. {remedy}, or take another."
    raise ValueError(msg)


def input_embedding(model: PreTrainedModel | Decoder) -> Any:
    """Return the module that turns token ids into vectors."""
    return model.embedding if isinstance(model, Decoder) else model.get_input_embeddings()


@torch.no_grad()
def embedding_statistics(
    embedding: Any,
) -> tuple[Float[Tensor, " embed_dim"], Float[Tensor, " embed_dim"]]:
    """Measure the vectors that an embedding yields: some scale what they look up, as Gemma's.

    Returns:
        Mean and standard deviation, per number.
    """
    vocab_size, device = len(embedding.weight), embedding.weight.device
    total = squares = torch.zeros((), device=device)
    # in pieces: a vocabulary in double precision is gigabytes
    for ids in torch.split(torch.arange(vocab_size, device=device), 8192):
        vectors = embedding(ids).double()
        total, squares = total + vectors.sum(dim=0), squares + vectors.square().sum(dim=0)
    mean = total / vocab_size
    variance = (squares - vocab_size * mean.square()) / max(1, vocab_size - 1)
    return mean.float(), variance.clamp(min=0).sqrt().float()


def window_model(
    model: PreTrainedModel | Decoder, inner: MemoryState | None = None
) -> CausalWindowModel | ClassifierWindowModel | Seq2SeqWindowModel | DecoderReader:
    """Make a reader of windows of a model.

    Args:
        model: The model.
        inner: Its own memory, for a `Decoder` that has one.

    Returns:
        The reader, for the model's kind.
    """
    if isinstance(model, Decoder):
        return DecoderReader(model, inner)
    kind = model_kind(model)
    if kind == "decoder":
        return CausalWindowModel(model)
    return ClassifierWindowModel(model) if kind == "encoder" else Seq2SeqWindowModel(model)


def window_length(config: RecurrentMemoryConfig, kind: Kind) -> int:
    """Return the positions that a segment with memory and special tokens takes."""
    copies = 2 if kind == "decoder" else 1
    return config.segment_length + config.num_special_tokens + copies * config.num_memory_tokens


def require_fits(model: PreTrainedModel | Decoder, config: RecurrentMemoryConfig) -> None:
    """Refuse a memory that the model could not use.

    Args:
        model: The model.
        config: The memory.

    Raises:
        ValueError: If the window is too small, local attention would cut the memory off, hidden
            states do not fit into the embedding, the model scales its embeddings outside of them
            or mixes padding with text, or special tokens stand around a decoder's memory.
    """
    kind = model_kind(model)
    if kind == "decoder" and config.num_special_tokens:
        msg = (
            "start_ids, separator_ids and end_ids must be empty for a decoder, got "
            f"{config.start_ids}, {config.separator_ids}, {config.end_ids}. Put special tokens "
            "into the text."
        )
        raise ValueError(msg)
    if isinstance(model, Decoder):
        require_decoder_fits(model.config, config)
        return
    _require_embedding(model)
    _require_window(model, config, kind)
    _require_ids(model, config)


def _require_embedding(model: PreTrainedModel) -> None:
    reader = window_model(model)
    width = model.get_input_embeddings().weight.shape[1]
    if reader.embed_dim != width:
        msg = (
            f"Hidden states must be as wide as the token embeddings, got {reader.embed_dim} and "
            f"{width} for {type(model).__name__}: what is written could not be read. Use a model "
            "without factorised embeddings."
        )
        raise ValueError(msg)
    family = model.config.model_type
    if family in _MIX_PADDING:
        msg = (
            f"Padding must change nothing, but {family} mixes it with the text, so that rows would "
            "depend on the others of their batch. Use another encoder."
        )
        raise ValueError(msg)
    scale = getattr(model.config, "embedding_multiplier", 1.0)
    if family in _SCALED_OUTSIDE and (scale != 1.0 or getattr(model.config, "scale_embedding", 0)):
        msg = (
            f"Token embeddings must be what the first layer reads, but {family} scales them after "
            "the lookup. Use a model without scale_embedding or embedding_multiplier."
        )
        raise ValueError(msg)


def _require_window(model: PreTrainedModel, config: RecurrentMemoryConfig, kind: Kind) -> None:
    needed = window_length(config, kind)
    positions = max_positions(model)
    if positions is not None and needed > positions:
        msg = (
            f"Segment, memory and special tokens must fit into the window of {positions} "
            f"positions, got {needed}: {config.segment_length} text, {config.num_memory_tokens} "
            f"memory{' (twice)' if kind == 'decoder' else ''}, {config.num_special_tokens} "
            f"special. {_shorten(config, needed - positions)}"
        )
        raise ValueError(msg)
    reach = None if _has_global_layer(model) else attention_reach(model)
    if config.num_memory_tokens and reach is not None and needed > reach:
        msg = (
            f"All of a window must see the memory, but no layer of {type(model).__name__} looks "
            f"farther than {reach} positions, and the window has {needed}. "
            f"{_shorten(config, needed - reach)}"
        )
        raise ValueError(msg)


def _shorten(config: RecurrentMemoryConfig, excess: int) -> str:
    """Say how to make a window smaller by so many positions.

    Returns:
        A sentence.
    """
    fitting = config.segment_length - excess
    if fitting < 1:
        return "Use fewer memory tokens: they leave no place for text."
    return f"Set segment_length to at most {fitting}."


def _require_ids(model: PreTrainedModel, config: RecurrentMemoryConfig) -> None:
    vocab_size = model.get_input_embeddings().weight.shape[0]
    ids = (*config.start_ids, *config.separator_ids, *config.end_ids)
    if any(not 0 <= token < vocab_size for token in ids):
        msg = (
            f"Special tokens must be below the model's vocabulary of {vocab_size}, got {ids}. Use "
            "the tokenizer that belongs to the model."
        )
        raise ValueError(msg)


def max_positions(model: PreTrainedModel) -> int | None:
    """Return the positions that a model can tell apart; `None` if there is no limit."""
    config = model.config.get_text_config()
    limit: int | None = getattr(config, "max_position_embeddings", None)
    if config.model_type in {"t5", "mt5", "umt5", "bloom"}:
        return None  # relative positions or ALiBi; `n_positions` is no limit there
    for name, module in model.named_modules():
        # RoBERTa and its family count positions from behind the padding index
        if name.endswith("position_embeddings") and isinstance(module, nn.Embedding):
            offset = 0 if module.padding_idx is None else module.padding_idx + 1
            return module.num_embeddings - offset
    return limit


def whole_window_layers(model: PreTrainedModel, num_positions: int) -> tuple[bool, ...]:
    """Tell which layers see all of a window.

    Args:
        model: A model in whose window the memory fits.
        num_positions: Length of the window.

    Returns:
        An entry per layer: `False` for those that see the neighbours of a token alone.
    """
    kinds, reach = _layer_kinds(model), attention_reach(model)
    if not kinds or reach is None or num_positions <= reach:
        return (True,) * int(model.config.get_text_config().num_hidden_layers)
    return tuple(kind in _GLOBAL for kind in kinds)


def _has_global_layer(model: PreTrainedModel) -> bool:
    """Tell whether some layers, if not all, see the whole window: there memory is read and written.

    Returns:
        `False` where the config does not say.
    """
    return any(kind in _GLOBAL for kind in _layer_kinds(model))


def _layer_kinds(model: PreTrainedModel) -> list[str]:
    config = model.config.get_text_config()
    kinds = (getattr(config, name, None) or () for name in ("layer_types", "attention_layers"))
    return [kind for layers in kinds for kind in layers]


def attention_reach(model: PreTrainedModel) -> int | None:
    """Return how many positions the layer with the shortest sight covers, its own included.

    Returns:
        Positions; `None` if every layer sees everything.
    """
    config = model.config.get_text_config()
    reaches = []
    sliding = getattr(config, "sliding_window", None)
    layer_types = getattr(config, "layer_types", None)
    slides = getattr(config, "use_sliding_window", True)
    if layer_types is not None:
        slides = any("sliding" in kind or "chunked" in kind for kind in layer_types)
    if sliding and slides:
        reaches.append(int(sliding))
    if getattr(config, "attention_chunk_size", None) and slides:
        reaches.append(int(config.attention_chunk_size))
    if getattr(config, "local_attention", None):  # ModernBERT: half to each side
        reaches.append(int(config.local_attention) // 2 + 1)
    if config.model_type == "gpt_neo":
        reaches.append(int(config.window_size))
    if getattr(config, "local_radius", None):  # LongT5: its block and those beside it
        reaches.append(int(config.local_radius) + 1)
    if getattr(config, "attention_window", None):  # Longformer: half to each side
        window = config.attention_window
        reaches.append(min(window if isinstance(window, list) else [window]) // 2 + 1)
    return min(reaches, default=None)
