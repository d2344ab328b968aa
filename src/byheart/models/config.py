"""Configuration of the from-scratch model, and its named sizes."""

from dataclasses import dataclass, replace
from typing import Literal

from byheart.choices import require_choices, require_finite, require_whole
from byheart.memory.config import KnnMemoryConfig
from byheart.memory.layout import MemoryLayout

_SCALE = 10.0


@dataclass(frozen=True, kw_only=True, slots=True)
class DecoderConfig:
    """The Memorizing Transformer: a decoder with an XL cache and, in some layers, a kNN memory.

    The defaults are the paper's model without memory (Wu et al. 2022, arXiv:2203.08913).
    """

    vocab_size: int
    """Entries of the tied input and output embedding."""
    num_layers: int = 12
    """Transformer layers."""
    embed_dim: int = 1024
    """Width of the residual stream."""
    num_heads: int = 8
    """Attention heads."""
    head_dim: int = 128
    """Width of one head."""
    hidden_dim: int = 4096
    """Width inside the feed-forward block."""
    segment_length: int = 512
    """Tokens per segment; memory is written when a segment is complete."""
    xl_cache_length: int = 512
    """Previous tokens whose keys and values every layer keeps (Transformer-XL); 0 for none."""
    window_length: int | None = None
    """Previous tokens that each token sees locally, as far as the XL cache and its segment hold
    them; `None`: the larger of `segment_length` and `xl_cache_length`, or with
    `knn_memory.write='evicted'` their sum, so that no token is in neither window nor memory."""
    self_visible: bool = False
    """Whether a token attends to itself (the authors: not)."""
    position_bias: Literal["t5", "none"] = "t5"
    """Relative bias of local attention; retrieved entries never get one."""
    normalize_qk: bool = True
    """Scale queries and keys to length 1, and scores by a learned factor per head."""
    attention_scale_init: float = _SCALE
    """First value of that factor. The authors start at 1 under Adafactor; AdamW does not get it
    from there to about 10 in a reasonable time."""
    gate_bias_init: float = 0.0
    """First value of the memory gate's bias; the gate is its sigmoid."""
    empty_slots: Literal["masked", "zeros"] = "masked"
    """What was never written: left out, so that a row without memory has gate 0; or, as in the
    authors' code, counted as keys and values of zero in the XL cache and the memory."""
    dropout: float = 0.0
    """Dropout after the norms, after the feed-forward block and before the output."""
    knn_memory: KnnMemoryConfig | None = None
    """The kNN memory; `None` for a plain decoder or Transformer-XL."""

    def __post_init__(self) -> None:
        require_choices(self)
        require_finite(self)
        require_whole(self)
        for name in (
            "vocab_size",
            "num_layers",
            "embed_dim",
            "num_heads",
            "head_dim",
            "hidden_dim",
        ):
            self._require_at_least(name, 1)
        self._require_at_least("segment_length", 1)
        self._require_at_least("xl_cache_length", 0)
        if self.window_length is not None:
            self._require_at_least("window_length", 1)
        if not 0 <= self.dropout < 1:
            msg = f"dropout must be at least 0 and below 1, got {self.dropout}."
            raise ValueError(msg)
        if self.attention_scale_init <= 0:
            msg = f"attention_scale_init must be above 0, got {self.attention_scale_init}."
            raise ValueError(msg)
        if not self.normalize_qk and self.attention_scale_init != _SCALE:
            msg = (
                f"attention_scale_init has no effect with normalize_qk=False, got "
                f"{self.attention_scale_init}: the scale then starts at 1 / sqrt(head_dim)."
            )
            raise ValueError(msg)
        if self.knn_memory is not None:
            self._check_memory(self.knn_memory)

    def _require_at_least(self, name: str, least: int) -> None:
        value = getattr(self, name)
        if value < least:
            msg = f"{name} must be at least {least}, got {value}."
            raise ValueError(msg)

    def _check_memory(self, knn: KnnMemoryConfig) -> None:
        outside = [layer for layer in knn.layers if not 0 <= layer < self.num_layers]
        if outside:
            msg = (
                f"knn_memory.layers must be between 0 and {self.num_layers - 1} (the decoder has "
                f"{self.num_layers} layers), got {outside[0]}."
            )
            raise ValueError(msg)
        everything = self.segment_length + self.xl_cache_length
        if knn.write == "evicted" and self.window < everything:
            msg = (
                f"window_length must be segment_length + xl_cache_length ({everything}) with "
                f"knn_memory.write='evicted', got {self.window_length}: tokens between the window "
                "and the memory would be seen nowhere. Leave window_length out."
            )
            raise ValueError(msg)
        if knn.combine == "joint" and self.gate_bias_init != 0:
            msg = (
                f"gate_bias_init has no effect with knn_memory.combine='joint', got "
                f"{self.gate_bias_init}. Leave it out, or use combine='gate'."
            )
            raise ValueError(msg)
        if knn.store == "faiss" and self.empty_slots == "zeros":
            msg = (
                "empty_slots='zeros' needs knn_memory.store='dense', got 'faiss': only the exact "
                "mode of the authors counts empty slots."
            )
            raise ValueError(msg)
        if len(set(knn.layers)) != len(knn.layers):
            msg = f"knn_memory.layers must not repeat a layer, got {list(knn.layers)}."
            raise ValueError(msg)

    @property
    def window(self) -> int:
        """Previous tokens that each token sees locally."""
        if self.window_length is not None:
            return self.window_length
        if self.knn_memory is not None and self.knn_memory.write == "evicted":
            return self.segment_length + self.xl_cache_length
        return max(self.segment_length, self.xl_cache_length)

    @property
    def memory_layout(self) -> MemoryLayout:
        """The shape of the model's memory."""
        return MemoryLayout(
            num_layers=self.num_layers,
            num_kv_heads=self.num_heads,
            head_dim=self.head_dim,
            segment_length=self.segment_length,
            xl_cache_length=self.xl_cache_length,
            knn_memory=self.knn_memory,
            empty_slots=self.empty_slots,
            model_type="decoder",
        )


