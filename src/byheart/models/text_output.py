"""What is wanted of the text of a segment, and what a language model says about it."""

from dataclasses import dataclass
from typing import NamedTuple

from jaxtyping import Float, Int
from torch import Tensor


@dataclass(frozen=True, kw_only=True, eq=False)
class TextRequest:
    """What is wanted of the text of a segment, from a language model."""

    num_columns: int
    """Text columns of the segment."""
    targets: Int[Tensor, "rows text"] | None
    """The token after each; -100 where nothing is predicted. `None`: no losses are wanted."""
    logits: bool
    """Whether logits are wanted."""


class TextOutput(NamedTuple):
    """What a language model says about the text of a segment."""

    token_losses: Float[Tensor, "rows text"] | None
    """Negative log likelihood of each target, in nats; 0 where nothing is predicted."""
    logits: Float[Tensor, "rows text vocab"] | None
    """Scores of the next token."""
