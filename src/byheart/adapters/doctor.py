"""Say whether a model can have a memory, and what it would cost, before its weights are there."""

import copy
import os
import time
from dataclasses import dataclass, replace
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig

from byheart.adapters.attach_checks import require_possible
from byheart.adapters.attach_config import AttachConfig
from byheart.adapters.attention_hook import hook_of
from byheart.adapters.attention_layers import AttentionLayers, find_attentions
from byheart.adapters.families import max_positions
from byheart.adapters.loading import load_config_of
from byheart.adapters.memory_model import MemoryModel
from byheart.memory.dense import DenseStore
from byheart.memory.ring import RingCursor

# a trial model of more parameters has them in bfloat16
_WIDE_PARAMETERS = 200_000_000
# tokens that a trial model knows: it reads five
_TRIAL_VOCABULARY = 64
# entries of the memory whose reading is timed, and most tokens that the model is timed with
_TIMED_ENTRIES = 16_384
_TIMED_TOKENS = 128


@dataclass(frozen=True, kw_only=True, slots=True)
class Diagnosis:
    """What is known of a model from its config alone."""

    model_type: str
    """The family."""
    reason: str | None
    """Why it cannot have this memory; `None` if it can."""
    layers: tuple[str, ...] = ()
    """Names of its attention modules."""
    rotations: tuple[str, ...] = ()
    """How each kind of layer, in the order of the first layers, rotates its keys."""
    memory_layers: tuple[str, ...] = ()
    """Names of those that would read the memory."""
    num_parameters: int = 0
    """Parameters of the model."""
    memory_bytes: int = 0
    """Size of the kNN memory of a row, full."""
    xl_cache_bytes: int = 0
    """Size of the XL cache of a row."""
    search_share: float = 0.0
    """Arithmetic of the exact search of a full memory, as a share of that of the model's weights
    (all of them, also experts that a token does not meet)."""
    read_microseconds: float | None = None
    """Estimate of what reading a full memory adds to the time of a token on this machine: search
    and attention of all memory layers, for a row that reads a whole segment at once, without
    backward pass. Measured with random entries of one key-value head; for more entries than
    16,384 in proportion. `None` without a memory, and for a store other than `dense`."""
    model_microseconds: float | None = None
    """Estimate of the time of a token without memory, likewise: that of the first layers, with
    random weights in the precision that the config names, in proportion to the weights that are
    multiplied (also of experts that a token does not meet)."""
    memory_size: int = 0
    """Entries of the memory when it is full."""
    max_document_tokens: int | None = None
    """Most tokens of a document that it can tell apart; `None` for any number."""

    @property
    def is_supported(self) -> bool:
        """Whether the model can have this memory."""
        return self.reason is None

    def document_seconds(self, num_tokens: int) -> tuple[float, float] | None:
        """Estimate how long a document is read.

        The memory holds what was read before, so it is searched in part until it is full.

        Args:
            num_tokens: Length of the document.

        Returns:
            Seconds of the model alone, and those that the memory adds; `None` if not known, as of
            a store other than `dense`.
        """
        if self.model_microseconds is None:
            return None
        if self.memory_size == 0:
            return self.model_microseconds * num_tokens / 1e6, 0.0
        if self.read_microseconds is None:
            return None
        size = min(self.memory_size, num_tokens)
        # from nothing to `size` entries in even steps, and as many to the end
        share = (size / 2 + num_tokens - size) / num_tokens * size / self.memory_size
        times = self.model_microseconds, self.read_microseconds * share
        return times[0] * num_tokens / 1e6, times[1] * num_tokens / 1e6


def diagnose(source: str | os.PathLike[str] | PreTrainedConfig, config: AttachConfig) -> Diagnosis:
    """Find out whether a model can have a memory.

    The model is built without weights to look at its layers, and its first layers are built with
    random weights of their real size for the trial that `attach` makes.

    Args:
        source: Folder with the model's config.json, or its name on the Hugging Face hub, from which
            nothing but the config is fetched; or that config.
        config: The memory.

    Returns:
        What was found.

    Raises:
        CheckpointError: If there is no such config.
    """
    model_config = source if isinstance(source, PreTrainedConfig) else load_config_of(source)
    family = str(model_config.model_type)
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(model_config)
        names = [name for name, _ in find_attentions(model)]
        require_possible(model, config)
        config = config.resolve(len(names))
        num_parameters = sum(weight.numel() for weight in model.parameters())
        trial = _trial_model(model_config)
        rotations = _rotations(trial, config)
        dtype = getattr(model_config, "dtype", None) or torch.float32
        model_microseconds = _model_microseconds(trial.model.to(dtype), config.segment_length)
    except ValueError as error:
        return Diagnosis(model_type=family, reason=str(error))
    except (RuntimeError, TypeError, LookupError, AttributeError, StrictDataclassError) as error:
        msg = f"{family} failed in a trial of its first layers: {error}. Use another model."
        return Diagnosis(model_type=family, reason=msg)
    layers = () if config.knn is None else config.knn.layers
    first = trial.layers
    width = first.num_kv_heads * first.head_dim
    size = 0 if config.knn is None else config.knn.memory_size
    entry_bytes = 0 if config.knn is None else config.knn.torch_dtype.itemsize
    embedding = model.get_input_embeddings().weight.numel()
    search = 2 * size * first.num_heads * first.head_dim * len(layers)
    goes_on = config.xl_cache_length > 0 and not first.has_rotation
    return Diagnosis(
        model_type=family,
        reason=None,
        layers=tuple(names),
        rotations=rotations,
        memory_layers=tuple(names[layer] for layer in layers),
        num_parameters=num_parameters,
        memory_bytes=2 * size * width * entry_bytes * len(layers),
        xl_cache_bytes=2 * config.xl_cache_length * width * dtype.itemsize * len(names),
        search_share=search / (2 * max(num_parameters - embedding, 1)),
        read_microseconds=_read_microseconds(config, first),
        model_microseconds=model_microseconds * _multiplied(model) / _multiplied(trial.model),
        memory_size=size,
        max_document_tokens=max_positions(model) if goes_on else None,
    )


