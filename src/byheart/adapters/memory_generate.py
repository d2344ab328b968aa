"""Generate with transformers' own `generate`, from a model that remembers."""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from jaxtyping import Int, Shaped
from torch import Tensor, nn

from byheart.adapters.attention_hook import VIEW
from byheart.adapters.memory_context import MemoryContext
from byheart.adapters.memory_model import MemoryModel
from byheart.adapters.row_tokens import RowTokens
from byheart.memory.state import MemoryState
from byheart.models.streaming import read_tokens


@torch.no_grad()
def generate_with_memory(
    memory_model: MemoryModel,
    input_ids: Int[Tensor, "batch tokens"],
    *,
    attention_mask: Shaped[Tensor, "batch tokens"] | None = None,
    state: MemoryState | None = None,
    **options: Any,
) -> Any:
    """Read a prompt of any length per row and continue it.

    Complete segments of the prompt enter memory; the rest, and what is generated, stays in the
    model's own cache, and all of it is seen by what follows. The memory is not written meanwhile:
    to go on for longer than the model's window, use `byheart.generate`, which writes it.

    Args:
        memory_model: The model, in eval mode.
        input_ids: Prompts, or what follows that which `state` has read; at least a token per row.
        attention_mask: Real tokens, one run in each row; `None` for all.
        state: What the rows have read; it is used up. `None` for nothing.
        options: What transformers' `generate` takes: `max_new_tokens`, `do_sample`, `num_beams`,
            `num_return_sequences`, `cache_implementation`, ...

    Returns:
        What transformers' `generate` returns: the prompts, as they were given, with their
        continuations.

    Raises:
        ValueError: If a prompt is empty, or the state has another number of rows.
    """
    rows = RowTokens.of(input_ids, attention_mask, None)
    if bool((rows.num_tokens == 0).any()):
        msg = "Every row needs at least one prompt token to continue from. Drop the empty prompts."
        raise ValueError(msg)
    state = memory_model.new_state(rows.batch) if state is None else state
    memory_model.require_rows(state, rows)
    prompt, rest, mask = _split(input_ids, rows, state)
    if prompt is not None:
        state = read_tokens(memory_model, prompt[0], state, num_tokens=prompt[1]).state
    handle = memory_model.model.register_forward_pre_hook(
        _with_memory(memory_model, state), with_kwargs=True
    )
    try:
        result = memory_model.model.generate(input_ids=rest, attention_mask=mask, **options)
    finally:
        handle.remove()
    is_plain = isinstance(result, Tensor)
    generated = (result if is_plain else result.sequences)[:, rest.shape[1] :]
    copies = generated.shape[0] // rows.batch
    sequences = torch.cat([input_ids.repeat_interleave(copies, 0), generated], dim=1)
    if is_plain:
        return sequences
    result.sequences = sequences
    return result


def _split(
    input_ids: Tensor, rows: RowTokens, state: MemoryState
) -> tuple[tuple[Tensor, Tensor] | None, Tensor, Tensor]:
    """Split prompts into what completes segments, and a rest of at least a token.

    Returns:
        Tokens and how many of them each row reads first, if any; the rest, padded on the left, and
        its mask.
    """
    length, pending = state.layout.segment_length, state.num_pending
    complete = (pending + rows.num_tokens - 1) // length * length
    first = (complete - pending).clamp(min=0)
    left = rows.num_tokens - first
    start = torch.zeros_like(first) if rows.first_column is None else rows.first_column
    prompt = None
    if bool((first > 0).any()):
        columns = torch.arange(int(first.max()), device=input_ids.device) + start[:, None]
        prompt = (input_ids.gather(1, columns.clamp(max=input_ids.shape[1] - 1)), first)
    width = int(left.max())
    columns = torch.arange(-width, 0, device=input_ids.device) + (start + rows.num_tokens)[:, None]
    mask = torch.arange(width, device=input_ids.device) >= width - left[:, None]
    return prompt, input_ids.gather(1, columns.clamp(min=0)), mask.long()


def _with_memory(memory_model: MemoryModel, state: MemoryState) -> Callable[..., Any]:
    """Return a hook that lets each step of `generate` see the memory."""

    @cache
    def context(copies: int) -> MemoryContext:
        return MemoryContext.of(state, memory_model.layers, memory_model.memory_config, copies)

    def see_memory(
        _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        tokens = kwargs["input_ids"] if kwargs.get("input_ids") is not None else args[0]
        copies = tokens.shape[0] // state.batch_size
        columns = kwargs.get("position_ids")
        if columns is None:
            columns = (kwargs["attention_mask"].cumsum(1) - 1).clamp(min=0)
        columns = columns[:, -tokens.shape[1] :].expand(tokens.shape[0], -1)
        view, position_ids = context(copies).view(columns, stages=False)
        if position_ids is not None:
            kwargs = {**kwargs, "position_ids": position_ids}
        return args, {**kwargs, VIEW: view}

    return see_memory
