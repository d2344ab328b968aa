"""Recurrent memory around a model that has a memory of its own: XL cache and kNN memory."""

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import nn

from byheart.memory.layout import MemoryLayout
from byheart.memory.state import MemoryState, NewEntries
from byheart.models.config import DecoderConfig
from byheart.models.recurrent_config import RecurrentMemoryConfig
from byheart.models.segment_model import SegmentModel
from byheart.models.segmentation import Step
from byheart.models.text_output import TextRequest
from byheart.models.window import Window
from byheart.models.window_model import Encoded


class SegmentReader:
    """A `SegmentModel` as a reader of windows.

    A window `[memory ; text ; memory]` is a segment of the model, and memory tokens are tokens as
    any: they enter the XL cache and the kNN memory, too. Within one call the XL cache goes on from
    segment to segment. The kNN memory is what it was when the call began, because forward only
    reads: `entries` are for the commit.
    """

    writes = True

    def __init__(
        self,
        model: SegmentModel,
        state: MemoryState | None = None,
        entries: tuple[NewEntries, ...] = (),
    ) -> None:
        """Read with a model.

        Args:
            model: The model.
            state: Its own memory of the complete segments before the window; `None` for models
                without XL cache and kNN memory, see `inner_layout`.
            entries: What the call has added to the kNN memory so far, if there is one.
        """
        self.model = model
        self.state = state
        self.entries = entries
        self.embedding: nn.Module = model.input_embedding()
        self.embed_dim = model.embed_dim
        # the XL cache is a tensor of its own after every segment, the entries of a store are not
        self.has_memory = state is not None and bool(state.stores)

    def parameters(self) -> Iterator[nn.Parameter]:
        """Return the model's parameters."""
        yield from self.model.parameters()

    def __call__(self, window: Window, request: TextRequest | None) -> Encoded:
        """Read a window.

        Returns:
            Hidden states, a `TextOutput` if requested, and the reader of the next segment.
        """
        read = self.model.read_window(window, request, state=self.state)
        return Encoded(read.hidden, read.output, self._after(window, read.new_entries))

    def _after(self, window: Window, new: NewEntries) -> "SegmentReader":
        if self.state is None:
            return self
        if window.complete is not None:
            if not bool(window.complete.any()):
                return self
            # the tokens of an unfinished segment are read again, and must be there once
            num_tokens = new.num_tokens.masked_fill(~window.complete, 0)
            new = replace(new, num_tokens=num_tokens, is_full=False)
        # without a kNN memory nothing is left to commit, and nothing may pile up
        entries = (*self.entries, new) if self.state.stores else ()
        state = self.state.read_on(new)
        # the question above has waited for the device already
        if state.pending is not None and not bool(state.num_pending.any()):
            state = state.at_segment_start()
        return SegmentReader(self.model, state, entries)


def inner_layout(model: nn.Module) -> MemoryLayout | None:
    """Return the shape of the memory that a model has of its own.

    Args:
        model: Any model.

    Returns:
        The layout; `None` without XL cache and kNN memory.
    """
    layout = model.memory_layout if isinstance(model, SegmentModel) else None
    return layout if layout is not None and _holds_anything(layout) else None


def require_room(
    model: nn.Module, state: MemoryState | None, steps: Sequence[Step], num_memory_tokens: int
) -> None:
    """Refuse to read windows beyond what a model can tell apart, before the first is read.

    Args:
        model: Any model.
        state: Its own memory before the first window; `None` without one.
        steps: The text that will be read.
        num_memory_tokens: Memory tokens on each side of it.

    Raises:
        ValueError: If a document would be longer than that.
    """
    if state is None or not isinstance(model, SegmentModel) or model.max_document_tokens is None:
        return
    counts = [0] * state.batch_size
    for step in steps:
        for row, (start, stop) in zip(step.rows, step.spans, strict=True):
            # a row that only keeps the others company reads nothing, not even memory
            counts[row] += stop - start + 2 * num_memory_tokens if stop > start else 0
    model.require_room(state, torch.tensor(counts, device=state.position.device))


def _holds_anything(layout: MemoryLayout) -> bool:
    return layout.xl_cache_length > 0 or layout.knn_memory is not None


def require_segment_fits(
    layout: MemoryLayout, memory: RecurrentMemoryConfig, *, model: str, settings: str
) -> None:
    """Refuse a recurrent memory that does not go with a model's own.

    Args:
        layout: The shape of the model's own memory.
        memory: The recurrent memory.
        model: The class of the model, for the message.
        settings: Where its segment length is set, for the message.

    Raises:
        ValueError: If text and memory do not fit into the model's segment, or do not fill it
            although it has a memory of its own.
    """
    needed = memory.segment_length + 2 * memory.num_memory_tokens
    counts = f"{memory.segment_length} text and twice {memory.num_memory_tokens} memory"
    if _holds_anything(layout):
        if layout.segment_length != needed:
            msg = (
                f"The segment of a {model} with an XL cache or kNN memory must be text and memory "
                f"tokens, {needed} ({counts}), got {layout.segment_length}. Set segment_length to "
                f"{needed} in {settings}."
            )
            raise ValueError(msg)
        if memory.alignment != "left":
            msg = (
                f"alignment must be 'left' for a {model} with an XL cache or kNN memory, which "
                f"take whole segments, got {memory.alignment!r}. Leave both out of {settings}, or "
                "the alignment out of RecurrentMemoryConfig."
            )
            raise ValueError(msg)
    elif layout.segment_length < needed:
        msg = (
            f"Text and memory tokens must fit into the {model}'s segment of "
            f"{layout.segment_length} tokens, got {needed} ({counts}). Set segment_length to at "
            f"least {needed} in {settings}."
        )
        raise ValueError(msg)


def require_decoder_fits(decoder: DecoderConfig, memory: RecurrentMemoryConfig) -> None:
    """Refuse a recurrent memory that a decoder could not use.

    Args:
        decoder: The decoder.
        memory: The memory.

    Raises:
        ValueError: If text and memory do not fit into the decoder's segment, do not fill it
            although it has a memory of its own, or its window would cut the memory off.
    """
    require_segment_fits(decoder.memory_layout, memory, model="Decoder", settings="DecoderConfig")
    needed = memory.segment_length + 2 * memory.num_memory_tokens
    if memory.num_memory_tokens and decoder.window < needed - 1:
        msg = (
            f"All of a segment must see the memory, but the Decoder looks {decoder.window} tokens "
            f"back, and the segment has {needed}. Leave window_length out of DecoderConfig, or set "
            f"it to at least {needed - 1}."
        )
        raise ValueError(msg)
