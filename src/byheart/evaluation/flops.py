"""FLOPs of a forward pass, term by term.

One multiply-add is two FLOPs. Two conventions say what counts: `REPORT` is the formula behind
Figure 3 of the report on RMT, `HONEST` what a careful implementation of today computes. Neither
counts norms, biases, activations, residuals, rotations of positions or the selection of the top k.
"""

from dataclasses import asdict, dataclass, fields

from byheart.evaluation.flops_shapes import ModelShape
from byheart.memory.config import KnnMemoryConfig

__all__ = [
    "CONVENTIONS",
    "HONEST",
    "REPORT",
    "Flops",
    "FlopsConvention",
    "forward_flops",
]


@dataclass(frozen=True, kw_only=True, slots=True)
class FlopsConvention:
    """What is counted, and how."""

    name: str
    """What results call it."""
    softmax_flops: int
    """FLOPs of the softmax per head, query and key."""
    vocab_matmuls: int | None
    """Products with the vocabulary per token: 0 for none, 1 for the logits, 2 for the embedding,
    too, as if it were a product; `None`: the logits of a decoder, none for an encoder."""
    is_causal: bool
    """Whether a decoder pays only for the keys that a query sees, itself and those before it."""
    counts_memory: bool
    """Whether memory tokens, special tokens and a kNN memory cost anything."""
    follows_shape: bool
    """Whether shared key-value heads, heads of their own width, gated feed-forward blocks and
    projected embeddings cost what they cost, or as much as in the first transformers."""

    def __post_init__(self) -> None:
        if self.softmax_flops < 0:
            msg = f"softmax_flops must be at least 0, got {self.softmax_flops}."
            raise ValueError(msg)
        if self.vocab_matmuls not in (None, 0, 1, 2):
            msg = f"vocab_matmuls must be 0, 1, 2 or None, got {self.vocab_matmuls}."
            raise ValueError(msg)

    def require_memory(self, what: str) -> None:
        """Refuse a memory if the convention counts none.

        Args:
            what: What the caller wants counted.

        Raises:
            ValueError: If memory is not counted.
        """
        if not self.counts_memory:
            msg = (
                f"The convention must count memory for {what}, got {self.name!r}, which does not. "
                "Use 'honest'."
            )
            raise ValueError(msg)


REPORT = FlopsConvention(
    name="report",
    softmax_flops=10,
    vocab_matmuls=1,
    is_causal=False,
    counts_memory=False,
    follows_shape=False,
)
"""The formula of Figure 3: 2·S·V·d + L·(6·S·d² + 2·S²·d + 10·h·S² + 2·S²·d + 2·S·d² + 4·S·d·f).

That is Hoffmann et al. 2022, appendix F, with one product with the vocabulary instead of two and 10
FLOPs per score in the softmax instead of 3; the published curves leave no other choice.

Source:
    Bulatov et al. 2023, Scaling Transformer to 1M tokens and beyond with RMT, "Computational
    efficiency" (arXiv:2304.11062v1).
"""

HONEST = FlopsConvention(
    name="honest",
    # the comparison for the maximum, its subtraction, the exponential, the sum and the division;
    # the factor of the scores can be multiplied into the queries
    softmax_flops=5,
    vocab_matmuls=None,
    is_causal=True,
    counts_memory=True,
    follows_shape=True,
)
"""What must be computed: no masked scores, every memory token, each product at its own shape."""

