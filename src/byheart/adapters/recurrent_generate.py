"""Continue or answer texts of any length with a recurrent memory."""

from contextlib import AbstractContextManager, nullcontext
from numbers import Integral
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor
from transformers.modeling_outputs import MoEModelOutput

from byheart.adapters.families import input_embedding
from byheart.adapters.generate_options import (
    AT_ENDS,
    check_answer_options,
    check_decoder_options,
)
from byheart.adapters.memory_generate import memory_in_sight
from byheart.adapters.memory_model import MemoryModel
from byheart.adapters.recurrent import RecurrentMemory
from byheart.adapters.recurrent_checks import without_attached
from byheart.memory.recurrent import RecurrentState
from byheart.models.arguments import require_state_type
from byheart.models.decoder import Decoder
from byheart.models.generate import SamplingConfig, choose
from byheart.models.recurrent_text import require_token_ids, text_extents


@torch.no_grad()
def generate(
    memory_model: RecurrentMemory,
    input_ids: Int[Tensor, "batch tokens"],
    *,
    attention_mask: Tensor | None = None,
    state: RecurrentState | None = None,
    max_new_tokens: int,
    **options: Any,
) -> tuple[Int[Tensor, "batch new"], RecurrentState]:
    """Read a text and continue it; for an encoder-decoder, answer it.

    What is generated is read as any text is: when a segment is full, it is written to the memory,
    and generation goes on in the next one. Within a segment the model's own `generate` runs, with
    its key-value cache. A `Decoder` generates token by token, and reads its unfinished segment
    again for each. With a kNN memory the text is read segment by segment, too.

    Args:
        memory_model: A causal language model or encoder-decoder with recurrent memory.
        input_ids: The text, or its next piece: at least one token per row.
        attention_mask: 1 for text, 0 for padding before or behind it; `None` for no padding.
        state: What the rows have read; `None` for nothing. With a kNN memory it is used up.
        max_new_tokens: Most tokens to generate per row.
        options: Options of Hugging Face's `generate`, such as `do_sample`, `temperature`,
            `eos_token_id`. What looks at the whole continuation, such as beams, penalties on
            repetition, forced tokens and stopping criteria, is for encoder-decoders alone; forced
            tokens of the model's own `generation_config` are left out.
            For a `Decoder`: `sampling` (a `SamplingConfig`; without it the most likely token is
            taken), `generator`, `eos_token_id` (one or several) and `pad_token_id`.

    Returns:
        The new tokens, without the text; rows that ended early are filled with `pad_token_id`. And
        the state after text and new tokens.

    Raises:
        ValueError: If the model is a classifier, an option cannot be honoured, or there is no text.
    """
    if not isinstance(max_new_tokens, Integral) or max_new_tokens < 1:
        msg = f"max_new_tokens must be at least 1, a whole number, got {max_new_tokens!r}."
        raise ValueError(msg)
    require_token_ids(input_ids)
    if state is None:
        state = memory_model.new_state(len(input_ids))
    require_state_type(state, RecurrentState)
    if memory_model.kind == "encoder":
        msg = "generate needs a causal language model or an encoder-decoder, got a classifier."
        raise ValueError(msg)
    if options.get("return_dict_in_generate"):
        msg = "generate returns new tokens and state: leave return_dict_in_generate out."
        raise ValueError(msg)
    if memory_model.kind == "encoder-decoder":
        check_answer_options(memory_model, options)
        options = {**options, "max_new_tokens": max_new_tokens}
        return _answer(memory_model, input_ids, attention_mask, state, options)
    check_decoder_options(memory_model, options)
    proceed = _token_by_token if isinstance(memory_model.model, Decoder) else _continue
    return proceed(memory_model, input_ids, attention_mask, state, max_new_tokens, options)


def _continue(
    memory_model: RecurrentMemory,
    input_ids: Tensor,
    attention_mask: Tensor | None,
    state: RecurrentState,
    max_new_tokens: int,
    options: dict[str, Any],
) -> tuple[Tensor, RecurrentState]:
    options, ends, pad = _with_end(memory_model, options)
    # the first new token may be the end
    certain = 1 if len(ends) else max_new_tokens
    before, last = _apart_from_last(memory_model, input_ids, attention_mask, state, certain)
    together = memory_model.generates_behind_padding
    state = _read(memory_model, input_ids, before, state)
    unfinished = torch.ones_like(last, dtype=torch.bool)
    pieces: list[Tensor] = []
    left, length = max_new_tokens, memory_model.memory_config.segment_length
    while left and bool(unfinished.any()):
        # the last token of a full segment is asked for the first of the next one, as in training
        room = int((length - state.num_pending)[unfinished].min())
        # rows that have ended would be carried on, past the window if theirs is nearly full
        rows = unfinished.nonzero()[:, 0]
        going = state if len(rows) == len(last) else state.select_rows(rows)
        made = _side_by_side(memory_model, going, last[rows], min(left, room), options, together)
        new = made.new_full((len(last), made.shape[1]), options["pad_token_id"])
        new = new.index_copy(0, rows, made)
        keep = _until_end(new, ends, unfinished)
        # all but the newest token of each row has been read; rows that have ended stand still
        reading = torch.cat([last[:, None], new[:, :-1]], dim=1)
        state = _read(memory_model, reading, keep, state)
        ended = unfinished & torch.isin(new, ends).any(dim=1)
        newest = new.gather(1, keep.sum(dim=1, keepdim=True).sub(1).clamp(min=0))[:, 0]
        last = torch.where(unfinished, newest, last)
        unfinished = unfinished & ~ended
        pieces.append(new.masked_fill(~keep, pad))
        left -= new.shape[1]
    state = _read(memory_model, last[:, None], torch.ones_like(last[:, None]).bool(), state)
    return torch.cat(pieces, dim=1), state


