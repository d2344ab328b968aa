"""How likely a model finds given continuations of long texts."""

from collections.abc import Sequence
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Int, Int32
from torch import Tensor

from byheart.memory.state import MemoryState
from byheart.models.segment_model import SegmentModel
from byheart.models.streaming import read_tokens

__all__ = ["ContinuationScore", "Tokens", "score_continuations", "score_tokens"]

# 256 MiB of float32
_MAX_SCORES = 2**26


@runtime_checkable
class Tokens(Protocol):
    """A text of which any piece can be read."""

    @property
    def num_tokens(self) -> int:
        """Its length."""

    def tokens(self, start: int, stop: int) -> Int32[np.ndarray, " token"]:
        """Give the ids from `start` to before `stop`."""


class ContinuationScore(NamedTuple):
    """What a model makes of a continuation."""

    log_likelihood: float
    """Logarithm of its probability, in nats: the sum over its tokens."""
    is_greedy: bool
    """Whether the model itself would continue so, always taking the most likely token."""


@torch.no_grad()
def score_continuations(
    model: SegmentModel,
    contexts: Sequence[Tokens],
    continuations: Sequence[Sequence[Sequence[int]]],
    *,
    memory_size: int | None = None,
) -> list[list[ContinuationScore]]:
    """Score several continuations of each of several texts.

    Each text is read once, from an empty memory, a few segments at a time; its continuations are
    read from forks of what the model then remembers. The texts are rows of one batch.

    Args:
        model: In eval mode.
        contexts: Texts of at least one token, of any lengths.
        continuations: For each text, continuations of at least one token; it may have none.
        memory_size: Entries per row and head of the kNN memory; `None` for what the model has.

    Returns:
        A score for each continuation of each text.

    Raises:
        ValueError: If a text or a continuation is empty, or both are longer than the model can tell
            apart.
    """
    if any(context.num_tokens < 1 for context in contexts):
        msg = "Every context must have at least one token, got an empty one. Begin with a start "
        msg += "token."
        raise ValueError(msg)
    if any(len(one) < 1 for row in continuations for one in row):
        msg = "Every continuation must have at least one token, got an empty one."
        raise ValueError(msg)
    longest = max(
        (
            text.num_tokens + max(map(len, row), default=0) - 1
            for text, row in zip(contexts, continuations, strict=True)
        ),
        default=0,
    )
    model.require_document_fits(longest, "Use shorter texts.")
    state = model.new_state(len(contexts), memory_size=memory_size)
    state = _read_all_but_last(model, contexts, state)
    last = [int(text.tokens(text.num_tokens - 1, text.num_tokens)[0]) for text in contexts]
    scores: list[list[ContinuationScore]] = [[] for _ in contexts]
    most = max(map(len, continuations), default=0)
    for place in range(most):
        has_one = [len(row) > place for row in continuations]
        ids = [
            [before, *row[place]] if there else []
            for before, row, there in zip(last, continuations, has_one, strict=True)
        ]
        # the last one may use the state up
        reading = state if place == most - 1 else state.fork()
        found = score_tokens(model, ids, reading).scores
        for row, score, there in zip(scores, found, has_one, strict=True):
            if there:
                row.append(score)
    return scores


class ScoredTokens(NamedTuple):
    """What reading and scoring a piece of each row gives."""

    scores: list[ContinuationScore]
    """Of each row's piece without its first token."""
    state: MemoryState
    """The state after all tokens of each row but the last."""


@torch.no_grad()
def score_tokens(
    model: SegmentModel, ids: Sequence[Sequence[int]], state: MemoryState
) -> ScoredTokens:
    """Score every token of each row after its first.

    Little more than `_MAX_SCORES` scores are held at a time, whatever the length.

    Args:
        model: In eval mode.
        ids: Tokens of each row; a row may have none.
        state: What the rows have read before; it is used up.

    Returns:
        Sums of the log-likelihoods, and the state.
    """
    device = state.position.device
    width = max(max(map(len, ids), default=0) - 1, 0)
    num_tokens = torch.tensor([max(len(row) - 1, 0) for row in ids], device=device)
    padded = torch.zeros(len(ids), width + 1, dtype=torch.long)
    for row, tokens in enumerate(ids):
        padded[row, : len(tokens)] = torch.tensor(tokens, dtype=torch.long)
    padded = padded.to(device)
    total = torch.zeros(len(ids), dtype=torch.float64, device=device)
    greedy = torch.ones(len(ids), dtype=torch.bool, device=device)
    fitting = _MAX_SCORES // (model.vocab_size * len(ids))
    step = max(1, min(model.memory_layout.segment_length, fitting))
    for start in range(0, width, step):
        piece, targets = padded[:, start : start + step], padded[:, start + 1 : start + step + 1]
        piece = piece[:, : targets.shape[1]]
        count = (num_tokens - start).clamp(min=0, max=piece.shape[1])
        read = read_tokens(model, piece, state, num_tokens=count, return_logits=True)
        assert read.logits is not None
        state = read.state
        is_real = torch.arange(piece.shape[1], device=device) < count[:, None]
        chosen = read.logits.log_softmax(-1).gather(2, targets[..., None])[..., 0]
        total += chosen.double().masked_fill(~is_real, 0).sum(1)
        greedy &= ((read.logits.argmax(-1) == targets) | ~is_real).all(1)
    scores = [
        ContinuationScore(float(nats), bool(same))
        for nats, same in zip(total.tolist(), greedy.tolist(), strict=True)
    ]
    return ScoredTokens(scores, state)


def _read_all_but_last(
    model: SegmentModel, texts: Sequence[Tokens], state: MemoryState
) -> MemoryState:
    device = state.position.device
    lengths = [text.num_tokens - 1 for text in texts]
    step = model.memory_layout.segment_length
    for start in range(0, max(lengths), step):
        pieces = [
            text.tokens(min(start, length), min(start + step, length))
            for text, length in zip(texts, lengths, strict=True)
        ]
        num_tokens = torch.tensor([len(piece) for piece in pieces], device=device)
        ids = _stack(pieces).to(device)
        state = read_tokens(model, ids, state, num_tokens=num_tokens).state
    return state


def _stack(
    pieces: Sequence[Int32[np.ndarray, " _token"]],
) -> Int[Tensor, "batch token"]:
    ids = np.zeros((len(pieces), max(map(len, pieces))), dtype=np.int64)
    for row, piece in enumerate(pieces):
        ids[row, : len(piece)] = piece
    return torch.from_numpy(ids)
