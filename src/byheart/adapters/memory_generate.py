"""Generate with transformers' own `generate`, from a model that remembers."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from jaxtyping import Int, Shaped
from torch import Tensor, nn

from byheart.adapters.attention_hook import VIEW
from byheart.adapters.families import max_positions, rotation_limit
from byheart.adapters.memory_context import MemoryContext
from byheart.adapters.memory_model import MemoryModel
from byheart.adapters.row_tokens import RowTokens
from byheart.memory.state import MemoryState
from byheart.models.streaming import read_tokens

# options that look at the tokens of the prompt, and the values with which they do not
_OF_THE_PROMPT: dict[str, tuple[Any, ...]] = {
    "min_length": (0,),
    "repetition_penalty": (1.0,),
    "no_repeat_ngram_size": (0,),
    "encoder_repetition_penalty": (1.0,),
    "encoder_no_repeat_ngram_size": (0,),
    "prompt_lookup_num_tokens": (),
    "bad_words_ids": (),
    "sequence_bias": (),
    "forced_bos_token_id": (),
    "token_healing": (False,),
    # compares with the prompt left out, but the memory has it
    "guidance_scale": (1.0,),
}
# arguments that name places or tokens besides the prompt, of which part is in memory already
_BESIDES_THE_PROMPT = (
    "inputs_embeds", "position_ids", "past_key_values", "cache_position", "decoder_input_ids",
    "negative_prompt_ids", "negative_prompt_attention_mask", "token_type_ids",
)  # fmt: skip


@torch.no_grad()
def generate_with_memory(
    memory_model: MemoryModel,
    input_ids: Int[Tensor, "batch tokens"] | None = None,
    generation_config: Any = None,
    *,
    inputs: Int[Tensor, "batch tokens"] | None = None,
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
        generation_config: Options in the form of transformers' `GenerationConfig`.
        inputs: What transformers calls `input_ids`; either of both.
        attention_mask: Real tokens, one run in each row; `None` for all.
        state: What the rows have read; it is left as it is. `None` for nothing.
        options: What transformers' `generate` takes: `max_new_tokens`, which must be given,
            `do_sample`, `num_beams`, `num_return_sequences`, `cache_implementation`, ... Processors
            and criteria of your own are shown the end of a prompt only, which no segment holds yet.

    Returns:
        What transformers' `generate` returns: the prompts, as they were given, with their
        continuations.

    Raises:
        ValueError: If a prompt is missing or empty, the state has another number of rows, an option
            needs the whole prompt, the model has not enough positions, or the memory was taken off.
    """
    memory_model.require_attached()
    if (input_ids is None) == (inputs is None):
        msg = "Pass the prompts as input_ids (or inputs, but not both)."
        raise ValueError(msg)
    input_ids = inputs if input_ids is None else input_ids
    assert input_ids is not None
    if generation_config is not None:
        options["generation_config"] = generation_config
    _check_options(memory_model.model, options)
    rows = RowTokens.of(input_ids, attention_mask, None)
    if bool((rows.num_tokens == 0).any()):
        msg = "Every row needs at least one prompt token to continue from. Drop the empty prompts."
        raise ValueError(msg)
    state = memory_model.new_state(rows.batch) if state is None else state
    goes_on = torch.zeros(rows.batch, dtype=torch.bool, device=input_ids.device)
    state = memory_model.require_state(state, rows.batch, goes_on)
    prompt, rest, mask = _split(input_ids, rows, state)
    _check_positions(memory_model, state, rows, _new_tokens(options))
    if prompt is not None:
        # what is read belongs to this continuation
        state = state.fork()
        state = read_tokens(memory_model, prompt[0], state, num_tokens=prompt[1]).state
    with memory_in_sight(memory_model, state):
        result = memory_model.model.generate(input_ids=rest, attention_mask=mask, **options)
    is_plain = isinstance(result, Tensor)
    generated = (result if is_plain else result.sequences)[:, rest.shape[1] :]
    copies = generated.shape[0] // rows.batch
    sequences = torch.cat([input_ids.repeat_interleave(copies, 0), generated], dim=1)
    if is_plain:
        return sequences
    result.sequences = sequences
    return result


def _new_tokens(options: dict[str, Any]) -> int:
    given = options.get("max_new_tokens")
    if given is None:
        given = options["generation_config"].max_new_tokens
    return int(given)


