"""The Memorizing Transformer from scratch: `Decoder`."""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from byheart.memory.layout import MemoryLayout
from byheart.memory.state import MemoryState, NewEntries
from byheart.memory.store import KeyValues, MemoryStore
from byheart.models.arguments import require_arguments
from byheart.models.attention import Attention
from byheart.models.config import DecoderConfig
from byheart.models.init import initialize
from byheart.models.local import LocalContext
from byheart.models.norm import RMSNorm
from byheart.models.segment_model import SegmentModel, WindowRead, layer_metrics
from byheart.models.text_output import TextOutput, TextRequest
from byheart.models.window import Window
from byheart.ops import known
from byheart.ops.losses import IGNORED, cross_entropy


@dataclass(frozen=True, kw_only=True, eq=False)
class DecoderOutput:
    """What a forward pass returns."""

    new_entries: NewEntries
    """What to give to `state.commit` after backward."""
    loss: Float[Tensor, ""] | None = None
    """Mean negative log likelihood of the predicted tokens, in nats; 0 if there are none."""
    token_losses: Float[Tensor, "batch query"] | None = None
    """Negative log likelihood of each target, in nats; 0 where it is -100."""
    logits: Float[Tensor, "batch query vocab"] | None = None
    """Scores of the next token, float32."""


class Block(nn.Module):
    """Pre-norm transformer layer: attention, then feed-forward, without biases."""

    def __init__(self, config: DecoderConfig, layer: int) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(config.embed_dim)
        self.attention = Attention(config, layer)
        self.feed_forward_norm = RMSNorm(config.embed_dim)
        self.expand = nn.Linear(config.embed_dim, config.hidden_dim, bias=False)
        self.contract = nn.Linear(config.hidden_dim, config.embed_dim, bias=False)
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self,
        hidden: Float[Tensor, "batch query embed_dim"],
        local: LocalContext,
        store: MemoryStore | None,
    ) -> tuple[Float[Tensor, "batch query embed_dim"], KeyValues]:
        """Apply the layer.

        Args:
            hidden: Residual stream.
            local: What the tokens see locally.
            store: The layer's memory, if it has one.

        Returns:
            The residual stream after the layer, and the keys and values of the tokens.
        """
        attended, new = self.attention(self.dropout(self.attention_norm(hidden)), local, store)
        hidden = hidden + attended
        inner = torch.relu(self.expand(self.feed_forward_norm(hidden)))
        return hidden + self.dropout(self.contract(inner)), new


