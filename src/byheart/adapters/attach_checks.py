"""What must hold before memory is put on a model, and while it reads."""

import inspect
from typing import Any

import torch
from transformers import PreTrainedModel

from byheart.adapters.attach_config import AttachConfig
from byheart.adapters.attention_hook import PLAIN, hook_of
from byheart.adapters.attention_layers import AttentionLayers, find_attentions
from byheart.adapters.families import max_positions, rotation_limit
from byheart.models.eval_mode import eval_mode

# tokens of the trial of the law of pieces, and what rounding may do to it, in bfloat16, too
_TRIAL_TOKENS = 5
_TRIAL_TOLERANCE = 0.1


def require_possible(model: PreTrainedModel, config: AttachConfig) -> None:
    """Refuse what can be refused by looking at the model.

    Args:
        model: The model.
        config: The memory.

    Raises:
        ValueError: If the model has a memory already, is of a kind that cannot have one, or has
            not the layers or positions that are asked for.
    """
    attentions = find_attentions(model)
    if any(hook_of(module) is not None for _, module in attentions):
        msg = "The model has a memory already. Take that off with detach() first."
        raise ValueError(msg)
    if config.knn is not None:
        count = len(attentions)
        wrong = [layer for layer in config.knn.layers if not -count <= layer < count]
        if wrong:
            msg = (
                f"knn.layers must be between 0 and {count - 1}, or count from the end between "
                f"-{count} and -1, got {wrong[0]}."
            )
            raise ValueError(msg)
    if "position_ids" not in inspect.signature(type(model).forward).parameters:
        msg = (
            f"{type(model).__name__} must take position_ids, so that a segment can be read in "
            "pieces. Use another model."
        )
        raise ValueError(msg)
    implementation = model.config._attn_implementation
    if config.xl_cache_length and implementation not in PLAIN:
        msg = (
            f"An XL cache needs the attention 'sdpa' or 'eager', got {implementation!r}. Use "
            "model.set_attn_implementation('sdpa')."
        )
        raise ValueError(msg)
    _require_reach(model, config)
    limit = max_positions(model)
    needed = config.segment_length + config.xl_cache_length
    if limit is not None and needed > limit:
        msg = (
            f"Segment and XL cache must fit into the model's {limit} positions, got "
            f"{config.segment_length} + {config.xl_cache_length}. Set segment_length to at most "
            f"{max(limit - config.xl_cache_length, 1)}."
        )
        raise ValueError(msg)


def _require_reach(model: PreTrainedModel, config: AttachConfig) -> None:
    """Refuse segments in which a model would change its angles.

    Raises:
        ValueError: If they are too long.
    """
    reach = rotation_limit(model)
    # all searches from the place behind the segment: its angles are asked for, too
    behind = int(config.memory_position == "window")
    if reach is not None and config.segment_length + behind > reach:
        window = " and a search from the place behind it (memory_position='window')"
        msg = (
            f"The angles of {model.config.model_type} change with the length of a text beyond "
            f"{reach} tokens, got segment_length={config.segment_length}{window * behind}. Set "
            f"segment_length to at most {reach - behind}."
        )
        raise ValueError(msg)


def require_fits(model: PreTrainedModel, config: AttachConfig, layers: AttentionLayers) -> None:
    """Refuse what only a trial has shown.

    Args:
        model: The model.
        config: The memory.
        layers: Its attention layers.

    Raises:
        ValueError: If the model's attention and the options do not go together.
    """
    family = model.config.model_type
    if config.knn is not None and config.knn.combine == "joint" and not layers.plain_softmax:
        msg = (
            f"combine='joint' needs scores that go into a softmax as they are, but {family} caps "
            "them or adds sinks. Use combine='gate'."
        )
        raise ValueError(msg)
    if config.memory_position != "none" and not layers.has_rotation:
        msg = (
            f"memory_position={config.memory_position!r} needs rotary positions, which {family} "
            "has not. Use 'none'."
        )
        raise ValueError(msg)


def require_same_in_pieces(model: PreTrainedModel, memory_model: Any) -> None:
    """Refuse a model that does not compute the same when a text is cut into pieces.

    The law that all memory stands on, tried once with the model itself: families differ in ways
    that nobody foresees.

    Args:
        model: The model, with memory on it.
        memory_model: Its `MemoryModel`.

    Raises:
        ValueError: If pieces change what it computes.
    """
    length = min(_TRIAL_TOKENS, memory_model.memory_config.segment_length)
    device = model.get_input_embeddings().weight.device
    ids = (torch.arange(1, 1 + length, device=device) % memory_model.vocab_size)[None]
    # other attentions take no mask that a past could be put in front of: whole segments only
    size = 2 if model.config._attn_implementation in PLAIN else length
    try:
        with eval_mode(memory_model), torch.no_grad():
            whole = model(input_ids=ids, use_cache=False).logits
            state, parts = memory_model.new_state(1), []
            for piece in ids.split(size, dim=1):
                out = memory_model(piece, state=state)
                state = state.commit(out.new_entries)
                parts.append(out.logits)
    except (RuntimeError, TypeError, LookupError, AttributeError) as error:
        msg = f"{model.config.model_type} failed in a trial: {error}. Use another model."
        raise ValueError(msg) from error
    difference = float((torch.cat(parts, dim=1).float() - whole.float()).abs().max())
    largest = float(whole.float().abs().max())
    # a wrong mask, place or rotation is wrong by as much as the logits are large
    if not difference <= _TRIAL_TOLERANCE * largest:
        msg = (
            f"{model.config.model_type} must compute the same when a text is cut into pieces, but "
            f"logits of up to {largest:.3g} differ by {difference:.3g}. Use another model."
        )
        raise ValueError(msg)
