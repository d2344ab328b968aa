"""What must hold before recurrent memory is put around a model."""

from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from byheart.adapters.attention_hook import has_hooks
from byheart.adapters.families import (
    Kind,
    attention_reach,
    has_global_layer,
    input_embedding,
    max_positions,
    model_kind,
    output_size,
    rotation_limit,
    window_model,
)
from byheart.adapters.memory_model import MemoryModel
from byheart.adapters.recurrent_trial import MIXED_PADDING, require_reads_embeddings
from byheart.memory.recurrent import RecurrentState
from byheart.models.arguments import require_words
from byheart.models.decoder import Decoder
from byheart.models.recurrent_config import RecurrentMemoryConfig
from byheart.models.segment_model import SegmentModel
from byheart.models.segment_reader import require_decoder_fits, require_segment_fits
from byheart.ops.losses import IGNORED

# they pass what is in the places of padding on to the text beside it: too little for a trial to see
_MIX_PADDING = ("convbert", "fnet", "mobilebert", "nystromformer", "yoso")


def window_length(config: RecurrentMemoryConfig, kind: Kind) -> int:
    """Return the positions that a segment with memory and special tokens takes."""
    copies = 2 if kind == "decoder" else 1
    return config.segment_length + config.num_special_tokens + copies * config.num_memory_tokens


def require_fits(model: PreTrainedModel | SegmentModel, config: RecurrentMemoryConfig) -> None:
    """Refuse a memory that the model could not use.

    Args:
        model: The model.
        config: The memory.

    Raises:
        ValueError: If the window is too small, local attention would cut the memory off, hidden
            states do not fit into the embedding, the model does not read vectors as it reads
            tokens, returns tuples or mixes padding with text, special tokens stand around a
            decoder's memory, or a memory of the model's own would not be read.
        TypeError: If `config` is another's.
    """
    kind = model_kind(model)
    if not isinstance(config, RecurrentMemoryConfig):
        msg = f"config must be a RecurrentMemoryConfig, got {type(config).__name__}."
        raise TypeError(msg)
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
    if isinstance(model, SegmentModel):
        name, settings = type(model).__name__, "byheart.attach"
        require_segment_fits(model.memory_layout, config, model=name, settings=settings)
        model = without_attached(model)
    else:
        _require_nothing_attached(model)
    _require_embedding(model)
    _require_window(model, config, kind)
    _require_ids(model, config)
    require_reads_embeddings(model, kind)


def without_attached(model: Any) -> Any:
    """Return the model itself, to which `attach` may have given a memory.

    Args:
        model: Any model that recurrent memory is around.

    Returns:
        The model below, or the model given if it is no `MemoryModel`.
    """
    return model.model if isinstance(model, MemoryModel) else model


def require_input(
    model: PreTrainedModel | SegmentModel, input_ids: Tensor, state: RecurrentState
) -> None:
    """Refuse texts that are not those of the state's rows, or not in the model's words.

    Args:
        model: The model.
        input_ids: Token ids, `[batch, tokens]`.
        state: What the rows have read.

    Raises:
        ValueError: If there is another number of rows, or an unknown token.
    """
    if state.batch_size != len(input_ids):
        msg = (
            f"The memory state must have the batch's {len(input_ids)} rows, got "
            f"{state.batch_size}. Make one with new_state(batch_size) or pick rows with "
            "state.select_rows."
        )
        raise ValueError(msg)
    require_words("input_ids", input_ids, len(input_embedding(model).weight))


def require_known_labels(
    model: PreTrainedModel | SegmentModel, attention_mask: Tensor | None, **labels: Tensor | None
) -> None:
    """Refuse labels that a language model cannot predict.

    Args:
        model: The model; classes of a classifier are none of this.
        attention_mask: Which tokens are text: what stands for the others is not read.
        labels: Token ids by their name; `None` for those not given.

    Raises:
        ValueError: If there are such labels.
    """
    kind = model_kind(model)
    for name, ids in labels.items():
        if ids is None or kind == "encoder":
            continue
        # labels of a decoder are about its text
        mask = attention_mask if kind == "decoder" and isinstance(attention_mask, Tensor) else None
        if mask is not None and isinstance(ids, Tensor) and mask.shape == ids.shape:
            ids = ids.masked_fill(mask == 0, IGNORED)
        require_words(name, ids, output_size(model), may_ignore=True)


def _require_nothing_attached(model: PreTrainedModel) -> None:
    if has_hooks(model):
        msg = (
            "The model has a memory that byheart.attach has put on it, and that would not be read "
            "from here. Pass what attach has returned, RecurrentMemory(memory_model, config), or "
            "take the memory off first with memory_model.detach()."
        )
        raise ValueError(msg)


def _require_embedding(model: PreTrainedModel) -> None:
    if not getattr(model.config, "return_dict", True):
        msg = "return_dict must be True, got False. Set model.config.return_dict = True."
        raise ValueError(msg)
    embedding: Any = model.get_input_embeddings()
    weight: Any = getattr(embedding, "weight", None)
    is_table = isinstance(weight, Tensor)
    if not is_table or not isinstance(embedding(weight.new_zeros(1).int()), Tensor):
        msg = (
            f"Token embeddings must be a table of vectors, got {type(embedding).__name__} of "
            f"{model.config.model_type}. Use another model."
        )
        raise ValueError(msg)
    reader = window_model(model)
    width = model.get_input_embeddings().weight.shape[1]
    if reader.embed_dim != width:
        msg = (
            f"Hidden states must be as wide as the token embeddings, got {reader.embed_dim} and "
            f"{width} for {type(model).__name__}: what is written could not be read. Use a model "
            "without factorised embeddings."
        )
        raise ValueError(msg)
    config = model.config.get_text_config()
    if config.model_type in _MIX_PADDING:
        raise ValueError(MIXED_PADDING.format(family=config.model_type))
    if config.model_type == "big_bird" and config.attention_type == "block_sparse":
        msg = (
            "attention_type must be 'original_full', got 'block_sparse': which attention big_bird "
            "uses depends on the longest text that it has read. Load it with "
            "attention_type='original_full'."
        )
        raise ValueError(msg)
    if getattr(config, "output_router_logits", False):
        msg = (
            "output_router_logits must be False, got True: the loss that balances experts is not "
            "computed with recurrent memory. Set model.config.output_router_logits = False."
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
    unchanged = rotation_limit(model)
    if unchanged is not None and needed > unchanged:
        msg = (
            f"The angles of {model.config.model_type} change with the length of a text beyond "
            f"{unchanged} tokens, got a window of {needed}: rows would depend on the others of "
            f"their batch. {_shorten(config, needed - unchanged)}"
        )
        raise ValueError(msg)
    reach = None if has_global_layer(model) else attention_reach(model)
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
