"""Which tokens a larger memory helps to predict."""

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from byheart.evaluation.reading import evaluating
from byheart.models.segment_model import SegmentModel

__all__ = ["TokenLossDifferences", "token_loss_differences"]


class TokenLossDifferences(NamedTuple):
    """Losses of the same tokens with two memory sizes, in nats, float32, on the CPU."""

    losses_a: Float[Tensor, " prediction"]
    """With the first memory size; entry i belongs to token i + 1."""
    losses_b: Float[Tensor, " prediction"]
    """With the second memory size."""

    @property
    def differences(self) -> Float[Tensor, " prediction"]:
        """First minus second: positive where the second memory predicts better."""
        return self.losses_a - self.losses_b


def token_loss_differences(
    model: SegmentModel,
    tokens: Int[Tensor, " token"],
    memory_size_a: int,
    memory_size_b: int,
) -> TokenLossDifferences:
    """Read a document with two memory sizes and compare the loss of every token.

    Until the smaller memory has evicted an entry both hold the same, so the differences begin with
    a run of zeros: with M1 entries and segments of S tokens, the first `(M1 // S + 1) * S` ones if
    the memory is written segment by segment. Where the search takes another path for the larger
    memory, read "up to rounding" (about 1e-5 nats).

    Args:
        model: The model.
        tokens: One document, start token first; at least two tokens.
        memory_size_a: Entries per row and head of the first memory; 0 for none.
        memory_size_b: Entries per row and head of the second memory; 0 for none.

    Returns:
        The losses with either memory.

    Raises:
        ValueError: If there are fewer than two tokens, or a memory size is negative or above 0
            for a model without kNN memory.

    Source:
        Wu et al. 2022, Memorizing Transformers, "Information retrieval patterns"
        (arXiv:2203.08913).
    """
    if len(tokens) < 2:
        msg = f"A document must have at least 2 tokens to predict one, got {len(tokens)}."
        raise ValueError(msg)
    with evaluating(model):
        losses_a, losses_b = (
            _read(model, tokens, memory_size) for memory_size in (memory_size_a, memory_size_b)
        )
    return TokenLossDifferences(losses_a, losses_b)


def _read(
    model: SegmentModel, tokens: Int[Tensor, " token"], memory_size: int
) -> Float[Tensor, " prediction"]:
    state = model.new_state(1, memory_size=memory_size)
    tokens = tokens.long().to(state.position.device)
    length = model.memory_layout.segment_length
    losses = []
    for start in range(0, len(tokens) - 1, length):
        piece = tokens[None, start : start + length + 1]
        out = model(piece[:, :-1], state=state, targets=piece[:, 1:])
        assert out.token_losses is not None
        losses.append(out.token_losses[0].cpu())
        state = state.commit(out.new_entries)
    return torch.cat(losses)
