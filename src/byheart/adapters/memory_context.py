"""What the tokens after a state read, whatever they are: made once for all steps of a text."""

from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor

from byheart.adapters.attach_config import AttachConfig
from byheart.adapters.attention_layers import AttentionLayers
from byheart.adapters.memory_view import MemoryView, Past
from byheart.adapters.rotation import Angles, RotarySource
from byheart.memory.state import MemoryState


@dataclass(frozen=True, kw_only=True, eq=False)
class MemoryContext:
    """A state, prepared to be read by passes."""

    state: MemoryState
    """What the rows have read; rows that start a document are reset already."""
    past: Past | None
    """What they see besides the tokens of a pass."""
    search_angles: dict[RotarySource, Angles] | None
    """Angles of the place from which the memory is searched, if it is always the same."""
    keeps_place: bool
    """Whether the memory is searched from the place of the query."""
    has_rotation: bool
    """Whether positions are angles; if not, they are added to the embeddings."""
    first_place: Int[Tensor, "batch 1"]
    """Place of the next token of each row in its segment."""
    first_position: Int[Tensor, "batch 1"]
    """Position of the next token of each row."""
    counts_itself: bool
    """Whether the model may count the positions of a pass from 0, pads included: nothing is before
    the tokens, and only their distances matter."""

    @classmethod
    def of(
        cls,
        state: MemoryState,
        layers: AttentionLayers,
        config: AttachConfig,
        dtype: torch.dtype,
        copies: int = 1,
        *,
        asks: bool = False,
    ) -> "MemoryContext":
        """Prepare a state.

        Args:
            state: What the rows have read; rows that start a document are reset already.
            layers: The attention layers of the model.
            config: The memory.
            dtype: Precision of the model's hidden states.
            copies: Rows of a pass for each row of the state, side by side (beams).
            asks: Whether to wait for a device to say what rows use of it, see `Past.of`; without
                masks always.

        Returns:
            The context.
        """
        sources = layers.sources
        # an attention that takes no mask of ours must not get columns that no row uses
        if not layers.take_masks and not torch.compiler.is_compiling():
            asks = True
        past = Past.of(state, sources, dtype, copies, asks=asks)
        search_angles = None
        if config.memory_position == "window":
            place = torch.full((1, 1), config.segment_length, device=state.position.device)
            search_angles = {source: source.angles(place, dtype) for source in sources}
        place, position = (
            counter.repeat_interleave(copies)[:, None]
            for counter in (state.num_pending, state.position)
        )
        # where positions are part of the keys of an XL cache, they go on through the document
        goes_on = not layers.has_rotation and config.xl_cache_length > 0
        return cls(
            state=state,
            past=past,
            search_angles=search_angles,
            keeps_place=config.memory_position == "local",
            has_rotation=layers.has_rotation,
            first_place=place,
            first_position=position if goes_on else place,
            counts_itself=past is None and not goes_on,
        )

    def view(
        self,
        columns: Int[Tensor, "batch token"],
        *,
        first_column: Int[Tensor, " batch"] | None = None,
        stages: bool = True,
    ) -> tuple[MemoryView, Int[Tensor, "batch token"] | None]:
        """Make the view of a pass.

        Args:
            columns: Number of each token, counted from the first after the state.
            first_column: First real token of each row, where rows are padded on the left.
            stages: Whether keys and values of the tokens are kept, to be committed.

        Returns:
            The view, and the positions of the tokens; `None` for those that the model gives.
        """
        view = MemoryView(
            state=self.state,
            past=self.past,
            places=self.first_place + columns,
            first_column=first_column,
            search_angles=self.search_angles,
            keeps_place=self.keeps_place,
            stages=stages,
        )
        is_padded_on_the_left = first_column is not None
        needs_places = self.keeps_place or not self.has_rotation
        if self.counts_itself and not (is_padded_on_the_left and needs_places):
            return view, None
        return view, self.first_position + columns
