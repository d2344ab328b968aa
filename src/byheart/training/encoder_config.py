"""A small encoder from scratch, for the tasks."""

from dataclasses import dataclass
from typing import Literal

from byheart.choices import require_choices
from byheart.training.config import require_at_least

__all__ = ["EncoderConfig"]


@dataclass(frozen=True, kw_only=True, slots=True)
class EncoderConfig:
    """An encoder with random weights; with the defaults it has about a million parameters."""

    architecture: Literal["modernbert", "bert"] = "modernbert"
    """ModernBERT or, as in the report, BERT. ModernBERT's rotary positions find what stands *near*
    a word sooner than BERT's learned ones."""
    num_layers: int = 4
    """Layers."""
    num_local_layers: int = 0
    """First layers in which a token sees only its neighbours; ModernBERT only. What belongs to a
    word stands near it, and there no background hides it."""
    local_reach: int = 6
    """Neighbours on each side that those layers see."""
    pooling: Literal["cls", "mean"] = "cls"
    """What the answer is read from: `[CLS]`, or the mean over the window, so that any token can
    give it; the latter ModernBERT only."""
    init_std: float = 0.02
    """Standard deviation of the first weights. With the usual 0.02 a layer of this width hardly
    changes what it reads; larger ones learn sooner what several layers must do together."""
    embed_dim: int = 128
    """Width of embeddings and hidden states."""
    num_heads: int = 4
    """Attention heads per layer."""
    hidden_dim: int = 256
    """Width inside the feed-forward layers; ModernBERT's have a gate of the same width."""
    vocab_size: int = 2048
    """Tokens to learn at most, from background and facts."""
    dropout: float = 0.0
    """Share of hidden states and attention weights that training sets to 0."""

    def __post_init__(self) -> None:
        require_choices(self)
        for name in ("num_layers", "embed_dim", "num_heads", "hidden_dim"):
            require_at_least(name, getattr(self, name), 1)
        require_at_least("vocab_size", self.vocab_size, 257)
        require_at_least("local_reach", self.local_reach, 1)
        most = self.num_layers - 1 if self.architecture == "modernbert" else 0
        if not 0 <= self.num_local_layers <= most:
            msg = (
                f"num_local_layers must be between 0 and {most} for {self.num_layers} layers of "
                f"{self.architecture}, got {self.num_local_layers}: the last layer must see the "
                "memory, and only ModernBERT has such layers."
            )
            raise ValueError(msg)
        if self.architecture == "bert" and self.pooling != "cls":
            msg = f"pooling must be 'cls' for bert, got {self.pooling!r}. Use modernbert."
            raise ValueError(msg)
        if not 0 < self.init_std < 1:
            msg = f"init_std must be above 0 and below 1, got {self.init_std}."
            raise ValueError(msg)
        # rotary positions turn pairs of numbers
        unit = self.num_heads * (2 if self.architecture == "modernbert" else 1)
        if self.embed_dim % unit:
            msg = (
                f"embed_dim must be a multiple of {unit} for {self.num_heads} heads of "
                f"{self.architecture}, got {self.embed_dim}."
            )
            raise ValueError(msg)
        if not 0 <= self.dropout < 1:
            msg = f"dropout must be at least 0 and below 1, got {self.dropout}."
            raise ValueError(msg)
