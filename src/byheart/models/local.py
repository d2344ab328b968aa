"""What a segment can see locally: the XL cache, its own pending tokens, and itself."""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from byheart.memory.state import MemoryState
from byheart.memory.store import KeyValues
from byheart.ops import known
from byheart.ops.attention import Attended, masked_attention, window_attention


@dataclass(frozen=True, kw_only=True, eq=False)
class LocalContext:
    """The local keys of one forward pass, and which of them each query sees.

    Where all rows are known to stand at the start of a segment, which is every training step, the
    window is the same for all and attention runs in blocks. Otherwise a mask per row says what is
    visible.
    """

    state: MemoryState
    """The state that is read; rows that start a document are reset already."""
    window: int
    """Previous tokens each query sees."""
    self_visible: bool
    """Whether a token sees itself."""
    cache_valid: Bool[Tensor, "batch cache"]
    """Slots of the XL cache that count."""
    distances: Int[Tensor, "batch query entry"] | None
    """Tokens from key to query, for rows that stand at different places; `None` if aligned."""
    visible: Bool[Tensor, "batch query entry"] | None
    """What each query sees, for the same case."""

    @classmethod
    def of(
        cls, state: MemoryState, num_queries: int, window: int, *, self_visible: bool
    ) -> "LocalContext":
        """Work out what the next tokens of each row see.

        Args:
            state: The state that is read; rows that start a document are reset already.
            num_queries: Columns of the pass.
            window: Previous tokens each query sees.
            self_visible: Whether a token sees itself.

        Returns:
            The context, used by all layers of the pass.
        """
        length, device = state.layout.xl_cache_length, state.position.device
        columns = torch.arange(length, device=device)
        cache_valid = columns >= length - state.num_cached[:, None]
        if state.layout.empty_slots == "zeros":
            cache_valid = torch.ones_like(cache_valid)
        distances = visible = None
        if state.pending is not None and not known.known_none(state.num_pending > 0):
            distances, holds_token = _distances(state, num_queries, cache_valid)
            nearest = 0 if self_visible else 1
            visible = holds_token[:, None] & (distances >= nearest) & (distances <= window)
        return cls(
            state=state,
            window=window,
            self_visible=self_visible,
            cache_valid=cache_valid,
            distances=distances,
            visible=visible,
        )

    def attend(
        self,
        layer: int,
        queries: Float[Tensor, "batch heads query head_dim"],
        new: KeyValues,
        distance_bias: Float[Tensor, "heads distances"],
        *,
        need_logsumexp: bool,
    ) -> Attended:
        """Attend to what is visible.

        Args:
            layer: The layer whose cache is read.
            queries: Queries, already multiplied by the attention scale.
            new: Keys and values of the pass itself.
            distance_bias: Bias for the distances 0 ... `window`, multiplied by the scale.
            need_logsumexp: Whether to return the log of the denominators.

        Returns:
            Output and, if asked for, log of the softmax denominators.
        """
        keys, values = (self._sides(layer, side, new[side]) for side in (0, 1))
        if self.distances is None or self.visible is None:
            return window_attention(
                queries, keys, values, distance_bias, self.cache_valid,
                self_visible=self.self_visible, need_logsumexp=need_logsumexp,
            )  # fmt: skip
        bias = distance_bias[:, self.distances.clamp(0, self.window)].transpose(0, 1)
        return masked_attention(
            queries, keys, values, bias, self.visible, need_logsumexp=need_logsumexp
        )

    def _sides(self, layer: int, side: int, new: Tensor) -> Tensor:
        cache = self.state.xl_cache[layer][side]
        if self.state.layout.empty_slots == "zeros":
            columns = torch.arange(cache.shape[2], device=cache.device)
            written = columns >= cache.shape[2] - self.state.num_cached[:, None]
            cache = cache * written[:, None, :, None]
        parts = [cache, new]
        if self.distances is not None and self.state.pending is not None:
            parts.insert(1, self.state.pending[layer][side])
        return torch.cat([part.to(new.dtype) for part in parts], dim=2)


def _distances(
    state: MemoryState, num_queries: int, cache_valid: Bool[Tensor, "batch cache"]
) -> tuple[Int[Tensor, "batch query entry"], Bool[Tensor, "batch entry"]]:
    """Measure the distance from every key of [cache ; pending ; new] to every query.

    Returns:
        Distances, and which keys hold a token.
    """
    device, batch = state.position.device, state.batch_size
    length = state.layout.xl_cache_length
    steps = torch.arange(state.layout.segment_length, device=device)
    new = state.num_pending[:, None] + torch.arange(num_queries, device=device)
    places = torch.cat(
        [
            (torch.arange(length, device=device) - length).expand(batch, -1),
            steps.expand(batch, -1),
            new,
        ],
        dim=1,
    )
    holds = torch.cat(
        [cache_valid, steps < state.num_pending[:, None], torch.ones_like(new, dtype=torch.bool)],
        dim=1,
    )
    return new[:, :, None] - places[:, None, :], holds
