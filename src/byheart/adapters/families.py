"""What kind of model a model is, and how far it sees."""

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
from byheart.models.segment_model import SegmentModel
from byheart.models.segment_reader import SegmentReader

Kind = Literal["decoder", "encoder", "encoder-decoder"]
"""How a model reads: causally with a language-model head, in both directions with a head for whole
texts, or in both directions with a decoder that answers."""

# what configs call a layer that sees everything
_GLOBAL = ("full_attention", "global")

# among transformers' causal language models, but tokens see those behind them
_LOOK_AHEAD = ("bert-generation", "xlnet")

_SUPPORTED = (
    "a causal language model (of Hugging Face, or a byheart Decoder), an encoder for sequence "
    "classification, or an encoder-decoder for conditional generation"
)


def model_kind(model: PreTrainedModel | SegmentModel) -> Kind:
    """Find out how a model reads.

    Args:
        model: A `Decoder`, what `attach` returns, or a Hugging Face model with its head.

    Returns:
        Its kind.

    Raises:
        ValueError: If it is no model that recurrent memory can be put around.
        TypeError: If it is no model, or a wrapper around one.
    """
    if isinstance(model, SegmentModel):
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


def input_embedding(model: PreTrainedModel | SegmentModel) -> Any:
    """Return the module that turns token ids into vectors."""
    return (
        model.input_embedding() if isinstance(model, SegmentModel) else model.get_input_embeddings()
    )


def output_size(model: PreTrainedModel | SegmentModel) -> int:
    """Return how many tokens a language model can predict."""
    if isinstance(model, SegmentModel):
        return model.vocab_size
    size: int = model.get_output_embeddings().weight.shape[0]
    return size


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
    model: PreTrainedModel | SegmentModel, inner: MemoryState | None = None
) -> CausalWindowModel | ClassifierWindowModel | Seq2SeqWindowModel | SegmentReader:
    """Make a reader of windows of a model.

    Args:
        model: The model.
        inner: Its own memory, for a `SegmentModel` that has one.

    Returns:
        The reader, for the model's kind.
    """
    if isinstance(model, SegmentModel):
        return SegmentReader(model, inner)
    kind = model_kind(model)
    if kind == "decoder":
        return CausalWindowModel(model)
    return ClassifierWindowModel(model) if kind == "encoder" else Seq2SeqWindowModel(model)


def max_positions(model: PreTrainedModel) -> int | None:
    """Return the positions that a model can tell apart; `None` if there is no limit."""
    config = model.config.get_text_config()
    names = ("max_position_embeddings", "max_target_positions", "max_seq_len")
    limit: int | None = next((getattr(config, n) for n in names if hasattr(config, n)), None)
    if config.model_type in {"t5", "mt5", "umt5", "bloom"}:
        return None  # relative positions or ALiBi; `n_positions` is no limit there
    for name, module in model.named_modules():
        # RoBERTa and its family count positions from behind the padding index
        if name.endswith("position_embeddings") and isinstance(module, nn.Embedding):
            offset = 0 if module.padding_idx is None else module.padding_idx + 1
            return module.num_embeddings - offset
    return limit


def rotation_limit(model: PreTrainedModel) -> int | None:
    """Return the length beyond which a text changes the angles of all its tokens.

    Args:
        model: The model.

    Returns:
        Tokens; `None` if angles depend on positions alone.
    """
    config = model.config.get_text_config()
    parameters = getattr(config, "rope_parameters", None) or {}
    nested = [value for value in parameters.values() if isinstance(value, dict)]
    limits = []
    for rope in nested or [parameters]:
        if rope.get("rope_type") in ("dynamic", "longrope"):
            names = "original_max_position_embeddings", "max_position_embeddings"
            known = [rope.get(names[0]), *(getattr(config, name, None) for name in names)]
            limits.append(next(int(limit) for limit in known if limit))
    return min(limits, default=None)


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


def has_global_layer(model: PreTrainedModel) -> bool:
    """Tell whether some layers, if not all, see the whole window: there memory is read and written.

    Returns:
        `False` where the config does not say.
    """
    return any(kind in _GLOBAL for kind in _layer_kinds(model))


def _layer_kinds(model: PreTrainedModel) -> list[str]:
    config = model.config.get_text_config()
    names = ("layer_types", "attention_layers")
    return list(next((kinds for name in names if (kinds := getattr(config, name, None))), ()))


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
