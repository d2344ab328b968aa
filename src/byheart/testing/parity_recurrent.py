"""Compare recurrent memory with what the authors of the Recurrent Memory Transformer computed.

A directory holds `model/`, a Hugging Face checkpoint, and `expected.safetensors`, recorded in
float32 without dropout and with full backpropagation through time
(booydar/recurrent-memory-transformer). Its metadata name `segment_length` and
`num_memory_tokens`, and for an encoder the special tokens `cls` and `sep`. With B rows of T tokens,
m memory tokens of width d, N segments, vocabulary V and K classes:

========================= ================ ====================================================
tensor                    shape            meaning
========================= ================ ====================================================
`memory_tokens`           m, d             first memory
`input_ids`               B, T             text
`lengths`                 B                tokens of each row, if they differ (optional)
`labels_mask`             B, T             decoders: places whose next token is in the loss
`labels`                  B                encoders: class of each row
`logits`                  B, T, V or B, K  what the head says
`loss`                    1                its mean
`memory_states`           N, B, m, d       decoders: memory after each segment
`grad_memory_tokens`      m, d             gradient of the loss
`grad_input_embeddings`   V, d             the same
========================= ================ ====================================================
"""

from collections.abc import Mapping
from dataclasses import replace
from os import PathLike
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.nn import functional

from byheart.adapters.loading import load_transformer
from byheart.adapters.recurrent import RecurrentMemory, RecurrentOutput
from byheart.errors import CheckpointError, DataError
from byheart.models.recurrent_config import RecurrentMemoryConfig
from byheart.ops.losses import IGNORED

_REQUIRED = (
    "memory_tokens",
    "input_ids",
    "logits",
    "loss",
    "grad_memory_tokens",
    "grad_input_embeddings",
)


def recurrent_differences(directory: str | PathLike[str]) -> dict[str, float]:
    """Run a recorded model with byheart's recurrent memory.

    Args:
        directory: A directory laid out as this module describes, of any architecture and
            dimensions.

    Returns:
        The largest absolute difference, for each tensor that was recorded.

    Raises:
        DataError: If something is missing or does not fit.
    """
    path = Path(directory)
    tensors, metadata = _read(path / "expected.safetensors")
    try:
        memory_model = RecurrentMemory(load_transformer(path / "model"), _config(metadata, path))
    except (CheckpointError, ValueError) as error:
        msg = f"{path} must hold a model that fits its metadata: {error}"
        raise DataError(msg) from error
    memory_model.eval()
    if memory_model.memory.memory.shape != tensors["memory_tokens"].shape:
        msg = (
            f"memory_tokens in {path} must have the shape "
            f"{list(memory_model.memory.memory.shape)}, got "
            f"{list(tensors['memory_tokens'].shape)}. Record it again."
        )
        raise DataError(msg)
    with torch.no_grad():
        memory_model.memory.memory.copy_(tensors["memory_tokens"])
    mask = None
    if "lengths" in tensors:
        columns = torch.arange(tensors["input_ids"].shape[1])
        mask = columns < tensors["lengths"][:, None]
    out = _run(memory_model, tensors, mask)
    assert out.loss is not None
    out.loss.backward()  # type: ignore[no-untyped-call]
    found = {
        "logits": out.logits,
        "loss": out.loss,
        "grad_memory_tokens": memory_model.memory.memory.grad,
        "grad_input_embeddings": memory_model.model.get_input_embeddings().weight.grad,
    }
    if "memory_states" in tensors:
        found["memory_states"] = _memory_states(memory_model, tensors["input_ids"], mask)
    if mask is not None and out.logits is not None and out.logits.ndim == 3:
        found["logits"], tensors["logits"] = out.logits[mask], tensors["logits"][mask]
    return {name: _difference(tensor, tensors[name], name, path) for name, tensor in found.items()}


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    try:
        with safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            metadata = dict(file.metadata() or {})
    except (OSError, SafetensorError) as error:
        msg = f"{path} cannot be read: {error}. Name a recorded directory."
        raise DataError(msg) from error
    missing = [name for name in _REQUIRED if name not in tensors]
    if "labels" not in tensors and "labels_mask" not in tensors:
        missing.append("labels or labels_mask")
    if missing:
        msg = f"{path} lacks the tensor {missing[0]}. Record it again."
        raise DataError(msg)
    return tensors, metadata


def _config(metadata: Mapping[str, str], path: Path) -> RecurrentMemoryConfig:
    """Describe the authors' memory.

    Returns:
        Its config: encoders have the short segment first, decoders last.

    Raises:
        DataError: If the metadata are incomplete, or what is needed of them is no number.
    """
    names = ("segment_length", "num_memory_tokens", "cls", "sep")
    numbers = {name: _number(metadata, name, path) for name in names if name in metadata}
    if not {"segment_length", "num_memory_tokens"} <= numbers.keys():
        msg = (
            f"The metadata in {path} must name segment_length and num_memory_tokens, they name "
            f"{', '.join(sorted(metadata)) or 'nothing'}. Record it again."
        )
        raise DataError(msg)
    separator = (numbers["sep"],) if "sep" in numbers else ()
    return RecurrentMemoryConfig(
        alignment="right" if separator else "left",
        start_ids=(numbers["cls"],) if "cls" in numbers else (),
        separator_ids=separator,
        end_ids=separator,
        segment_length=numbers["segment_length"],
        num_memory_tokens=numbers["num_memory_tokens"],
    )


def _number(metadata: Mapping[str, str], name: str, path: Path) -> int:
    try:
        return int(metadata[name])
    except ValueError as error:
        msg = f"{name} in the metadata in {path} must be a number, got {metadata[name]!r}."
        raise DataError(msg) from error


def _run(
    memory_model: RecurrentMemory, tensors: Mapping[str, Tensor], mask: Tensor | None
) -> RecurrentOutput:
    ids = tensors["input_ids"]
    if "labels_mask" not in tensors:
        out = memory_model(ids, attention_mask=mask, labels=tensors["labels"])
    else:
        following = functional.pad(ids[:, 1:], (0, 1), value=IGNORED)
        targets = following.masked_fill(~tensors["labels_mask"], IGNORED)
        out = memory_model(ids, attention_mask=mask, targets=targets, logits_to_keep=ids.shape[1])
    assert isinstance(out, RecurrentOutput)
    return out


@torch.no_grad()
def _memory_states(memory_model: RecurrentMemory, input_ids: Tensor, mask: Tensor | None) -> Tensor:
    """Read segment by segment.

    Returns:
        The memory after each.
    """
    # the authors' last segment changes the memory even if it is short: nothing stays pending
    config = replace(memory_model.memory_config, alignment="center")
    reader = RecurrentMemory(memory_model.model, config).eval()
    reader.memory.load_state_dict(memory_model.memory.state_dict())
    state, states = reader.new_state(len(input_ids)), []
    length = config.segment_length
    for start in range(0, input_ids.shape[1], length):
        piece = slice(start, start + length)
        out = reader(
            input_ids[:, piece],
            attention_mask=None if mask is None else mask[:, piece],
            state=state,
            logits_to_keep=0,
        )
        state = state.commit(out.new_entries)
        states.append(state.memory)
    return torch.stack(states)


def _difference(found: Tensor | None, expected: Tensor, name: str, path: Path) -> float:
    if found is None or found.numel() != expected.numel():
        shape = None if found is None else list(found.shape)
        msg = f"{name} in {path} must have the shape {shape}, got {list(expected.shape)}."
        raise DataError(msg)
    return (found.detach().flatten() - expected.flatten()).abs().max().item()
