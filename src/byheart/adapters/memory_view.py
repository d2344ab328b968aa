"""What a pass over a pretrained model reads, and what it leaves to be committed."""

from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from byheart.adapters.attention_hook import (
    PLAIN,
    AttentionCall,
    AttentionResult,
    Hook,
    own_implementation,
)
from byheart.adapters.rotation import Angles, RotarySource
from byheart.memory.state import MemoryState
from byheart.memory.store import KeyValues
from byheart.ops import known
from byheart.ops.attention import Attended, masked_attention

MEMORY = "byheart_memory"
"""Name of the child of an attention module that reads its memory."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Past:
    """The tokens before the pass that every layer sees: XL cache and unfinished segment."""

    sides: tuple[KeyValues, ...]
    """Their keys, without positions, and values, per layer."""
    places: Int[Tensor, "batch past"]
    """Their places, counted from the first token of the segment."""
    valid: Bool[Tensor, "batch past"]
    """Which columns hold a token of the row's document."""
    angles: dict[RotarySource, Angles]
    """The angles of their places, by where a layer's angles come from."""

    @classmethod
    def of(
        cls,
        state: MemoryState,
        sources: list[RotarySource],
        dtype: torch.dtype,
        copies: int = 1,
        *,
        asks: bool = False,
    ) -> "Past | None":
        """Collect the past of the next tokens.

        Where values are not known, columns that no row uses are there, too, and masked.

        Args:
            state: What the rows have read.
            sources: Where the angles of the model's layers come from.
            dtype: Precision of the model's hidden states.
            copies: Rows of the batch for each row of the state (beams).
            asks: Whether to wait for a device to say which columns are used, which pays where a
                past is read many times.

        Returns:
            The past; `None` where it is known that no row has one.
        """
        device = state.position.device
        length, width = _past_columns(state, asks=asks)
        if length + width == 0:
            return None
        pending = state.pending if width else None
        cached = torch.arange(-length, 0, device=device)
        behind = torch.arange(width, device=device)
        places = torch.cat([cached, behind]).expand(state.batch_size, -1)
        valid = torch.cat(
            [cached >= -state.num_cached[:, None], behind < state.num_pending[:, None]], dim=1
        )
        sides = []
        for layer in range(state.layout.num_layers):
            parts = [KeyValues(*(side[:, :, -length:] for side in state.xl_cache[layer]))]
            parts = parts if length else []
            if pending is not None:
                parts.append(KeyValues(*(side[:, :, :width] for side in pending[layer])))
            sides.append(
                KeyValues(*(torch.cat([part[side] for part in parts], dim=2) for side in (0, 1)))
            )
        if copies > 1:
            places, valid = places.repeat_interleave(copies, 0), valid.repeat_interleave(copies, 0)
            sides = [KeyValues(*(x.repeat_interleave(copies, 0) for x in pair)) for pair in sides]
        angles = {source: source.angles(places, dtype) for source in sources}
        return cls(sides=tuple(sides), places=places, valid=valid, angles=angles)

    def keys_values(self, hook: Hook, like: Tensor) -> KeyValues:
        """Return the past of a layer as its attention wants it.

        Args:
            hook: The layer.
            like: Keys of the pass, for the dtype.

        Returns:
            Rotated keys, and values.
        """
        keys, values = (side.to(like.dtype) for side in self.sides[hook.index])
        if hook.rotation is not None:
            keys = hook.rotation.rotate(keys, self.angles[hook.rotation.source]).to(like.dtype)
        return KeyValues(keys, values)


@dataclass(frozen=True, kw_only=True, eq=False)
class MemoryView:
    """What a pass reads and leaves, handed from the model's `forward` to its attention."""

    state: MemoryState
    """What the rows have read; rows that start a document are reset already."""
    past: Past | None
    """What they see besides the tokens of the pass."""
    places: Int[Tensor, "batch token"]
    """Places of the tokens, counted from the first token of their segment."""
    first_column: Int[Tensor, " batch"] | None
    """First real token of each row, where rows are padded on the left."""
    search_angles: dict[RotarySource, Angles] | None
    """Angles of the place from which the memory is searched, if it is always the same."""
    keeps_place: bool
    """Whether the memory is searched from the place of the query."""
    stages: bool = True
    """Whether keys and values of the tokens are kept, to be committed."""
    staged: dict[int, KeyValues] = field(default_factory=dict)
    """Keys without positions, and values, of the tokens, by layer."""

    def attend(self, call: AttentionCall) -> AttentionResult:
        """Attend to past, tokens and memory.

        Returns:
            Output, and weights of the tokens and their past if the model's attention returns them.
        """
        key, value, mask = call.key, call.value, call.mask
        if self.stages:
            plain = _without_position(call, key)
            self.staged[call.hook.index] = KeyValues(*map(self._aligned, (plain, value)))
        if self.past is not None:
            before = self.past.keys_values(call.hook, key)
            mask = _widened_mask(call, self.past, self.places)
            key, value = (torch.cat(pair, dim=2) for pair in zip(before, (key, value), strict=True))
        memory = getattr(call.module, MEMORY, None)
        if memory is None:
            return call.attend(key, value, mask)
        if memory.needs_logsumexp:
            local, weights = _with_logsumexp(call, key, value, mask), None
        else:
            output, weights = call.attend(key, value, mask)
            local = Attended(output.transpose(1, 2), None)
        store = self.state.stores.get(call.hook.index)
        mixed = memory(self._search_queries(call), local, store)
        return mixed.transpose(1, 2).contiguous(), weights

    def _search_queries(self, call: AttentionCall) -> Tensor:
        if self.keeps_place or call.hook.rotation is None:
            return call.query
        queries = _without_position(call, call.query)
        if self.search_angles is None:
            return queries
        return call.hook.rotation.rotate(queries, self.search_angles[call.hook.rotation.source])

    def _aligned(self, side: Tensor) -> Tensor:
        """Move the real tokens of each row to its first columns.

        Returns:
            Detached keys or values.
        """
        side = side.detach()
        if self.first_column is None:
            return side
        width = side.shape[2]
        columns = torch.arange(width, device=side.device) + self.first_column[:, None]
        columns = columns.clamp(max=width - 1)[:, None, :, None]
        return side.gather(2, columns.expand(-1, side.shape[1], -1, side.shape[3]))


