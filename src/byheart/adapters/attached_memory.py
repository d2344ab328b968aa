"""What a memory layer of a pretrained model learns: scale and gate of its memory."""

import math

import torch
from jaxtyping import Float
from torch import Tensor, nn

from byheart.adapters.attach_config import AttachConfig
from byheart.memory.store import MemoryRead, MemoryStore
from byheart.ops.attention import Attended, wide_dtype
from byheart.ops.merge import merge_by_gate, merge_by_softmax
from byheart.ops.norms import unit_length
from byheart.ops.search import Neighbours

# of unit vectors: scores of up to 10, as where the paper's models end
_SCALE_OF_UNIT_VECTORS = 10.0


class AttachedMemory(nn.Module):
    """Reads a layer's memory and mixes what it finds with the layer's own attention.

    It is a child of the attention module, so that whoever moves, shards, freezes or adapts the
    model's weights meets its weights, too.

    Source:
        Wu et al. 2022, Memorizing Transformers, "kNN-augmented attention layer" (arXiv:2203.08913).
    """

    def __init__(
        self, config: AttachConfig, num_heads: int, head_dim: int, scaling: float, like: Tensor
    ) -> None:
        """Make the weights of a layer.

        Args:
            config: The memory; it has a kNN memory.
            num_heads: Query heads.
            head_dim: Width of a head.
            scaling: The layer's factor of the scores.
            like: A weight of the layer, for the device.
        """
        super().__init__()
        assert config.knn is not None
        self.knn = config.knn
        self.gate_function = config.gate
        self.normalize_qk = config.normalize_qk
        first = config.scale_init
        if first is None:
            first = _SCALE_OF_UNIT_VECTORS if config.normalize_qk else scaling
        # few numbers, small steps: bfloat16 would lose them
        empty = torch.zeros(num_heads, head_dim, device=like.device, dtype=torch.float32)
        # kept as its logarithm, so that it stays positive
        self.log_scale = nn.Parameter(torch.full_like(empty[:, 0], math.log(first)))
        self.gate_bias = nn.Parameter(torch.full_like(empty[:, 0], config.gate_init))
        self.gate_weight = nn.Parameter(empty) if self.knn.combine == "content_gate" else None

    @property
    def needs_logsumexp(self) -> bool:
        """Whether `forward` needs the log of the local softmax denominators."""
        return self.knn.combine == "joint"

    def forward(
        self,
        queries: Float[Tensor, "batch heads query head_dim"],
        local: Attended,
        store: MemoryStore | None,
    ) -> Float[Tensor, "batch heads query head_dim"]:
        """Attend to the memory and mix.

        Args:
            queries: Queries at the place from which the memory is searched.
            local: The layer's own attention.
            store: The memory; `None` for none. Rows of the batch may be copies of its rows, the
                copies of a row side by side (beams).

        Returns:
            The mixed output, in the dtype of the local one.
        """
        if store is None:
            return local.output + self._zero().to(local.output.dtype)
        queries = unit_length(queries) if self.normalize_qk else queries
        read = self._read(queries, store)
        if self.needs_logsumexp:
            assert local.logsumexp is not None
            biased = read.logsumexp + self.gate_bias[:, None]
            return merge_by_softmax([local.output, read.output], [local.logsumexp, biased])
        gate_BHQ = self._gate(queries) * read.has_entries[:, None, None]
        wide = local.output.to(wide_dtype(local.output))
        mixed = merge_by_gate(wide, read.output, gate_BHQ)
        return mixed.to(local.output.dtype)

    def gate(self) -> Float[Tensor, " heads"] | None:
        """Return the gate of each head, without the token's part; `None` for the joint softmax."""
        return None if self.needs_logsumexp else self._function(self.gate_bias.detach())

    def _read(self, queries_BHQD: Tensor, store: MemoryStore) -> MemoryRead:
        """Read the store, copies of a row as more queries of it.

        Returns:
            What each query finds.
        """
        rows, scale = store.num_written.shape[0], self.log_scale.float().exp()
        top_k, slope = min(self.knn.top_k, store.memory_size), self.knn.age_slope
        copies = queries_BHQD.shape[0] // rows
        if copies == 1:
            return store.attend(queries_BHQD, scale, top_k, slope)
        batch, heads, width, head_dim = queries_BHQD.shape
        folded = queries_BHQD.view(rows, copies, heads, width, head_dim).transpose(1, 2)
        read = store.attend(folded.flatten(2, 3), scale, top_k, slope)

        def unfold(side: Tensor) -> Tensor:
            parts = side.view(rows, heads, copies, width, -1).transpose(1, 2)
            return parts.reshape(batch, heads, width, *side.shape[3:])

        found = read.found and Neighbours(*(unfold(side) for side in read.found))
        has_entries = read.has_entries.repeat_interleave(copies)
        return MemoryRead(unfold(read.output), unfold(read.logsumexp), has_entries, found)

    def _gate(
        self, queries: Float[Tensor, "batch heads query head_dim"]
    ) -> Float[Tensor, "#batch heads #query"]:
        logits_1H1 = self.gate_bias[None, :, None]
        if self.gate_weight is None:
            return self._function(logits_1H1)
        content_BHQ = (queries.float() * self.gate_weight[:, None]).sum(-1)
        return self._function(logits_1H1 + content_BHQ)

    def _function(self, logits: Tensor) -> Tensor:
        if self.gate_function == "linear":
            return logits
        return logits.tanh() if self.gate_function == "tanh" else logits.sigmoid()

    def _zero(self) -> Tensor:
        # data-parallel training expects every parameter to take part in every step
        return 0.0 * sum((parameter.sum() for parameter in self.parameters()), torch.zeros(()))