def _token_by_token(
    memory_model: RecurrentMemory,
    input_ids: Tensor,
    attention_mask: Tensor | None,
    state: RecurrentState,
    max_new_tokens: int,
    options: dict[str, Any],
) -> tuple[Tensor, RecurrentState]:
    options, ends, pad = _with_end(memory_model, options)
    sampling = options.get("sampling") or SamplingConfig(temperature=0.0)
    certain = 1 if len(ends) else max_new_tokens
    before, newest = _apart_from_last(memory_model, input_ids, attention_mask, state, certain)
    state = _read(memory_model, input_ids, before, state)
    unread = unfinished = torch.ones_like(newest, dtype=torch.bool)
    pieces: list[Tensor] = []
    while len(pieces) < max_new_tokens and bool(unfinished.any()):
        out = memory_model(newest[:, None], attention_mask=unread[:, None], state=state)
        chosen = choose(out.logits[:, 0], sampling, options.get("generator"))
        chosen = torch.where(unfinished, chosen, options["pad_token_id"])
        state = state.commit(out.new_entries)
        newest, unread = chosen, unfinished
        pieces.append(chosen.masked_fill(~unfinished, pad))
        unfinished = unfinished & ~torch.isin(chosen, ends)
    return torch.stack(pieces, dim=1), _read(memory_model, newest[:, None], unread[:, None], state)


def _with_end(
    memory_model: RecurrentMemory, options: dict[str, Any]
) -> tuple[dict[str, Any], Tensor, int]:
    """Settle which tokens end a text and which fill what is behind.

    Returns:
        The options with a `pad_token_id` that the model knows, the end tokens, and what fills the
        result behind them, which may be any number.
    """
    device = memory_model.memory.memory.device
    # a Decoder knows of no special tokens
    defaults = getattr(without_attached(memory_model.model), "generation_config", None)
    end = options.get("eos_token_id", getattr(defaults, "eos_token_id", None))
    ends = torch.as_tensor([] if end is None else end, dtype=torch.long, device=device).flatten()
    pad = options.get("pad_token_id", getattr(defaults, "pad_token_id", None))
    if pad is None:
        pad = int(ends[0]) if len(ends) else 0
    # what is behind an end is read by nobody, and must be a word all the same
    return {**options, "pad_token_id": 0}, ends, int(pad)


def _apart_from_last(
    memory_model: RecurrentMemory,
    input_ids: Tensor,
    attention_mask: Tensor | None,
    state: RecurrentState,
    num_certain: int,
) -> tuple[Tensor, Tensor]:
    """Find the last token of each row, whose logits are wanted next.

    Returns:
        Which tokens stand before it, and the last tokens.

    Raises:
        ValueError: If a row has no token, or text and as many new tokens as are certain go beyond
            the model's last position.
    """
    first, counts = text_extents(input_ids, attention_mask)
    if not all(counts):
        msg = "Every row of input_ids must have at least one token to continue, got an empty row."
        raise ValueError(msg)
    _require_room(memory_model, state, torch.tensor(counts, device=input_ids.device), num_certain)
    start = torch.tensor(first, device=input_ids.device)[:, None]
    place = start + torch.tensor(counts, device=input_ids.device)[:, None] - 1
    columns = torch.arange(input_ids.shape[1], device=input_ids.device)
    but_last = (columns >= start) & (columns < place)
    return but_last, input_ids.gather(1, place)[:, 0]


def _require_room(
    memory_model: RecurrentMemory,
    state: RecurrentState,
    num_tokens: Int[Tensor, " rows"],
    num_certain: int,
) -> None:
    inner, config = state.inner, memory_model.memory_config
    if inner is None:
        return
    length, memory = config.segment_length, 2 * config.num_memory_tokens
    text = state.num_pending + num_tokens + num_certain
    written = text // length * (length + memory)
    # the last new token is not read, unless it ends a segment
    asked = (text - 1) // length * (length + memory) + (text - 1) % length
    asked = asked + memory * ((text - 1) % length > 0)
    memory_model.model.require_room(inner, torch.maximum(written, asked), waits=True)