def _check_options(model: Any, options: dict[str, Any]) -> None:
    """Refuse options that would be told of the end of a prompt only.

    Raises:
        ValueError: If there is one, or no number of new tokens.
    """
    config = options.get("generation_config")
    if options.get("max_new_tokens") is None and getattr(config, "max_new_tokens", None) is None:
        msg = "max_new_tokens must be given: lengths that count the prompt have no meaning here."
        raise ValueError(msg)
    for name in _BESIDES_THE_PROMPT:
        if options.get(name) is not None:
            msg = (
                f"{name} must be left out: the model is given the end of the prompts alone, what "
                "comes before is in memory. Pass prompts as input_ids."
            )
            raise ValueError(msg)
    for name, harmless in _OF_THE_PROMPT.items():
        given = options.get(name, getattr(config, name, None))
        # transformers asks the model's own settings for what is not given
        is_the_models = name not in options and given is None
        if is_the_models:
            given = getattr(model.generation_config, name, None)
        if given is None or given in harmless or _is_of_single_tokens(name, given):
            continue
        what = "the whole prompt, of which only the end is not in memory"
        if not is_the_models:
            msg = f"{name} looks at {what}, got {given}. Leave it out."
            raise ValueError(msg)
        advice = f"Pass {name}={harmless[0]}." if harmless else "Set it to None there."
        found = f"The generation_config of the model has {name}={given}"
        msg = f"{found}, which looks at {what}. {advice}"
        raise ValueError(msg)


def _is_of_single_tokens(name: str, given: Any) -> bool:
    """Say whether an option names tokens whose neighbours do not matter.

    Returns:
        `False` for other options.
    """
    if name not in ("bad_words_ids", "sequence_bias"):
        return False
    # a list of sequences, a dictionary by sequence, or a list of sequences with their bias
    entries = list(given)
    if name == "sequence_bias" and not isinstance(given, dict):
        entries = [entry[0] if isinstance(entry, list | tuple) else entry for entry in given]
    return all(isinstance(entry, list | tuple) and len(entry) == 1 for entry in entries)


def _check_positions(
    memory_model: MemoryModel, state: MemoryState, rows: RowTokens, num_new: int
) -> None:
    """Refuse more tokens than a model can tell apart, before anything is read.

    Raises:
        ValueError: If there are.
    """
    model, limits = memory_model.model, [rotation_limit(memory_model.model)]
    if not memory_model.layers.has_rotation:
        limits.append(max_positions(model))
    limit = min((limit for limit in limits if limit is not None), default=None)
    if limit is None:
        return
    read = state.num_pending + rows.num_tokens
    ends = (read - 1) % state.layout.segment_length + 1
    if not memory_model.layers.has_rotation and memory_model.memory_config.xl_cache_length:
        ends = state.position + rows.num_tokens
    last = int(ends.max()) + num_new
    if last > limit:
        msg = (
            f"Prompt and new tokens must fit into the {limit} positions of "
            f"{model.config.model_type}, got up to {last}. Use fewer max_new_tokens, or "
            "byheart.generate, which begins anew with each segment."
        )
        raise ValueError(msg)


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


@contextmanager
def memory_in_sight(memory_model: MemoryModel, state: MemoryState) -> Iterator[None]:
    """Let the model below see its memory, whoever calls it; what it reads is not kept.

    Args:
        memory_model: The model.
        state: What the rows have read.

    Yields:
        Nothing.
    """
    hook = _with_memory(memory_model, state)
    handle = memory_model.model.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def _with_memory(memory_model: MemoryModel, state: MemoryState) -> Callable[..., Any]:
    """Return a hook that lets each step of `generate` see the memory."""

    @cache
    def context(copies: int) -> MemoryContext:
        return MemoryContext.of(
            state, memory_model.layers, memory_model.memory_config, memory_model.hidden_dtype,
            copies, asks=True,
        )  # fmt: skip

    def see_memory(
        _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        given = (*args[:1], kwargs.get("inputs_embeds"), kwargs.get("input_ids"))
        tokens = next(inputs for inputs in given if inputs is not None)
        copies, left = divmod(tokens.shape[0], state.batch_size)
        if left:
            msg = (
                "Rows that read a memory must be as many copies of each row of the state, side by "
                f"side, as beams are; got {tokens.shape[0]} rows for {state.batch_size} of the "
                "state. Use generate without what changes its rows."
            )
            raise ValueError(msg)
        columns = kwargs.get("position_ids")
        if columns is None:
            columns = (kwargs["attention_mask"].cumsum(1) - 1).clamp(min=0)
        columns = columns[:, -tokens.shape[1] :].expand(tokens.shape[0], -1)
        view, position_ids = context(copies).view(columns, stages=False)
        if position_ids is not None:
            kwargs = {**kwargs, "position_ids": position_ids}
        return args, {**kwargs, VIEW: view}

    return see_memory
