"""Recurrent memory around a `Decoder`, with its XL cache and kNN memory."""

from collections.abc import Iterator
from dataclasses import replace

from torch import nn

from byheart.memory.layout import MemoryLayout
from byheart.memory.state import MemoryState, NewEntries
from byheart.models.config import DecoderConfig
from byheart.models.decoder import Decoder
from byheart.models.recurrent import Encoded
from byheart.models.recurrent_config import RecurrentMemoryConfig
from byheart.models.text_output import TextOutput, TextRequest
from byheart.models.window import Window


class DecoderReader:
    """A `Decoder` as a reader of windows.

    A window `[memory ; text ; memory]` is a segment of the decoder, and memory tokens are tokens as
    any: they enter the XL cache and the kNN memory, too. Within one call the XL cache goes on from
    segment to segment. The kNN memory is what it was when the call began, because forward only
    reads: `entries` are for the commit.
    """

    writes = True

    def __init__(
        self,
        decoder: Decoder,
        state: MemoryState | None = None,
        entries: tuple[NewEntries, ...] = (),
    ) -> None:
        """Read with a decoder.

        Args:
            decoder: The model.
            state: Its own memory of the complete segments before the window; `None` for decoders
                without XL cache and kNN memory, see `inner_layout`.
            entries: What the call has added to the kNN memory so far, if there is one.
        """
        self.decoder = decoder
        self.state = state
        self.entries = entries
        self.embedding: nn.Module = decoder.embedding
        self.embed_dim = decoder.config.embed_dim

    def parameters(self) -> Iterator[nn.Parameter]:
        """Return the decoder's parameters."""
        yield from self.decoder.parameters()

    def __call__(self, window: Window, request: TextRequest | None) -> Encoded:
        """Read a window.

        Returns:
            Hidden states, a `TextOutput` if requested, and the reader of the next segment.
        """
        num_tokens = None if window.mask is None else window.mask.sum(dim=1)
        hidden, new = self.decoder.read_embeddings(
            window.embeddings, state=self.state, num_tokens=num_tokens
        )
        output = None
        if request is not None:
            text = hidden[:, window.text_start : window.text_start + request.num_columns]
            output = TextOutput(
                *self.decoder.predict(
                    request.of(text), targets=request.targets, logits=request.logits
                )
            )
        return Encoded(hidden, output, self._after(window, new))

    def _after(self, window: Window, new: NewEntries) -> "DecoderReader":
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
        return DecoderReader(self.decoder, state, entries)


def inner_layout(config: DecoderConfig) -> MemoryLayout | None:
    """Return the shape of a decoder's own memory; `None` without XL cache and kNN memory."""
    has_memory = config.xl_cache_length > 0 or config.knn_memory is not None
    return config.memory_layout if has_memory else None


def require_decoder_fits(decoder: DecoderConfig, memory: RecurrentMemoryConfig) -> None:
    """Refuse a recurrent memory that a decoder could not use.

    Args:
        decoder: The decoder.
        memory: The memory.

    Raises:
        ValueError: If text and memory do not fit into the decoder's segment, do not fill it
            although it has a memory of its own, or its window would cut the memory off.
    """
    needed = memory.segment_length + 2 * memory.num_memory_tokens
    counts = f"{memory.segment_length} text and twice {memory.num_memory_tokens} memory"
    if inner_layout(decoder) is not None:
        if decoder.segment_length != needed:
            msg = (
                "The segment of a Decoder with an XL cache or kNN memory must be text and memory "
                f"tokens, {needed} ({counts}), got {decoder.segment_length}. Set segment_length to "
                f"{needed} in DecoderConfig."
            )
            raise ValueError(msg)
        if memory.alignment != "left":
            msg = (
                "alignment must be 'left' for a Decoder with an XL cache or kNN memory, which take "
                f"whole segments, got {memory.alignment!r}. Set xl_cache_length=0 and "
                "knn_memory=None for another."
            )
            raise ValueError(msg)
    elif decoder.segment_length < needed:
        msg = (
            f"Text and memory tokens must fit into the Decoder's segment of "
            f"{decoder.segment_length} tokens, got {needed} ({counts}). Set segment_length to at "
            f"least {needed} in DecoderConfig."
        )
        raise ValueError(msg)
    if memory.num_memory_tokens and decoder.window < needed - 1:
        msg = (
            f"All of a segment must see the memory, but the Decoder looks {decoder.window} tokens "
            f"back, and the segment has {needed}. Leave window_length out of DecoderConfig, or set "
            f"it to at least {needed - 1}."
        )
        raise ValueError(msg)
