"""Configuration of recurrent memory."""

from dataclasses import dataclass
from typing import Literal

from byheart.choices import require_choices, require_finite, require_whole
from byheart.ops.segments import Alignment


@dataclass(frozen=True, kw_only=True, slots=True)
class RecurrentMemoryConfig:
    """Recurrent memory: a few vectors that each segment reads and rewrites.

    The defaults are the report's (Bulatov et al. 2023, arXiv:2304.11062), except for the alignment,
    which must be `left` for documents that are read in pieces.
    """

    segment_length: int
    """Text tokens per segment. Memory and special tokens come on top: for BERT with a window of
    512, 10 memory and 3 special tokens it is 499."""
    num_memory_tokens: int = 10
    """Vectors that are passed on; 0 for none, which is the model without memory."""
    alignment: Alignment = "left"
    """Which segment is short if the text is no multiple of `segment_length`: `left` the last,
    `right` the first (the report), `center` makes all about equally long."""
    bptt_depth: int | None = None
    """Segments that a loss reaches backwards, its own included; `None` for all of the call. More
    than a text has are all of it: rows of a batch differ in length. Without labels the same holds
    for what is returned of each segment: logits, or the states of an encoder."""
    replay: bool = False
    """Keep only the memory between segments for the backward pass (and the XL cache, if the model
    has one), and compute each segment again: the same gradients in constant memory, for a third
    more time."""
    start_ids: tuple[int, ...] = ()
    """Special tokens before the memory, for encoders; BERT's `[CLS]`."""
    separator_ids: tuple[int, ...] = ()
    """Special tokens between memory and text, for encoders; BERT's `[SEP]`."""
    end_ids: tuple[int, ...] = ()
    """Special tokens after the text, for encoders; BERT's `[SEP]`, T5's end of sequence."""
    update: Literal["replace", "gated"] = "replace"
    """How the new memory follows from the old one and what the model wrote: `replace` takes what
    was written (the report); `gated` mixes both with a learned gate per memory token, which can be
    exactly closed: then, without `noise`, the memory stays as it was, however long the text."""
    gate_bias_init: float = -2.0
    """First value of the bias of the `gated` update; below 0 it starts by keeping."""
    gate_noise: float = 1.0
    """Standard deviation of the normal noise on the logits of the gates in training: with it they
    learn to be clearly open or closed."""
    normalize_memory: bool = False
    """Layer-normalise what was written, with learned scale and shift that start at the statistics
    of the token embeddings. For models whose last hidden states are much larger than their
    embeddings, as GPT-2's."""
    noise: float = 0.0
    """Standard deviation of the normal noise added to the memory between segments in training,
    relative to its own standard deviation."""

    def __post_init__(self) -> None:
        require_choices(self)
        require_finite(self)
        require_whole(self)
        for name, least in (("segment_length", 1), ("num_memory_tokens", 0)):
            value = getattr(self, name)
            if value < least:
                msg = f"{name} must be at least {least}, got {value}."
                raise ValueError(msg)
        if self.bptt_depth is not None and self.bptt_depth < 1:
            msg = (
                f"bptt_depth must be at least 1 (the segment of the loss itself), got "
                f"{self.bptt_depth}. Use None for all segments."
            )
            raise ValueError(msg)
        for name in ("noise", "gate_noise"):
            if getattr(self, name) < 0:
                msg = f"{name} must be at least 0, got {getattr(self, name)}."
                raise ValueError(msg)
        for name, default in (("gate_bias_init", -2.0), ("gate_noise", 1.0)):
            if getattr(self, name) != default and self.update != "gated":
                msg = (
                    f"{name} has no effect with update='replace', got {getattr(self, name)}. "
                    "Leave it out, or use update='gated'."
                )
                raise ValueError(msg)

    @property
    def num_special_tokens(self) -> int:
        """Special tokens of a window."""
        return len(self.start_ids) + len(self.separator_ids) + len(self.end_ids)
