"""What reads a document segment by segment: a `Decoder`, or a pretrained model with memory."""

import os
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from byheart.memory.layout import MemoryLayout
from byheart.memory.persistence import load_state, save_state
from byheart.memory.state import MemoryState, NewEntries
from byheart.memory.stores import MakeStore
from byheart.models.arguments import require_state_type
from byheart.models.fingerprint import model_fingerprint
from byheart.models.text_output import TextOutput, TextRequest
from byheart.models.window import Window
from byheart.ops import known


class WindowRead(NamedTuple):
    """What a model makes of a window."""

    hidden: Float[Tensor, "rows window embed_dim"]
    """Last hidden states, as the output layer reads them."""
    output: TextOutput | None
    """What was requested of the text."""
    new_entries: NewEntries
    """What the window adds to memory."""


class SegmentModel(nn.Module, ABC):
    """A language model whose memory is a `MemoryState` that its caller keeps.

    Called with `input_ids` and, by name, `state`, `document_start`, `num_tokens` and `targets`, it
    reads the next tokens of each row, inside of a segment. What it returns has `new_entries`, with
    targets `token_losses`, and without them `logits`.
    """

    max_document_tokens: int | None = None
    """Most tokens of a document that it can tell apart; `None` for any number."""

    @property
    @abstractmethod
    def vocab_size(self) -> int:
        """Tokens that it can predict."""

    @property
    @abstractmethod
    def memory_layout(self) -> MemoryLayout:
        """The shape of its memory."""

    @property
    @abstractmethod
    def device(self) -> torch.device:
        """Where the weights are."""

    @property
    def cache_dtype(self) -> torch.dtype:
        """Precision of the XL caches."""
        return torch.float32

    @abstractmethod
    def input_embedding(self) -> Any:
        """Return what turns token ids into vectors."""

    @property
    def embed_dim(self) -> int:
        """Width of the input embeddings."""
        width: int = self.input_embedding().weight.shape[1]
        return width

    @abstractmethod
    def read_window(
        self, window: Window, request: TextRequest | None, *, state: MemoryState | None
    ) -> WindowRead:
        """Read vectors in the place of tokens, inside of a segment.

        Args:
            window: The vectors, and which of them are text.
            request: What is wanted of the text; `None` for nothing.
            state: What the rows have read; `None` for nothing.

        Returns:
            Hidden states, what was requested, and the entries to commit.
        """

    @abstractmethod
    def memory_metrics(self) -> dict[str, float]:
        """Return the gates and scales of the memory layers, for logs."""

    def new_state(
        self,
        batch_size: int,
        *,
        memory_size: int | None = None,
        device: torch.device | None = None,
        make_store: MakeStore | None = None,
    ) -> MemoryState:
        """Make a state in which no row has read anything.

        Args:
            batch_size: Rows.
            memory_size: Entries per row and head, if not the config's; 0 switches the kNN memory
                off. A model may read a larger memory than it was trained with.
            device: Where the state lives; `None` for the model's device.
            make_store: Makes the store of a memory layer, for stores of your own; `None` for the
                store that the config names.

        Returns:
            The empty state.
        """
        return MemoryState.empty(
            self.memory_layout,
            batch_size,
            memory_size=memory_size,
            dtype=self.cache_dtype,
            device=self.device if device is None else device,
            make_store=make_store,
        )

    def save_state(self, state: MemoryState, directory: str | os.PathLike[str]) -> None:
        """Write a state of this model to a directory, with a fingerprint of the weights.

        Args:
            state: What to save.
            directory: Where to. It is replaced only when the new one is complete.
        """
        require_state_type(state, MemoryState)
        self.memory_layout.require_same(state.layout, "The memory state")
        save_state(state, Path(directory), fingerprint=model_fingerprint(self))

    def load_state(self, directory: str | os.PathLike[str]) -> MemoryState:
        """Read a state that these weights have made.

        Args:
            directory: Where `save_state` has written it.

        Returns:
            The state, on the model's device.
        """
        fingerprint, path = model_fingerprint(self), Path(directory)
        return load_state(path, self.memory_layout, fingerprint=fingerprint, device=self.device)

    def require_document_fits(self, num_tokens: int, remedy: str) -> None:
        """Refuse a document that is longer than the model can tell apart.

        Args:
            num_tokens: Tokens of the longest document.
            remedy: What to do about it, as a sentence.

        Raises:
            ValueError: If it is.
        """
        limit = self.max_document_tokens
        if limit is not None and num_tokens > limit:
            msg = (
                f"With an XL cache a document must fit into the {limit} positions of the model, "
                f"because its keys hold where they stood, got {num_tokens} tokens. {remedy}"
            )
            raise ValueError(msg)

    def require_room(
        self, state: MemoryState, num_tokens: Int[Tensor, " batch"], *, waits: bool = False
    ) -> None:
        """Refuse to read beyond what the model can tell apart, before anything is read.

        Args:
            state: What the rows have read; rows that begin a document are reset already.
            num_tokens: Tokens that are to be read.
            waits: Whether to ask a device for its values; else, where they are not known, the
                device checks them when its turn comes.
        """
        limit = self.max_document_tokens
        if limit is None:
            return
        ends = state.position + num_tokens
        if waits:
            ends = ends.cpu()

        def error() -> ValueError:
            return ValueError(
                f"With an XL cache a document must fit into the {limit} positions of the model, "
                f"because its keys hold where they stood, got {int(ends.max())} tokens. "
                "Use xl_cache_length=0 or a model with rotary positions."
            )

        known.require(ends <= limit, error, "a document must fit into the positions of the model")

    def require_state(
        self, state: MemoryState, batch_size: int, document_start: Bool[Tensor, " batch"]
    ) -> MemoryState:
        """Refuse a state that a batch cannot continue.

        Args:
            state: What the rows have read.
            batch_size: Rows of the batch.
            document_start: Rows that begin a new document.

        Returns:
            The state in which those rows have read nothing.

        Raises:
            MemoryStateError: If it is used up or was made for another model.
            ValueError: If it has other rows or is on another device.
        """
        require_state_type(state, MemoryState)
        state.require_current()
        self.memory_layout.require_same(state.layout, "The memory state")
        if state.batch_size != batch_size:
            msg = (
                f"The memory state must have the batch's {batch_size} rows, got "
                f"{state.batch_size}. Make one with new_state(batch_size) or pick rows with "
                "state.select_rows."
            )
            raise ValueError(msg)
        if state.position.device != document_start.device:
            msg = (
                f"The memory state must be on the batch's device, {document_start.device}, got "
                f"{state.position.device}. Move it with state.to."
            )
            raise ValueError(msg)
        return state.start_documents(document_start)


def layer_metrics(
    layer: int, log_scale: Float[Tensor, " heads"], gate: Float[Tensor, " heads"] | None
) -> dict[str, float]:
    """Return what logs say of a memory layer.

    Args:
        layer: Its number.
        log_scale: Logarithm of the factor of its scores.
        gate: Its gates; `None` if it has none.

    Returns:
        Numbers by name.
    """
    metrics = {f"scale/layer{layer}/mean": log_scale.detach().exp().mean().item()}
    if gate is not None:
        metrics[f"gate/layer{layer}/mean"] = gate.mean().item()
        metrics[f"gate/layer{layer}/min"] = gate.min().item()
        metrics[f"gate/layer{layer}/max"] = gate.max().item()
    return metrics