def _trial_model(model_config: Any) -> MemoryModel:
    """Build the first layers, one of each kind at least, with a small memory.

    Returns:
        The model with memory.
    """
    config = copy.deepcopy(model_config)
    kinds = getattr(config, "layer_types", None)
    count = min(2, config.num_hidden_layers)
    if kinds:
        count = max(count, *(kinds.index(kind) + 1 for kind in set(kinds)))
        config.layer_types = kinds[:count]
    turns = list(getattr(config, "no_rope_layers", None) or ())
    if 0 in turns:
        count = max(count, turns.index(0) + 1)
        config.no_rope_layers = turns[:count]
        if kinds:
            config.layer_types = kinds[:count]
    config.num_hidden_layers = count
    config.vocab_size = _TRIAL_VOCABULARY
    # those of the real vocabulary are not there; not every family knows what to do without
    config.pad_token_id = config.bos_token_id = config.eos_token_id = 0
    with torch.device("meta"):
        numbers = sum(w.numel() for w in AutoModelForCausalLM.from_config(config).parameters())
    dtype = torch.bfloat16 if numbers > _WIDE_PARAMETERS else torch.float32
    model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    return MemoryModel(model, AttachConfig(segment_length=8))


def _multiplied(model: Any) -> int:
    """Count the weights of matrix products: all but those that are looked up.

    Returns:
        Their number.
    """
    looked_up = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    # it may be an embedding, too
    looked_up.discard(id(model.get_output_embeddings().weight))
    return sum(w.numel() for w in model.parameters() if id(w) not in looked_up)


def _model_microseconds(model: Any, segment_length: int) -> float:
    """Time how long a trial model reads a token of a segment.

    Returns:
        Microseconds.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model.to(device)
    ids = torch.zeros(1, min(segment_length, _TIMED_TOKENS), dtype=torch.long, device=device)
    seconds = []
    with torch.no_grad():
        # the first warms up
        for _ in range(3):
            start = time.perf_counter()
            # waits for a device
            float(model(input_ids=ids, use_cache=False).logits[0, -1, 0])
            seconds.append(time.perf_counter() - start)
    return 1e6 * min(seconds[1:]) / ids.shape[1]


def _read_microseconds(config: AttachConfig, layers: AttentionLayers) -> float | None:
    """Time how long a full memory is read, per token of a segment.

    Returns:
        The estimate for all memory layers.
    """
    knn = config.knn
    if knn is None or knn.store != "dense":
        return None
    buckets = None if knn.search == "exact" else knn.num_buckets or knn.top_k
    size = max(min(knn.memory_size, _TIMED_ENTRIES), knn.top_k, buckets or 1)
    size -= size % (buckets or 1)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    keys, values = (
        torch.randn(1, 1, size, layers.head_dim, device=device).to(knn.torch_dtype)
        for _ in range(2)
    )
    cursor = RingCursor(memory_size=size, num_written=torch.tensor([size], device=device))
    store = DenseStore(keys=keys, values=values, cursor=cursor, num_buckets=buckets)
    group = layers.num_heads // layers.num_kv_heads
    queries = torch.randn(1, group, config.segment_length, layers.head_dim, device=device)
    scale, seconds = torch.ones(group, device=device), []
    with torch.no_grad():
        # the first warms up
        for _ in range(3):
            start = time.perf_counter()
            read = store.attend(queries, scale, knn.top_k, knn.age_slope)
            # waits for a device
            float(read.output.sum())
            seconds.append(time.perf_counter() - start)
    share = knn.memory_size / size * layers.num_kv_heads * len(knn.layers)
    return 1e6 * min(seconds[1:]) * share / config.segment_length


def _rotations(trial: MemoryModel, config: AttachConfig) -> tuple[str, ...]:
    """Describe how the layers of a trial model rotate, and try the options on it.

    Returns:
        A word for each layer.
    """
    words = []
    for module in trial.layers.modules:
        hook = hook_of(module)
        rotation = None if hook is None else hook.rotation
        if rotation is None:
            words.append("none")
        else:
            part = rotation.width
            words.append("whole" if part is None else f"first {part} of {trial.layers.head_dim}")
    # the smallest memory that goes with the other options
    knn = config.knn and replace(
        config.knn, layers=(0,), memory_size=config.knn.num_buckets or config.knn.top_k
    )
    MemoryModel(trial.detach(), replace(config, knn=knn)).detach()
    return tuple(words)
