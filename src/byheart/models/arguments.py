"""Refuse arguments of a pass that do not fit together, before anything is read."""

from typing import Any

import torch
from torch import Tensor

from byheart.ops import known
from byheart.ops.losses import IGNORED

# of one row each, or of one token each
_PER_ROW = ("document_start", "num_tokens")


def require_arguments(
    input_ids: Any,
    input_vocab: int,
    output_vocab: int | None = None,
    *,
    least: int = 1,
    **others: Any,
) -> None:
    """Refuse what would be broadcast, or fail deep in a model.

    Args:
        input_ids: The next tokens of each row, `[batch, tokens]`.
        input_vocab: Token ids that the model can read.
        output_vocab: Token ids that it can predict; `None` for those that it can read.
        least: Fewest columns.
        others: Arguments by name, `None` for those not given: `document_start` and `num_tokens` of
            a number per row, others, such as `targets`, of one per token.

    Raises:
        TypeError: If one is no tensor, or of the wrong type.
        ValueError: If one has the wrong shape, or token ids that the model does not know.
    """
    _require_type("input_ids", input_ids)
    shape = tuple(input_ids.shape)
    if len(shape) != 2 or shape[1] < least:
        some = " with at least one token" if least else ""
        msg = (
            f"input_ids must be [batch, tokens]{some}, got shape "
            f"{list(shape)}. Use input_ids[None] for a single row."
        )
        raise ValueError(msg)
    require_words("input_ids", input_ids, input_vocab)
    for name, given in others.items():
        if given is None:
            continue
        _require_type(name, given)
        expected = shape[:1] if name in _PER_ROW else shape
        if tuple(given.shape) != expected:
            what = "an entry for each row" if name in _PER_ROW else "the shape of input_ids"
            msg = f"{name} must have {what}, {list(expected)}, got shape {list(given.shape)}."
            raise ValueError(msg)
        if name not in _PER_ROW:
            require_words(name, given, output_vocab or input_vocab, may_ignore=True)


def require_words(name: str, ids: Tensor, vocab_size: int, *, may_ignore: bool = False) -> None:
    """Refuse token ids that a model does not know.

    On a device the model itself refuses them: asking here would wait for it.

    Args:
        name: Of the argument.
        ids: Token ids.
        vocab_size: How many the model knows.
        may_ignore: Whether -100 stands for none.

    Raises:
        TypeError: If they are no tensor of integers.
        ValueError: If there are others.
    """
    _require_type(name, ids)
    if not known.values_are_known(ids) or not ids.numel():
        return
    ids = ids.long()  # the number of words may be beyond the type
    known_ids = (ids >= 0) & (ids < vocab_size)
    if may_ignore:
        known_ids |= ids == IGNORED
    if not bool(known_ids.all()):
        wrong = int(ids[~known_ids].flatten()[0])
        ignored = f", or {IGNORED} for none" if may_ignore else ""
        msg = (
            f"{name} must be between 0 and {vocab_size - 1}{ignored}, got {wrong}. Use the "
            "tokenizer that belongs to the model."
        )
        raise ValueError(msg)


def require_state_type(state: Any, wanted: type) -> None:
    """Refuse what is no state of this kind of model.

    Args:
        state: What was given.
        wanted: The class of its states.

    Raises:
        TypeError: If it is another.
    """
    if not isinstance(state, wanted):
        msg = (
            f"state must be a {wanted.__name__}, got {type(state).__name__}. Make one with "
            "new_state(batch_size)."
        )
        raise TypeError(msg)


def _require_type(name: str, given: Any) -> None:
    is_flag = name == "document_start"
    wanted = "a tensor of booleans" if is_flag else "a tensor of integers"
    if not isinstance(given, Tensor):
        msg = f"{name} must be {wanted}, got {type(given).__name__}."
        raise TypeError(msg)
    is_bool = given.dtype == torch.bool
    fits = is_bool if is_flag else not (is_bool or given.dtype.is_floating_point)
    if not fits:
        msg = f"{name} must be {wanted}, got {given.dtype}."
        raise TypeError(msg)