CONVENTIONS = {convention.name: convention for convention in (REPORT, HONEST)}
"""Both conventions by name."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Flops:
    """FLOPs of forward passes, term by term; see `forward_flops`."""

    embedding: int = 0
    """Width of the token embedding to that of the model, and the embedding taken as a product."""
    projections: int = 0
    """Queries, keys and values."""
    scores: int = 0
    """Queries times keys."""
    softmax: int = 0
    """Of the scores."""
    values: int = 0
    """Attention weights times values."""
    output: int = 0
    """Output projection of the attention."""
    feed_forward: int = 0
    """Feed-forward blocks."""
    search: int = 0
    """Exact search in the kNN memory."""
    retrieved: int = 0
    """Attention to what the search has found."""
    logits: int = 0
    """Final hidden states times the vocabulary."""

    @property
    def total(self) -> int:
        """All terms together."""
        return sum(asdict(self).values())

    @property
    def without_vocabulary(self) -> int:
        """All terms but those of the embedding and the logits."""
        return self.total - self.embedding - self.logits

    def times(self, count: int) -> "Flops":
        """Return the FLOPs of `count` such passes."""
        return Flops(**{name: count * value for name, value in asdict(self).items()})

    def plus(self, other: "Flops") -> "Flops":
        """Return the FLOPs of both."""
        names = (field.name for field in fields(self))
        return Flops(**{name: getattr(self, name) + getattr(other, name) for name in names})


def forward_flops(
    shape: ModelShape,
    length: int,
    convention: FlopsConvention = REPORT,
    *,
    num_outputs: int | None = None,
    knn_memory: KnnMemoryConfig | None = None,
) -> Flops:
    """Count the FLOPs of one forward pass over one sequence.

    With S tokens, L layers, width d, h heads of width D that share g key-value heads, feed-forward
    width f, vocabulary V, embedding width e, T tokens with an output, and P pairs of a query and a
    key that it sees (S², or S·(S + 1) / 2 for a decoder if the convention is causal):

    ============ ======================================= ===========================================
    term         FLOPs                                   products
    ============ ======================================= ===========================================
    embedding    2·S·e·d if e ≠ d                        [S, e] @ [e, d]
    projections  L · 2·S·d·(h + 2·g)·D                   [S, d] @ [d, h·D], 2 of [S, d] @ [d, g·D]
    scores       L · 2·P·h·D                             h of [S, D] @ [D, S]
    softmax      L · c·h·P                               c: `softmax_flops`
    values       L · 2·P·h·D                             h of [S, S] @ [S, D]
    output       L · 2·S·h·D·d                           [S, h·D] @ [h·D, d]
    feed_forward L · 2·n·S·d·f                           n: 2, or 3 if gated, of [S, d] @ [d, f]
    logits       2·T·e·V, and 2·T·d·e if e ≠ d           [T, e] @ [e, V]
    search       l · 2·S·M·h·D                           h of [S, D] @ [D, M]
    retrieved    l · S·h·(4·k·D + c·k)                   S·h of [1, D] @ [D, k] and [1, k] @ [k, D]
    ============ ======================================= ===========================================

    The last two are those of a kNN memory of M slots in l layers, of which each query reads the
    best k. The search scores every slot, written or not, as it does on a GPU; k of these scores are
    computed a second time, as they carry a gradient. A convention that does not follow the shape
    has h·D = g·D = e = d and n = 2; one with two products with the vocabulary adds 2·T·V·e to the
    embedding.

    Args:
        shape: The model.
        length: Tokens of the sequence, S.
        convention: What counts.
        num_outputs: Tokens with logits, T; `None` for all.
        knn_memory: The kNN memory; counted as searched exactly, whatever its `search` or `store`.

    Returns:
        The FLOPs, as exact integers.

    Raises:
        ValueError: If `length` is not positive, `num_outputs` is larger, or the convention or the
            model has no place for the memory.
    """
    if length < 1:
        msg = f"length must be at least 1, got {length}."
        raise ValueError(msg)
    outputs = length if num_outputs is None else num_outputs
    if not 0 <= outputs <= length:
        msg = f"num_outputs must be between 0 and length ({length}), got {outputs}."
        raise ValueError(msg)
    d, heads = shape.embed_dim, shape.num_heads
    query_dim, kv_dim, embedding_dim, num_products = d, d, d, 2
    if convention.follows_shape:
        query_dim, kv_dim = shape.query_dim, shape.kv_dim
        embedding_dim = shape.embedding_dim or d
        num_products = 3 if shape.gated_mlp else 2
    is_causal = convention.is_causal and shape.kind == "decoder"
    pairs = length * (length + 1) // 2 if is_causal else length**2
    resize = 2 * d * embedding_dim if embedding_dim != d else 0
    vocabulary = 2 * embedding_dim * shape.vocab_size
    matmuls = convention.vocab_matmuls
    if matmuls is None:
        matmuls = 1 if shape.kind == "decoder" else 0
    layer = Flops(
        projections=2 * length * d * (query_dim + 2 * kv_dim),
        scores=2 * pairs * query_dim,
        softmax=convention.softmax_flops * heads * pairs,
        values=2 * pairs * query_dim,
        output=2 * length * query_dim * d,
        feed_forward=2 * num_products * length * d * shape.hidden_dim,
    )
    rest = Flops(
        embedding=length * resize + (outputs * vocabulary if matmuls == 2 else 0),
        logits=outputs * (vocabulary + resize) if matmuls else 0,
    )
    total = layer.times(shape.num_layers).plus(rest)
    if knn_memory is None:
        return total
    return total.plus(_knn_flops(shape, length, convention, knn_memory))


def _knn_flops(
    shape: ModelShape, length: int, convention: FlopsConvention, memory: KnnMemoryConfig
) -> Flops:
    convention.require_memory("a kNN memory")
    outside = [layer for layer in memory.layers if not 0 <= layer < shape.num_layers]
    if outside:
        msg = (
            f"knn_memory.layers must be among the {shape.num_layers} layers of {shape.name}, got "
            f"{outside}. Layers count from 0."
        )
        raise ValueError(msg)
    queries, width = length * shape.num_heads, shape.query_dim // shape.num_heads
    layer = Flops(
        search=2 * queries * width * memory.memory_size,
        retrieved=queries * memory.top_k * (4 * width + convention.softmax_flops),
    )
    return layer.times(len(memory.layers))