def _past_columns(state: MemoryState, *, asks: bool) -> tuple[int, int]:
    """Count the columns of the XL cache, and of the unfinished segment, that rows may use.

    Returns:
        Both numbers.
    """
    layout = state.layout
    if not asks and not known.values_are_known(state.position):
        return layout.xl_cache_length, 0 if state.pending is None else layout.segment_length
    length = layout.xl_cache_length if bool(state.num_cached.any()) else 0
    return length, 0 if state.pending is None else int(state.num_pending.max())


def _without_position(call: AttentionCall, x: Tensor) -> Tensor:
    if call.hook.rotation is None:
        return x
    assert call.angles is not None
    return call.hook.rotation.undo(x, call.angles)


def _widened_mask(call: AttentionCall, past: Past, places: Tensor) -> Tensor:
    """Put the columns of the past in front of a mask.

    Returns:
        A mask of the kind that the layer's own attention takes.
    """
    visible_B1QP = past.valid[:, None, None, :]
    if call.hook.window is not None:
        distances = places[:, :, None] - past.places[:, None, :]
        visible_B1QP = visible_B1QP & (distances < call.hook.window)[:, None]
    visible_B1QP = visible_B1QP.expand(-1, -1, call.query.shape[2], -1)
    mask = _own_mask(call).expand(len(visible_B1QP), -1, -1, -1)
    if mask.dtype is torch.bool:
        return torch.cat([visible_B1QP, mask], dim=3)
    least = torch.finfo(mask.dtype).min
    # not torch.where of two numbers, which are float32: the least float64 is beyond it
    past_B1QP = mask.new_zeros(visible_B1QP.shape).masked_fill(~visible_B1QP, least)
    return torch.cat([past_B1QP, mask], dim=3)


def _own_mask(call: AttentionCall) -> Tensor:
    """Return the mask among the tokens themselves, which sdpa leaves out where it is causal.

    Raises:
        ValueError: If the model's attention takes no such mask.
    """
    width, entries = call.query.shape[2], call.key.shape[2]
    if isinstance(call.mask, Tensor) and call.mask.ndim == 4:
        return call.mask[..., :entries]
    implementation = own_implementation(call.hook)
    if call.mask is not None or implementation not in PLAIN:
        msg = (
            "An XL cache, or a pass that continues a segment, needs the attention 'sdpa' or "
            f"'eager', got {implementation!r}. Use model.set_attn_implementation('sdpa')."
        )
        raise ValueError(msg)
    ones = torch.ones(width, entries, dtype=torch.bool, device=call.query.device)
    # as sdpa takes a missing mask: the first token sees the first entry, behind which the places
    # of a static cache are empty; a single token sees everything
    return (ones if width == 1 else ones.tril())[None, None]


def _with_logsumexp(call: AttentionCall, key: Tensor, value: Tensor, mask: Any) -> Attended:
    """Attend as the model's own attention does, but return the denominators, too.

    Returns:
        Output and log of the denominators.

    Raises:
        ValueError: If the model's attention has dropout, which the denominators have not.
    """
    if call.options.get("dropout"):
        msg = (
            "combine='joint' needs attention without dropout, got "
            f"{call.options['dropout']}. Set the dropout of attention in the model's config to 0."
        )
        raise ValueError(msg)
    if mask is None:
        mask = _own_mask(call)
    repeats = call.query.shape[1] // key.shape[1]
    keys, values = (side.repeat_interleave(repeats, dim=1) for side in (key, value))
    visible = mask if mask.dtype is torch.bool else mask > torch.finfo(mask.dtype).min
    batch = call.query.shape[0]
    return masked_attention(
        call.query * call.scaling,
        keys,
        values,
        call.query.new_zeros(1, 1, 1, 1).expand(batch, call.query.shape[1], *visible.shape[2:]),
        visible.expand(batch, -1, -1, -1)[:, 0],
        need_logsumexp=True,
    )
