"""Put memory on a pretrained decoder: `attach`."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from transformers import PreTrainedModel

from byheart.adapters.attach_config import AttachConfig
from byheart.adapters.attention_layers import find_attentions
from byheart.adapters.memory_model import MemoryModel
from byheart.memory.config import KnnMemoryConfig


def attach(
    model: PreTrainedModel,
    *,
    knn: KnnMemoryConfig | None = None,
    layers: Sequence[str] | None = None,
    **options: Any,
) -> MemoryModel:
    """Put a kNN memory and an XL cache on a pretrained decoder, in place.

        model = AutoModelForCausalLM.from_pretrained(...)
        memory_model = byheart.attach(model, knn=KnnMemoryConfig(layers=(8,), memory_size=65_536))

    With its gates closed, as they are at first, and without an XL cache, the model computes what
    it did before, bit for bit. `memory_model.detach()` takes everything off again.

    Args:
        model: A causal language model of Hugging Face with its weights.
        knn: The kNN memory, `None` for none.
        layers: Names of the attention modules that read the memory, instead of `knn.layers`.
        options: The other fields of `AttachConfig`, such as `xl_cache_length`.

    Returns:
        The model with memory.

    Raises:
        ValueError: If the model cannot use this memory. It is not changed then.
    """
    if layers is not None and knn is None:
        msg = "layers are for a kNN memory, got knn=None. Pass knn, or leave layers out."
        raise ValueError(msg)
    if layers is not None and knn is not None:
        if isinstance(layers, str):
            msg = f"layers must be a list of names, got {layers!r}. Write layers=[{layers!r}]."
            raise ValueError(msg)
        names = [name for name, _ in find_attentions(model)]
        unknown = [name for name in layers if name not in names]
        if unknown:
            msg = f"layers must be attention modules, such as {names[-1]!r}, got {unknown[0]!r}."
            raise ValueError(msg)
        knn = replace(knn, layers=tuple(names.index(name) for name in layers))
    config = AttachConfig(knn=knn, **options)
    config.require_effect()
    return MemoryModel(model, config)
