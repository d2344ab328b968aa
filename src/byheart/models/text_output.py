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
    columns: Int[Tensor, "rows kept"] | None = None
    """The text columns of each row whose logits are wanted; `None` for all. Only without targets:
    an output layer over a large vocabulary costs more than the segment."""

    def of(
        self, text: Float[Tensor, "rows text embed_dim"]
    ) -> Float[Tensor, "rows kept embed_dim"]:
        """Pick what the output layer must see.

        Args:
            text: Hidden states of the text columns.

        Returns:
            Those of the wanted columns.
        """
        if self.columns is None:
            return text
        columns = self.columns.to(text.device)[..., None]
        return text.gather(1, columns.expand(-1, -1, text.shape[2]))


class TextOutput(NamedTuple):
    """What a language model says about the text of a segment."""

    token_losses: Float[Tensor, "rows text"] | None
    """Negative log likelihood of each target, in nats; 0 where nothing is predicted."""
    logits: Float[Tensor, "rows kept vocab"] | None
    """Scores of the next token, for the wanted columns."""
