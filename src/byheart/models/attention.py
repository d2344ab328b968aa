"""The attention layer: local attention over [XL cache ; segment], and a memory beside it."""

import math

import torch
from jaxtyping import Float
from torch import Tensor, nn

from byheart.memory.store import KeyValues, MemoryStore
from byheart.models.config import DecoderConfig
from byheart.models.local import LocalContext
from byheart.models.mix import MemoryMix
from byheart.ops.norms import unit_length
from byheart.ops.positions import t5_buckets

_NUM_BUCKETS = 32
_MAX_DISTANCE = 128


class Attention(nn.Module):
    """Multi-head attention with an XL cache and, in memory layers, a kNN memory.

    Local and memory attention share queries, keys, values and scale. The memory itself is not
    here: it is in the state that `forward` reads, and nothing is written.
    """

    def __init__(self, config: DecoderConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.num_heads = config.num_heads
        self.normalize_qk = config.normalize_qk
        width = config.num_heads * config.head_dim
        self.queries = nn.Linear(config.embed_dim, width, bias=False)
        self.keys = nn.Linear(config.embed_dim, width, bias=False)
        self.values = nn.Linear(config.embed_dim, width, bias=False)
        self.output = nn.Linear(width, config.embed_dim, bias=False)
        # the factor of the scores is kept as its logarithm: it stays positive, and a step of the
        # optimizer changes it by a share of itself
        first_scale = (
            config.attention_scale_init if config.normalize_qk else 1 / math.sqrt(config.head_dim)
        )
        self.log_scale = nn.Parameter(torch.full((config.num_heads,), math.log(first_scale)))
        self.position_bias = (
            nn.Parameter(torch.zeros(config.num_heads, _NUM_BUCKETS))
            if config.position_bias == "t5"
            else None
        )
        knn = config.knn_memory
        self.mix = MemoryMix(config, knn) if knn is not None and layer in knn.layers else None

    def forward(
        self,
        hidden: Float[Tensor, "batch query embed_dim"],
        local: LocalContext,
        store: MemoryStore | None,
    ) -> tuple[Float[Tensor, "batch query embed_dim"], KeyValues]:
        """Attend to the local context and to the memory.

        Args:
            hidden: Normalised residual stream.
            local: What the tokens see locally.
            store: The layer's memory; `None` for a layer or a state without one.

        Returns:
            The layer's contribution to the residual stream, and the keys and values of the tokens,
            with their gradient.
        """
        queries, keys, values = (
            projection(hidden).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for projection in (self.queries, self.keys, self.values)
        )
        if self.normalize_qk:
            queries, keys = unit_length(queries), unit_length(keys)
        scale = self.log_scale.float().exp()
        new = KeyValues(keys, values)
        attended = local.attend(
            self.layer,
            (queries * scale[:, None, None]).to(queries.dtype),
            new,
            self._distance_bias(local.window) * scale[:, None],
            need_logsumexp=self.mix is not None and self.mix.needs_logsumexp,
        )
        output = attended.output
        if self.mix is not None:
            output = self.mix(hidden, queries, scale, attended, store)
        return self.output(output.transpose(1, 2).flatten(-2)), new

    def _distance_bias(self, window: int) -> Float[Tensor, "heads distances"]:
        if self.position_bias is None:
            return self.log_scale.new_zeros(self.num_heads, window + 1)
        distances = torch.arange(window + 1, device=self.position_bias.device)
        return self.position_bias[:, t5_buckets(distances, _NUM_BUCKETS, _MAX_DISTANCE)]
