"""Tiny models for tests, with weights large enough that attention is not flat."""

from dataclasses import replace

import torch

from byheart.memory.config import KnnMemoryConfig
from byheart.models.config import DecoderConfig
from byheart.models.decoder import Decoder


def tiny_config(
    *, memory: KnnMemoryConfig | None = None, memory_size: int = 41, **changes: object
) -> DecoderConfig:
    """Return a decoder config of two layers in which all sizes are different primes.

    Args:
        memory: The kNN memory; `None` for top-5 of `memory_size` entries in the second layer.
        memory_size: Entries of that memory; 0 for no memory.
        changes: Other fields of `DecoderConfig`.

    Returns:
        The config.
    """
    if memory is None and memory_size:
        memory = KnnMemoryConfig(layers=(1,), memory_size=memory_size, top_k=min(5, memory_size))
    config = DecoderConfig(
        vocab_size=31,
        num_layers=2,
        embed_dim=23,
        num_heads=3,
        head_dim=8,
        hidden_dim=37,
        segment_length=7,
        xl_cache_length=7,
        knn_memory=memory,
    )
    return replace(config, **changes)  # type: ignore[arg-type]


def tiny_decoder(config: DecoderConfig | None = None, *, seed: int = 0) -> Decoder:
    """Build a decoder in eval mode whose every parameter is random, gates and biases too.

    Returns:
        The decoder.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        decoder = Decoder(config or tiny_config()).eval()
    with torch.no_grad():
        for parameter in decoder.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return decoder


def random_tokens(batch: int, length: int, *, vocab_size: int = 31, seed: int = 1) -> torch.Tensor:
    """Draw token ids.

    Returns:
        `[batch, length]` ids below `vocab_size`.
    """
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, vocab_size, (batch, length), generator=generator)
