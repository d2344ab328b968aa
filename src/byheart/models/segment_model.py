"""What reads a document segment by segment: a `Decoder`, or a pretrained model with memory."""

import os
from pathlib import Path
from typing import Any, Protocol, cast, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from byheart.memory.layout import MemoryLayout
from byheart.memory.persistence import load_state, save_state
from byheart.memory.state import MemoryState
from byheart.memory.stores import MakeStore
from byheart.models.fingerprint import model_fingerprint


class StateKeeper:
    """Makes, saves and loads the states of a model: the part that all such models share."""

    @property
    def memory_layout(self) -> MemoryLayout:
        """The shape of the model's memory."""
        raise NotImplementedError

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        raise NotImplementedError

    @property
    def cache_dtype(self) -> torch.dtype:
        """Precision of the XL caches."""
        return torch.float32

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
        self.memory_layout.require_same(state.layout, "The memory state")
        save_state(state, Path(directory), fingerprint=self._fingerprint())

    def load_state(self, directory: str | os.PathLike[str]) -> MemoryState:
        """Read a state that these weights have made.

        Args:
            directory: Where `save_state` has written it.

        Returns:
            The state, on the model's device.
        """
        fingerprint, path = self._fingerprint(), Path(directory)
        return load_state(path, self.memory_layout, fingerprint=fingerprint, device=self.device)

    def _fingerprint(self) -> str:
        return model_fingerprint(cast("nn.Module", self))


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


@runtime_checkable
class SegmentModel(Protocol):
    """A language model whose memory is a `MemoryState` that its caller keeps."""

    @property
    def vocab_size(self) -> int:
        """Tokens that it can predict."""

    @property
    def memory_layout(self) -> MemoryLayout:
        """The shape of its memory."""

    def new_state(self, batch_size: int, *, memory_size: int | None = None) -> MemoryState:
        """Make a state in which no row has read anything."""

    def __call__(
        self,
        input_ids: Int[Tensor, "batch query"],
        *,
        state: MemoryState | None = None,
        document_start: Bool[Tensor, " batch"] | None = None,
        num_tokens: Int[Tensor, " batch"] | None = None,
        targets: Int[Tensor, "batch query"] | None = None,
    ) -> Any:
        """Read the next tokens of each row, inside of a segment.

        The result has `new_entries`; `logits` without targets, `token_losses` with them.
        """