class Decoder(SegmentModel):
    """Decoder-only transformer with an XL cache and a kNN memory.

    Forward reads memory and never writes it:

        state = decoder.new_state(batch_size=4)
        out = decoder(input_ids, state=state, document_start=first, targets=targets)
        out.loss.backward()
        state = state.commit(out.new_entries)

    Source:
        Wu et al. 2022, Memorizing Transformers (arXiv:2203.08913). The differences to the authors'
        code, each with a switch where it matters, are listed in docs/memorizing-transformer.md.
    """

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.embed_dim)
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.num_layers))
        self.norm = RMSNorm(config.embed_dim)
        self.dropout = nn.Dropout(config.dropout)
        initialize(self)

    @property
    def vocab_size(self) -> int:
        """Tokens that it can predict."""
        return self.config.vocab_size

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.embedding.weight.device

    @property
    def memory_layout(self) -> MemoryLayout:
        """The shape of its memory."""
        return self.config.memory_layout

    def input_embedding(self) -> nn.Embedding:
        """Return what turns token ids into vectors."""
        return self.embedding

    def forward(
        self,
        input_ids: Int[Tensor, "batch query"],
        *,
        state: MemoryState | None = None,
        document_start: Bool[Tensor, " batch"] | None = None,
        num_tokens: Int[Tensor, " batch"] | None = None,
        targets: Int[Tensor, "batch query"] | None = None,
        return_logits: bool | None = None,
    ) -> DecoderOutput:
        """Read the next tokens of each row's document.

        All tokens of a row must lie in one segment; `byheart.read_tokens` cuts longer inputs.

        Args:
            input_ids: The next tokens of each row.
            state: What the rows have read; `None` for nothing.
            document_start: Rows that begin a new document: they forget the one before. `None` means
                that all rows go on where they were, and with an empty state begin.
            num_tokens: Real tokens of each row, the first so many columns; `None` for all.
            targets: The token after each input, -100 where nothing is predicted.
            return_logits: Whether to return logits; `None`: if there are no targets.

        Returns:
            Loss or logits, and the entries to commit.

        Raises:
            MemoryStateError: If the state is used up or was made for another model.
            ValueError: If a row crosses the end of its segment, `num_tokens` is out of range, or
                the batch sizes differ. Where values are not known, the device checks them, see
                `byheart.ops.known`.
        """
        require_arguments(
            input_ids, self.vocab_size, document_start=document_start, num_tokens=num_tokens,
            targets=targets,
        )  # fmt: skip
        hidden, new_entries = self.read_embeddings(
            self.embedding(input_ids),
            state=state,
            document_start=document_start,
            num_tokens=num_tokens,
        )
        if return_logits is None:
            return_logits = targets is None
        token_losses, logits = self.predict(hidden, targets=targets, logits=return_logits)
        loss = None
        if targets is not None and token_losses is not None:
            loss = token_losses.sum() / (targets != IGNORED).sum().clamp(min=1)
        return DecoderOutput(
            new_entries=new_entries, loss=loss, token_losses=token_losses, logits=logits
        )

    def read_embeddings(
        self,
        embeddings: Float[Tensor, "batch query embed_dim"],
        *,
        state: MemoryState | None = None,
        document_start: Bool[Tensor, " batch"] | None = None,
        num_tokens: Int[Tensor, " batch"] | None = None,
    ) -> tuple[Float[Tensor, "batch query embed_dim"], NewEntries]:
        """Read vectors in the place of tokens.

        Args:
            embeddings: What stands for the next tokens of each row.
            state: As in `forward`.
            document_start: As in `forward`.
            num_tokens: As in `forward`.

        Returns:
            Last hidden states, after the final norm, and the entries to commit.
        """
        batch, num_queries, _ = embeddings.shape
        device = embeddings.device
        if state is None:
            state = self.new_state(batch)
        if document_start is None:
            document_start = torch.zeros(batch, dtype=torch.bool, device=device)
        is_full = num_tokens is None
        if num_tokens is None:
            num_tokens = torch.full((batch,), num_queries, device=device)
        else:
            require_columns(num_tokens, num_queries)
        state = self.require_state(state, batch, document_start)
        require_inside_segment(state, num_tokens)
        local = LocalContext.of(
            state, num_queries, self.config.window, self_visible=self.config.self_visible
        )
        hidden = self.dropout(embeddings)
        entries = []
        for layer, block in enumerate(self.blocks):
            hidden, new = block(hidden, local, state.stores.get(layer))
            entries.append(KeyValues(new.keys.detach(), new.values.detach()))
        new_entries = NewEntries(
            layers=tuple(entries),
            num_tokens=num_tokens,
            document_start=document_start,
            position=state.position,
            starts_segment=state.pending is None,
            is_full=is_full,
        )
        return self.norm(hidden), new_entries

    def read_window(
        self, window: Window, request: TextRequest | None, *, state: MemoryState | None
    ) -> WindowRead:
        """Read a window, see `SegmentModel`.

        Returns:
            Hidden states, what was requested, and the entries to commit.
        """
        hidden, new_entries = self.read_embeddings(
            window.embeddings, state=state, num_tokens=window.num_tokens
        )
        output = None
        if request is not None:
            text = hidden[:, window.text_start : window.text_start + request.num_columns]
            losses, logits = self.predict(
                request.of(text), targets=request.targets, logits=request.logits
            )
            output = TextOutput(losses, logits)
        return WindowRead(hidden, output, new_entries)

    def predict(
        self,
        hidden: Float[Tensor, "batch query embed_dim"],
        *,
        targets: Int[Tensor, "batch query"] | None,
        logits: bool,
    ) -> tuple[
        Float[Tensor, "batch query"] | None,
        Float[Tensor, "batch query vocab"] | None,
    ]:
        """Predict the next tokens.

        Args:
            hidden: Last hidden states.
            targets: The token after each, -100 where nothing is predicted; `None` for no losses.
            logits: Whether scores are wanted.

        Returns:
            Negative log likelihood of each target, in nats, 0 where it is -100; and the scores,
            float32.
        """
        hidden = self.dropout(hidden)
        weight, losses, scores = self.embedding.weight, None, None
        if targets is not None:
            flat = cross_entropy(hidden.flatten(0, 1), weight, targets.flatten())
            losses = flat.view_as(targets)
        if logits:
            scores = (hidden @ weight.to(hidden.dtype).T).float()
        return losses, scores

    def memory_metrics(self) -> dict[str, float]:
        """Return the gates and attention scales of the memory layers, for logs."""
        metrics: dict[str, float] = {}
        for layer, block in enumerate(self.blocks):
            assert isinstance(block, Block)
            mix = block.attention.mix
            if mix is not None:
                metrics |= layer_metrics(layer, block.attention.log_scale, mix.gate())
        return metrics


def require_columns(num_tokens: Int[Tensor, " batch"], width: int) -> None:
    """Refuse counts of tokens that the columns of an input do not have.

    Where values are not known, the device checks it.

    Args:
        num_tokens: Tokens of each row.
        width: Columns of the input.
    """
    wrong = (num_tokens < 0) | (num_tokens > width)

    def error() -> ValueError:
        row = int(wrong.long().argmax())
        return ValueError(
            f"num_tokens must be between 0 and the {width} columns of input_ids, got "
            f"{int(num_tokens[row])} for row {row}."
        )

    known.require(~wrong, error, "num_tokens must be between 0 and the columns of input_ids")


def require_inside_segment(state: MemoryState, num_tokens: Int[Tensor, " batch"]) -> None:
    """Refuse tokens that do not fit into the segment that a row is in.

    Where values are not known, the device checks it.

    Args:
        state: What the rows have read.
        num_tokens: Tokens of each row.
    """
    length = state.layout.segment_length
    left = length - state.num_pending

    def error() -> ValueError:
        row = int((num_tokens - left).argmax())
        return ValueError(
            f"The tokens of a pass must fit into the segment of {length} tokens: row {row} has "
            f"room for {int(left[row])}, got {int(num_tokens[row])}. Use byheart.read_tokens, "
            "which cuts at segment ends."
        )

    known.require(num_tokens <= left, error, "the tokens of a pass must fit into the segment")