# Width and depth of each preset; the memory layer is the paper's choice, at three quarters.
_PRESETS: dict[str, dict[str, int]] = {
    "tiny": {
        "num_layers": 2, "embed_dim": 32, "num_heads": 2, "head_dim": 16, "hidden_dim": 64,
        "segment_length": 16, "xl_cache_length": 16,
    },
    "5m": {
        "num_layers": 6, "embed_dim": 256, "num_heads": 4, "head_dim": 64, "hidden_dim": 1024,
        "segment_length": 256, "xl_cache_length": 256,
    },
    "20m": {
        "num_layers": 6, "embed_dim": 512, "num_heads": 8, "head_dim": 64, "hidden_dim": 2048,
    },
    "37m": {
        "num_layers": 12, "embed_dim": 512, "num_heads": 8, "head_dim": 64, "hidden_dim": 2048,
    },
    "184m": {},
}  # fmt: skip

PRESETS = tuple(_PRESETS)
"""Names of the sizes: one for tests, 5M, 19M and 38M parameters without the embedding, and the
paper's 151M (184M with its embedding of 32K)."""


def preset(
    name: str, vocab_size: int, *, memory_size: int = 0, top_k: int | None = None, **changes: object
) -> DecoderConfig:
    """Return the config of a named size.

    Args:
        name: One of `PRESETS`.
        vocab_size: Entries of the embedding.
        memory_size: Entries of the kNN memory in one layer at three quarters of the depth (the
            paper's 9th of 12); 0 for none.
        top_k: Entries retrieved per query; `None` for the paper's 32.
        changes: Any other field of `DecoderConfig`.

    Returns:
        The config.

    Raises:
        ValueError: If there is no such size, or `top_k` comes without a memory.
    """
    if name not in _PRESETS:
        msg = f"preset must be one of {', '.join(PRESETS)}, got {name!r}."
        raise ValueError(msg)
    if top_k is not None and not memory_size:
        msg = f"top_k has no effect without a memory, got {top_k}. Pass memory_size, too."
        raise ValueError(msg)
    values: dict[str, object] = {**_PRESETS[name], **changes}
    config = DecoderConfig(vocab_size=vocab_size, **values)  # type: ignore[arg-type]
    if not memory_size:
        return config
    layer = max(0, config.num_layers * 3 // 4 - 1)
    knn = KnnMemoryConfig(layers=(layer,), memory_size=memory_size, top_k=top_k or 32)
    return replace(config, knn_memory=knn)
