"""FLOPs of a document: full attention against segments with a memory."""

from dataclasses import asdict, dataclass

from byheart.evaluation.flops import REPORT, Flops, FlopsConvention, forward_flops
from byheart.evaluation.flops_shapes import ModelShape
from byheart.memory.config import KnnMemoryConfig

__all__ = ["FlopsComparison", "compare_flops"]

# [CLS], and [SEP] after the memory and after the text
_ENCODER_SPECIALS = 3


@dataclass(frozen=True, kw_only=True, slots=True)
class FlopsComparison:
    """A document read at once with full attention, and segment by segment with a memory."""

    shape: ModelShape
    """The model."""
    num_tokens: int
    """Tokens of the document."""
    num_segments: int
    """Segments; the last one may be short."""
    full_attention: Flops
    """One pass over the whole document."""
    recurrent: Flops
    """One pass per segment."""

    @property
    def ratio(self) -> float:
        """How many times the FLOPs of the segments full attention needs."""
        return self.full_attention.total / self.recurrent.total

    @property
    def ratio_without_vocabulary(self) -> float:
        """The same without embedding and logits."""
        return self.full_attention.without_vocabulary / self.recurrent.without_vocabulary

    def to_dict(self) -> dict[str, object]:
        """Give everything counted and derived, for JSON.

        Returns:
            Nested dictionaries; FLOPs are whole numbers.
        """
        both = (("full_attention", self.full_attention), ("recurrent", self.recurrent))
        return {
            "model": self.shape.name,
            "tokens": self.num_tokens,
            "segments": self.num_segments,
            "ratio": self.ratio,
            "ratio_without_vocabulary": self.ratio_without_vocabulary,
            **{f"{name}_flops": flops.total for name, flops in both},
            **{f"{name}_flops_per_token": flops.total / self.num_tokens for name, flops in both},
            **{f"{name}_terms": asdict(flops) for name, flops in both},
        }


def compare_flops(
    shape: ModelShape,
    num_tokens: int,
    *,
    segment_length: int = 512,
    num_memory_tokens: int = 0,
    knn_memory: KnnMemoryConfig | None = None,
    convention: FlopsConvention = REPORT,
) -> FlopsComparison:
    """Compare full attention over a document with one pass per segment.

    Where memory counts, a decoder's segment is `segment_length` tokens of text with the memory
    tokens before it, to read, and after it, to write: `segment_length + 2 * num_memory_tokens` in
    all. An encoder's is a window of `segment_length` tokens, of which the memory tokens and three
    special tokens leave the rest to the text. The last segment is as short as its text; memory and
    special tokens get no logits. Where memory does not count, a segment is `segment_length` tokens
    of text.

    Args:
        shape: The model.
        num_tokens: Tokens of the document.
        segment_length: Tokens per segment.
        num_memory_tokens: Vectors that each segment reads and writes.
        knn_memory: A kNN memory that the segments read; full attention has none.
        convention: What counts.

    Returns:
        Both counts.

    Raises:
        ValueError: If a count is out of range, no text fits into a window, or there is a memory
            that the convention does not count.
    """
    if num_tokens < 1 or num_memory_tokens < 0:
        msg = "num_tokens must be at least 1 and num_memory_tokens at least 0, got "
        msg += f"{num_tokens} and {num_memory_tokens}."
        raise ValueError(msg)
    if num_memory_tokens:
        convention.require_memory(f"{num_memory_tokens} memory tokens")
    text_length, num_slots = _layout(shape, segment_length, num_memory_tokens, convention)
    full, short = divmod(num_tokens, text_length)

    def segment(length: int) -> Flops:
        return forward_flops(
            shape, length + num_slots, convention, num_outputs=length, knn_memory=knn_memory
        )

    recurrent = segment(text_length).times(full)
    if short:
        recurrent = recurrent.plus(segment(short))
    return FlopsComparison(
        shape=shape,
        num_tokens=num_tokens,
        num_segments=full + bool(short),
        full_attention=forward_flops(shape, num_tokens, convention),
        recurrent=recurrent,
    )


def _layout(
    shape: ModelShape, segment_length: int, num_memory_tokens: int, convention: FlopsConvention
) -> tuple[int, int]:
    # tokens of text in a segment, and tokens beside them
    text_length, num_slots = segment_length, 0
    if convention.counts_memory and shape.kind == "decoder":
        num_slots = 2 * num_memory_tokens
    elif convention.counts_memory:
        num_slots = num_memory_tokens + _ENCODER_SPECIALS
        text_length -= num_slots
    if text_length < 1:
        msg = (
            f"segment_length must leave room for text beside {num_slots} memory and special "
            f"tokens, got {segment_length}. Raise it to at least {segment_length + 1 - text_length}"
        )
        raise ValueError(msg + ".")
    return text_length, num_slots