def _read(
    memory_model: RecurrentMemory, input_ids: Tensor, mask: Tensor, state: RecurrentState
) -> RecurrentState:
    masks = [mask]
    if state.inner is not None and state.inner.stores:
        # a call's tokens enter the kNN memory when it is over: segments shall find those before
        length = memory_model.memory_config.segment_length
        numbers = (state.num_pending[:, None] + mask.cumsum(dim=1) - 1) // length
        last = int(numbers.masked_fill(~mask, 0).max()) if mask.numel() else 0
        masks = [mask & (numbers == number) for number in range(last + 1)]
    for part in masks:
        out = memory_model(input_ids, attention_mask=part, state=state, logits_to_keep=0)
        state = state.commit(out.new_entries)
    return state


def _side_by_side(
    memory_model: RecurrentMemory,
    state: RecurrentState,
    last: Tensor,
    max_new_tokens: int,
    options: dict[str, Any],
    together: bool,
) -> Tensor:
    """Generate in the segment of each row, together or, where padding shows, by their lengths.

    Returns:
        New tokens `[batch, new]`, padding behind the end of a row.
    """
    lengths = [] if together else sorted(set(state.num_pending.tolist()))
    if len(lengths) < 2:
        return _within_segment(memory_model, state, last, max_new_tokens, options)
    made = last.new_full((len(last), max_new_tokens), options["pad_token_id"])
    width = 0
    for length in lengths:
        rows = (state.num_pending == length).nonzero()[:, 0]
        part = _within_segment(
            memory_model, state.select_rows(rows), last[rows], max_new_tokens, options
        )
        made[rows, : part.shape[1]] = part
        width = max(width, part.shape[1])
    return made[:, :width]


def _within_segment(
    memory_model: RecurrentMemory,
    state: RecurrentState,
    last: Tensor,
    max_new_tokens: int,
    options: dict[str, Any],
) -> Tensor:
    """Generate behind the pending tokens and the last one, at most to the end of the segment.

    Returns:
        New tokens `[batch, new]`, padding behind the end of a row.
    """
    embed = input_embedding(memory_model.model)
    memory = memory_model.first_memory(state)
    counts = state.num_pending + 1
    width = int(counts.max())
    text = torch.cat([state.pending, last[:, None]], dim=1)
    # `generate` wants padding in front: memory and text end in the last column
    columns = torch.arange(width, device=last.device) - (width - counts[:, None])
    source = torch.where(columns == counts[:, None] - 1, state.pending.shape[1], columns)
    embedded = embed(text.gather(1, source.clamp(min=0)))
    padded = torch.cat([memory.to(embedded.dtype), embedded], dim=1)
    num_memory = memory.shape[1]
    places = torch.arange(padded.shape[1], device=last.device) - (width - counts[:, None])
    order = torch.where(places < num_memory, places, places + (width - counts[:, None]))
    inputs = padded.gather(1, order.clamp(min=0)[..., None].expand(-1, -1, padded.shape[2]))
    sight = _inner_in_sight(memory_model, state, counts + 2 * num_memory + max_new_tokens - 1)
    with sight:
        new = without_attached(memory_model.model).generate(
            inputs_embeds=inputs,
            attention_mask=(places >= 0).long(),
            max_new_tokens=max_new_tokens,
            **{**options, **dict.fromkeys(AT_ENDS), "return_dict_in_generate": False},
        )
    assert isinstance(new, Tensor)
    return new


def _inner_in_sight(
    memory_model: RecurrentMemory, state: RecurrentState, num_tokens: Int[Tensor, " rows"]
) -> AbstractContextManager[None]:
    """Let the model see its own memory, if it has one.

    Args:
        memory_model: The model.
        state: What the rows have read.
        num_tokens: Tokens that the window of each row will have, memory tokens included.

    Returns:
        A context in which it does.
    """
    attached, inner = memory_model.model, state.inner
    if not isinstance(attached, MemoryModel) or inner is None:
        return nullcontext()
    inner.require_current()
    attached.require_room(inner, num_tokens)
    return memory_in_sight(attached, inner)


def _until_end(new: Tensor, ends: Tensor, unfinished: Tensor) -> Tensor:
    """Mark the tokens up to the first end of each row.

    Returns:
        The mask, false in rows that had ended before.
    """
    is_end = torch.isin(new, ends).long()
    return (is_end.cumsum(dim=1) - is_end == 0) & unfinished[:, None]


def _answer(
    memory_model: RecurrentMemory,
    input_ids: Tensor,
    attention_mask: Tensor | None,
    state: RecurrentState,
    options: dict[str, Any],
) -> tuple[Tensor, RecurrentState]:
    hidden, mask, entries = memory_model.encode(
        input_ids, attention_mask=attention_mask, state=state
    )
    answers = memory_model.model.generate(
        # decoders of experts ask it for what it says of them
        encoder_outputs=MoEModelOutput(last_hidden_state=hidden),
        attention_mask=mask.long(),
        **{**options, "return_dict_in_generate": False},
    )
    assert isinstance(answers, Tensor)
    # without the token that every answer starts with, and what was given of the answer
    given, num_given = options.get("decoder_input_ids"), 1
    if given is not None:
        num_given = given.shape[1]
        num_given += not torch.equal(answers[:, :num_given], given)
    return answers[:, num_given:], state.commit(entries)
