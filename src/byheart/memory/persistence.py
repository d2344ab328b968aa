"""Save a memory state to a directory and load it again."""

from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path

import torch
from torch import Tensor

from byheart.config import from_dict
from byheart.errors import MemoryStateError
from byheart.memory.files import load_directory, require_format, save_directory
from byheart.memory.layout import MemoryLayout
from byheart.memory.state import MemoryState
from byheart.memory.store import KeyValues

FORMAT = "byheart-memory-state"
FORMAT_VERSION = 1


def save_state(state: MemoryState, directory: str | Path, *, fingerprint: str) -> None:
    """Write a state to a directory (safetensors and a JSON manifest).

    The directory is replaced only when the new one is complete; a crash loses nothing.

    Args:
        state: What to save.
        directory: Where to.
        fingerprint: Identifies the weights that made the state, see `byheart.models.fingerprint`.
    """
    state.require_current()
    content = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "layout": asdict(state.layout),
        "batch_size": state.batch_size,
        "memory_size": state.memory_size,
        "model_fingerprint": fingerprint,
    }
    save_directory(Path(directory), state_tensors(state), content)


def load_state(
    directory: str | Path,
    layout: MemoryLayout,
    *,
    fingerprint: str,
    device: torch.device | None = None,
) -> MemoryState:
    """Read a state that `save_state` wrote.

    Args:
        directory: Where it is.
        layout: The layout of the model that will use it. Search, store and precision of the memory
            are this model's, whatever they were when the state was saved.
        fingerprint: Identifies the weights that will use the state: those that made it.
        device: Where the state shall live.

    Returns:
        The state.

    Raises:
        CheckpointError: If the directory is incomplete, damaged, or of another format.
        MemoryStateError: If the state was made by another model.
    """
    tensors, manifest = load_directory(Path(directory))
    require_format(manifest, directory, FORMAT, FORMAT_VERSION)
    saved_layout = from_dict(MemoryLayout, manifest["layout"])
    layout.require_same(saved_layout, f"The memory state {directory}")
    saved_fingerprint = manifest["model_fingerprint"]
    if fingerprint != saved_fingerprint:
        msg = (
            f"The memory state {directory} was made by a model with fingerprint "
            f"{saved_fingerprint[:12]}, this one has {fingerprint[:12]}. "
            "Load that model, or read the documents again."
        )
        raise MemoryStateError(msg)
    state = state_from_tensors(layout, tensors, memory_size=manifest["memory_size"])
    return state if device is None else state.to(device)


def state_tensors(state: MemoryState) -> dict[str, Tensor]:
    """Flatten a state into named tensors.

    Returns:
        Copies in main memory, which `with_tensors` takes.
    """
    tensors = {
        "num_cached": state.num_cached,
        "num_pending": state.num_pending,
        "position": state.position,
    }
    for prefix, layers in (("xl_cache", state.xl_cache), ("pending", state.pending or ())):
        for index, layer in enumerate(layers):
            tensors[f"{prefix}.{index}.keys"] = layer.keys
            tensors[f"{prefix}.{index}.values"] = layer.values
    for index, store in state.stores.items():
        for name, tensor in store.state_dict().items():
            tensors[f"store.{index}.{name}"] = tensor
    # counters of rows that never diverged may be one tensor; files want each of its own
    return {name: tensor.detach().to("cpu", copy=True) for name, tensor in tensors.items()}


def state_from_tensors(
    layout: MemoryLayout, tensors: Mapping[str, Tensor], *, memory_size: int
) -> MemoryState:
    """Make a state of what `state_tensors` returned.

    Args:
        layout: The layout of the model that will use it.
        tensors: Of a state of the same layout.
        memory_size: Entries per row and head that its kNN memory holds; 0 for none.

    Returns:
        The state, in main memory.
    """
    empty = MemoryState.empty(
        layout,
        len(tensors["position"]),
        memory_size=memory_size if layout.knn_memory else None,
        dtype=tensors["xl_cache.0.keys"].dtype,
    )
    return with_tensors(empty, tensors)


def with_tensors(empty: MemoryState, tensors: Mapping[str, Tensor]) -> MemoryState:
    """Fill an empty state with what `state_tensors` returned.

    Returns:
        The filled state; `empty` is used up.
    """
    device = empty.position.device
    tensors = {name: tensor.to(device) for name, tensor in tensors.items()}

    def layers(prefix: str) -> tuple[KeyValues, ...]:
        count = sum(name.startswith(f"{prefix}.") for name in tensors) // 2
        return tuple(
            KeyValues(tensors[f"{prefix}.{index}.keys"], tensors[f"{prefix}.{index}.values"])
            for index in range(count)
        )

    stores = {}
    for index, store in empty.stores.items():
        prefix = f"store.{index}."
        mine = {
            name.removeprefix(prefix): tensor
            for name, tensor in tensors.items()
            if name.startswith(prefix)
        }
        stores[index] = store.load_state_dict(mine)
    return replace(
        empty,
        xl_cache=layers("xl_cache"),
        pending=layers("pending") or None,
        num_cached=tensors["num_cached"],
        num_pending=tensors["num_pending"],
        position=tensors["position"],
        stores=stores,
    )
