"""Continue documents: sampling with memory and cache."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from byheart.choices import require_finite, require_whole
from byheart.memory.state import MemoryState
from byheart.models.segment_model import SegmentModel
from byheart.models.streaming import read_tokens
from byheart.ops import known

# A device is asked so seldom whether all rows have stopped: an answer makes it wait, and so does a
# step that no row needs.
_TOKENS_PER_QUESTION = 16


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplingConfig:
    """How the next token is chosen."""

    temperature: float = 1.0
    """Divides the scores; 0 takes the most likely token."""
    top_k: int | None = None
    """Sample among the so many most likely tokens only."""
    top_p: float | None = None
    """Sample among the most likely tokens that together have at least this probability."""

    def __post_init__(self) -> None:
        require_finite(self)
        require_whole(self)
        if self.temperature < 0:
            msg = f"temperature must be at least 0, got {self.temperature}."
            raise ValueError(msg)
        if self.top_k is not None and self.top_k < 1:
            msg = f"top_k must be at least 1, got {self.top_k}. Pass None for all tokens."
            raise ValueError(msg)
        if self.top_p is not None and not 0 < self.top_p <= 1:
            msg = f"top_p must be above 0 and at most 1, got {self.top_p}."
            raise ValueError(msg)


class Generated(NamedTuple):
    """Continuations of each row."""

    tokens: Int[Tensor, "batch new"]
    """The new tokens; after a stop token a row repeats it."""
    num_tokens: Int[Tensor, " batch"]
    """New tokens of each row, a stop token included."""
    state: MemoryState
    """The state after all tokens but the last: pass it and the last token on to continue."""


@torch.no_grad()
def generate(
    model: SegmentModel,
    input_ids: Int[Tensor, "batch query"],
    *,
    max_new_tokens: int,
    state: MemoryState | None = None,
    num_tokens: Int[Tensor, " batch"] | None = None,
    sampling: SamplingConfig | None = None,
    stop_id: int | None = None,
    generator: torch.Generator | None = None,
) -> Generated:
    """Read a prompt per row and continue it token by token.

    Every step equals the evaluation of the whole text in segments: the unfinished segment is kept
    as it is, and enters memory when it is complete.

    Args:
        model: A `Decoder`, or a pretrained model with memory, in eval mode.
        input_ids: Prompts, or the next piece of what `state` has read; at least one token a row.
        max_new_tokens: Tokens to add at most.
        state: What the rows have read before; it is used up. `None` for nothing.
        num_tokens: Tokens of each prompt, the first so many columns; `None` for all.
        sampling: How to choose; `None` takes the most likely token.
        stop_id: A row that produces this token is finished.
        generator: Source of randomness.

    Returns:
        The new tokens and the state.

    Raises:
        ValueError: If a prompt is empty, `max_new_tokens` is below 1, or the text would be longer
            than the model can tell apart; nothing is read then. With a `stop_id`, which may come
            at once, the prompt alone counts. If the model's scores are no numbers.
    """
    if max_new_tokens < 1:
        msg = f"max_new_tokens must be at least 1, got {max_new_tokens}."
        raise ValueError(msg)
    batch = input_ids.shape[0]
    counts = torch.tensor([input_ids.shape[1]]) if num_tokens is None else num_tokens
    known.require(
        counts > 0,
        lambda: ValueError(
            "Every row needs at least one prompt token to continue from. Drop the empty prompts."
        ),
        "every row needs a prompt token",
    )
    sampling = sampling or SamplingConfig(temperature=0.0)
    state = state if state is not None else model.new_state(batch)
    # the last new token is not read
    certain = 0 if stop_id is not None else max_new_tokens - 1
    model.require_room(state, counts.to(state.position.device) + certain, waits=True)
    read = read_tokens(model, input_ids, state, num_tokens=num_tokens)
    running = torch.ones(batch, dtype=torch.bool, device=input_ids.device)
    count = torch.zeros(batch, dtype=torch.long, device=input_ids.device)
    tokens: list[Tensor] = []
    for number in range(1, max_new_tokens + 1):
        if tokens:
            read = read_tokens(model, tokens[-1][:, None], read.state, num_tokens=running.long())
        chosen = choose(read.last_logits, sampling, generator)
        if tokens:
            chosen = torch.where(running, chosen, tokens[-1])
        tokens.append(chosen)
        count = count + running
        if stop_id is not None:
            running = running & (chosen != stop_id)
            asks = known.values_are_known(running) or number % _TOKENS_PER_QUESTION == 0
            if asks and not bool(running.any()):
                break
    if stop_id is not None:
        # rows may have waited for the question whether all are done
        tokens = tokens[: int(count.max())]
    return Generated(torch.stack(tokens, dim=1), count, read.state)


def choose(
    logits: Float[Tensor, "batch vocab"],
    sampling: SamplingConfig,
    generator: torch.Generator | None = None,
) -> Int[Tensor, " batch"]:
    """Choose the next token of each row.

    Args:
        logits: Scores of the next token.
        sampling: How to choose.
        generator: Source of randomness.

    Returns:
        The chosen tokens.

    Raises:
        ValueError: If a score is NaN or plus infinity.
    """
    # the largest of scores that are no numbers would be some token, and look like an answer
    known.require(
        logits < torch.inf,
        lambda: ValueError(
            "The scores of the next token must be numbers, got NaN or infinity: the weights hold "
            "some, or half precision is too narrow. Take an earlier checkpoint, or float32."
        ),
        "the scores of the next token must be numbers",
    )
    if sampling.temperature == 0:
        return logits.argmax(-1)
    logits = logits / sampling.temperature
    if sampling.top_k is not None and sampling.top_k < logits.shape[1]:
        weakest = logits.topk(sampling.top_k).values[:, -1:]
        logits = logits.masked_fill(logits < weakest, -torch.inf)
    if sampling.top_p is not None:
        ordered, order = logits.softmax(-1).sort(descending=True)
        # a token stays if those before it have not reached top_p, so the first always stays
        drop = ordered.cumsum(-1) - ordered >= sampling.top_p
        logits = logits.masked_fill(drop.scatter(1, order, drop), -torch.inf)
    return torch.multinomial(logits.softmax(-1), 1, generator=generator).squeeze(1)
