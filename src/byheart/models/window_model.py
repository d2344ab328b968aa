"""What recurrent memory asks of a model, and the segments that it gives it."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, runtime_checkable

from jaxtyping import Float, Int
from torch import Tensor, nn

from byheart.models.window import Window


class Encoded(NamedTuple):
    """What a model makes of a window."""

    hidden: Float[Tensor, "rows window embed_dim"]
    """Last hidden states, from which the memory is read."""
    output: Any
    """What was requested of the segment: a tensor, or a named tuple of tensors and `None`; `None`
    for nothing."""
    reader: "WindowModel | None" = None
    """What reads the next segment; `None` for the same."""


@runtime_checkable
class WindowModel(Protocol):
    """A model that recurrent memory can be put around.

    It is a value: a call changes nothing of it. What a model remembers besides the memory is in
    the reader that a call returns for the next segment, and carries no gradient. Every row is
    treated alone.
    """

    embed_dim: int
    """Width of its input embeddings and last hidden states."""
    embedding: nn.Module
    """Its input embedding: token ids to vectors."""
    writes: bool
    """Whether memory is written behind the text (decoders), or in the places it is read."""
    has_memory: bool
    """Whether it reads a memory of its own, which a commit uses up."""

    def parameters(self) -> Iterator[nn.Parameter]:
        """Return the model's parameters, for replay."""
        ...

    def __call__(self, window: Window, request: Any) -> Encoded:
        """Read a window.

        Args:
            window: Embeddings and mask.
            request: What is wanted of the segment, in this model's own terms; `None` for the
                memory alone.

        Returns:
            Hidden states and the requested output.
        """
        ...


@dataclass(frozen=True, kw_only=True, eq=False)
class Segment:
    """One step: the next segment of all rows that have one."""

    input_ids: Int[Tensor, "rows text"]
    """Text of those rows."""
    num_tokens: Int[Tensor, " rows"] | None
    """Text tokens of each, the first so many columns; `None` for all."""
    rows: Int[Tensor, " rows"] | None
    """Which rows of the batch; `None` for all, in order."""
    writes_memory: Tensor | None
    """Rows (bool, of those above) whose segment is complete; `None` for all. The others read
    memory, and leave it as it was."""
    request: Any
    """What is wanted of the segment, see `WindowModel`; `None` for the memory alone."""
    has_loss: bool
    """Whether a gradient starts here."""
