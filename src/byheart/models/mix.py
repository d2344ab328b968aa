"""Read the memory and mix it with local attention."""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from byheart.memory.config import KnnMemoryConfig
from byheart.memory.store import MemoryStore
from byheart.models.config import DecoderConfig
from byheart.ops.attention import Attended
from byheart.ops.merge import merge_by_gate, merge_by_softmax


class MemoryMix(nn.Module):
    """The part of a memory layer that other layers do not have.

    Source:
        Wu et al. 2022, Memorizing Transformers, "kNN-augmented attention layer" (arXiv:2203.08913):
        one gate per head, the same for all tokens. The content gate is the extension that section
        names; the joint softmax is what later public implementations use.
    """

    def __init__(self, config: DecoderConfig, knn: KnnMemoryConfig) -> None:
        super().__init__()
        self.combine = knn.combine
        self.top_k = knn.top_k
        self.gate_when_empty = config.empty_slots == "zeros"
        self.gate_bias = (
            nn.Parameter(torch.full((config.num_heads,), config.gate_bias_init))
            if knn.combine != "joint"
            else None
        )
        self.age_slope = knn.age_slope
        self.gate_weight = (
            nn.Parameter(torch.zeros(config.num_heads, config.embed_dim))
            if knn.combine == "content_gate"
            else None
        )

    @property
    def needs_logsumexp(self) -> bool:
        """Whether `forward` needs the log of the local softmax denominators."""
        return self.combine == "joint"

    def forward(
        self,
        hidden: Float[Tensor, "batch query embed_dim"],
        queries: Float[Tensor, "batch heads query head_dim"],
        scale: Float[Tensor, " heads"],
        local: Attended,
        store: MemoryStore | None,
    ) -> Float[Tensor, "batch heads query head_dim"]:
        """Attend to the memory and mix.

        Args:
            hidden: Normalised residual stream, for the content gate.
            queries: Queries before the scale.
            scale: Factor of the scores, per head.
            local: Attention over the local context.
            store: The memory; `None` for none.

        Returns:
            The mixed attention output.
        """
        if store is None:
            return local.output + self._zero()
        # a memory smaller than top_k is read whole
        read = store.attend(queries, scale, min(self.top_k, store.memory_size), self.age_slope)
        if self.gate_bias is None:
            assert local.logsumexp is not None
            return merge_by_softmax([local.output, read.output], [local.logsumexp, read.logsumexp])
        gate_BHQ = self._gate(hidden)
        if not self.gate_when_empty:
            gate_BHQ = gate_BHQ * read.has_entries[:, None, None].float()
        return merge_by_gate(local.output, read.output, gate_BHQ)

    def gate(self) -> Float[Tensor, " heads"] | None:
        """Return the gate of each head, without the token's part; `None` for the joint softmax."""
        return None if self.gate_bias is None else torch.sigmoid(self.gate_bias.detach())

    def _gate(
        self, hidden: Float[Tensor, "batch query embed_dim"]
    ) -> Float[Tensor, "#batch heads #query"]:
        assert self.gate_bias is not None
        logits_1H1 = self.gate_bias.float()[None, :, None]
        if self.gate_weight is None:
            return torch.sigmoid(logits_1H1)
        content_BHQ = (hidden @ self.gate_weight.to(hidden.dtype).T).transpose(1, 2)
        return torch.sigmoid(logits_1H1 + content_BHQ.float())

    def _zero(self) -> Tensor | float:
        # data-parallel training expects every parameter to take part in every step
        parameters = list(self.parameters())
        if not parameters or not torch.is_grad_enabled():
            return 0.0
        return 0.0 * torch.cat([parameter.flatten() for parameter in parameters]).sum()
