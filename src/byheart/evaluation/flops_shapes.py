"""Shapes of transformers, and those of published models."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from byheart.choices import require_choices

__all__ = ["NAMED_SHAPES", "ModelKind", "ModelShape"]

ModelKind = Literal["decoder", "encoder"]


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelShape:
    """The widths that decide how many FLOPs a transformer needs."""

    name: str
    """What tables call the model."""
    kind: ModelKind
    """A decoder's tokens see earlier tokens, an encoder's all."""
    num_layers: int
    """Transformer layers."""
    embed_dim: int
    """Width of the residual stream."""
    hidden_dim: int
    """Width inside the feed-forward block."""
    num_heads: int
    """Query heads."""
    vocab_size: int
    """Entries of the vocabulary."""
    num_kv_heads: int | None = None
    """Key-value heads, shared by groups of query heads; `None`: one per query head."""
    head_dim: int | None = None
    """Width of one head; `None`: `embed_dim / num_heads`."""
    embedding_dim: int | None = None
    """Width of the token embedding, where it is projected to `embed_dim`; `None`: the same."""
    gated_mlp: bool = False
    """Whether the feed-forward block has three products (SwiGLU and its kin) and not two."""

    def __post_init__(self) -> None:
        require_choices(self)
        for name in (
            "num_layers", "embed_dim", "hidden_dim", "num_heads", "vocab_size", "num_kv_heads",
            "head_dim", "embedding_dim",
        ):  # fmt: skip
            value = getattr(self, name)
            if value is not None and value < 1:
                msg = f"{name} must be at least 1, got {value}."
                raise ValueError(msg)
        if self.head_dim is None and self.embed_dim % self.num_heads:
            msg = (
                f"embed_dim must be a multiple of num_heads ({self.num_heads}), got "
                f"{self.embed_dim}. Give head_dim if heads have a width of their own."
            )
            raise ValueError(msg)
        if self.num_kv_heads is not None and self.num_heads % self.num_kv_heads:
            msg = (
                f"num_heads must be a multiple of num_kv_heads ({self.num_kv_heads}), got "
                f"{self.num_heads}."
            )
            raise ValueError(msg)

    @property
    def query_dim(self) -> int:
        """Width of the queries of all heads together."""
        return self.num_heads * (self.head_dim or self.embed_dim // self.num_heads)

    @property
    def kv_dim(self) -> int:
        """Width of the keys, and of the values, of all heads together."""
        return self.query_dim // self.num_heads * (self.num_kv_heads or self.num_heads)


# layers, embed_dim, hidden_dim, heads
_OPT = {
    "125m": (12, 768, 3072, 12), "350m": (24, 1024, 4096, 16), "1.3b": (24, 2048, 8192, 32),
    "2.7b": (32, 2560, 10_240, 32), "6.7b": (32, 4096, 16_384, 32), "13b": (40, 5120, 20_480, 40),
    "30b": (48, 7168, 28_672, 56), "66b": (64, 9216, 36_864, 72), "175b": (96, 12_288, 49_152, 96),
}  # fmt: skip
_GPT2 = {
    "gpt2": (12, 768, 3072, 12), "gpt2-medium": (24, 1024, 4096, 16),
    "gpt2-large": (36, 1280, 5120, 20), "gpt2-xl": (48, 1600, 6400, 25),
}  # fmt: skip
_BERT = {"base": (12, 768, 3072, 12), "large": (24, 1024, 4096, 16)}
# layers, embed_dim, hidden_dim, heads, key-value heads, vocab_size
_LLAMA = {
    "llama-2-7b": (32, 4096, 11_008, 32, 32, 32_000),
    "llama-2-13b": (40, 5120, 13_824, 40, 40, 32_000),
    "llama-2-70b": (80, 8192, 28_672, 64, 8, 32_000),
    "llama-3-8b": (32, 4096, 14_336, 32, 8, 128_256),
    "llama-3-70b": (80, 8192, 28_672, 64, 8, 128_256),
    "llama-3.2-1b": (16, 2048, 8192, 32, 8, 128_256),
    "llama-3.2-3b": (28, 3072, 8192, 24, 8, 128_256),
}


def _plain(
    name: str,
    kind: ModelKind,
    widths: tuple[int, int, int, int],
    vocab_size: int,
    embedding_dim: int | None = None,
) -> ModelShape:
    num_layers, embed_dim, hidden_dim, num_heads = widths
    return ModelShape(
        name=name,
        kind=kind,
        num_layers=num_layers,
        embed_dim=embed_dim,
        hidden_dim=hidden_dim,
        num_heads=num_heads,
        vocab_size=vocab_size,
        embedding_dim=embedding_dim,
    )


def _llama(name: str, widths: tuple[int, int, int, int, int, int]) -> ModelShape:
    num_layers, embed_dim, hidden_dim, num_heads, num_kv_heads, vocab_size = widths
    return ModelShape(
        name=name,
        kind="decoder",
        num_layers=num_layers,
        embed_dim=embed_dim,
        hidden_dim=hidden_dim,
        num_heads=num_heads,
        vocab_size=vocab_size,
        num_kv_heads=num_kv_heads,
        gated_mlp=True,
    )


_SHAPES = (
    *(
        # the one OPT whose token embedding is narrower than the model
        _plain(f"opt-{size}", "decoder", widths, 50_272, 512 if size == "350m" else None)
        for size, widths in _OPT.items()
    ),
    *(_plain(name, "decoder", widths, 50_257) for name, widths in _GPT2.items()),
    *(_plain(f"bert-{size}", "encoder", widths, 30_522) for size, widths in _BERT.items()),
    *(_llama(name, widths) for name, widths in _LLAMA.items()),
)

NAMED_SHAPES: Mapping[str, ModelShape] = {shape.name: shape for shape in _SHAPES}
"""Published models: OPT (Zhang et al. 2022), GPT-2, BERT (uncased) and Llama 2, 3 and 3.2."""
