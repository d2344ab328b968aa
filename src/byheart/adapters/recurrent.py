"""Recurrent memory on a `Decoder` or any Hugging Face model: `RecurrentMemory`."""

import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from byheart.adapters.families import (
    embedding_statistics,
    input_embedding,
    model_kind,
    window_model,
)
from byheart.adapters.heads import EncoderHead, Head, make_head
from byheart.adapters.recurrent_checks import (
    require_fits,
    require_input,
    require_known_labels,
    without_attached,
)
from byheart.adapters.recurrent_trial import generates_behind_padding
from byheart.adapters.tied import keep_tied_weights_once
from byheart.adapters.trainer_face import TrainerFace
from byheart.memory.recurrent import NewMemory, RecurrentLayout, RecurrentState
from byheart.models.arguments import require_state_type
from byheart.models.fingerprint import model_fingerprint
from byheart.models.recurrent import RecurrentCore
from byheart.models.recurrent_config import RecurrentMemoryConfig
from byheart.models.recurrent_text import RowText, gather_text, new_memory, require_token_ids
from byheart.models.segment_model import SegmentModel
from byheart.models.segment_reader import SegmentReader, inner_layout, require_room
from byheart.models.segmentation import Step, plan_steps
from byheart.models.window_model import Segment

if TYPE_CHECKING:
    from byheart.adapters.recurrent_reading import DocumentRead, DocumentTokens


@dataclass
class RecurrentOutput(ModelOutput):  # type: ignore[misc]
    """What a forward pass returns."""

    loss: Float[Tensor, ""] | None = None
    """Mean loss, in nats: over the labelled tokens, or over the rows of a classifier."""
    logits: Tensor | None = None
    """Language models: scores of the next token, `[batch, tokens, vocab]`, of the last
    `logits_to_keep` input columns. Classifiers: `[batch, labels]`. Encoder-decoders: `[batch,
    answer, vocab]`. The last two read the last segment of each row."""
    token_losses: Float[Tensor, "batch tokens"] | None = None
    """Language models: negative log likelihood of each label, in nats; 0 where it is -100."""
    new_entries: NewMemory | None = None
    """What to give to `state.commit`."""
    write_share: Float[Tensor, ""] | None = None
    """With `update="gated"`, the share of its memory that a segment has rewritten, on average. It
    has a gradient: added to the loss, it makes the memory keep what it can."""


class RecurrentMemory(TrainerFace):
    """A model that passes memory tokens from segment to segment.

    A `Decoder`, alone or with its XL cache and kNN memory; of Hugging Face encoders for sequence
    classification, causal language models, also with what `attach` adds, and encoder-decoders:

        config = RecurrentMemoryConfig(segment_length=499, start_ids=(101,), separator_ids=(102,),
                                       end_ids=(102,), alignment="right")
        memory_model = RecurrentMemory(model, config)
        out = memory_model(input_ids, attention_mask=mask, labels=labels)
        out.loss.backward()

    Texts of any length are read segment by segment. Without a `state` every row is a whole
    document; with one, the next piece of it: `state = state.commit(out.new_entries)`.

    Source:
        Bulatov, Kuratov, Burtsev 2022 (arXiv:2207.06881) and 2023 (arXiv:2304.11062).
    """

    def __init__(
        self, model: PreTrainedModel | SegmentModel, config: RecurrentMemoryConfig
    ) -> None:
        """Put memory around a model.

        Args:
            model: A `Decoder`, a Hugging Face model with its head, or what `attach` returns. It is
                used as it is, and not changed.
            config: The memory.

        Raises:
            ValueError: If the model cannot use this memory.
        """
        super().__init__()
        require_fits(model, config)
        self.model: Any = model
        self.kind = model_kind(model)
        self.memory_config = config
        embedding = input_embedding(model)
        mean, std = embedding_statistics(embedding)
        self.memory = RecurrentCore(config, len(mean), mean=mean, std=std).to(
            embedding.weight.device
        )
        keep_tied_weights_once(self)

    @property
    def is_language_model(self) -> bool:
        """Whether each token is predicted from those before it."""
        return self.kind == "decoder"

    @cached_property
    def generates_behind_padding(self) -> bool:
        """Whether the model's own `generate` lets rows of different lengths run side by side."""
        return generates_behind_padding(without_attached(self.model))

    @property
    def layout(self) -> RecurrentLayout:
        """The shape of the memory."""
        return RecurrentLayout(
            num_memory_tokens=self.memory_config.num_memory_tokens,
            embed_dim=self.memory.memory.shape[1],
            segment_length=self.memory_config.segment_length,
            inner=inner_layout(self.model),
        )

    def new_state(self, batch_size: int) -> RecurrentState:
        """Make a state in which no row has read anything.

        Args:
            batch_size: Rows.

        Returns:
            The empty state.
        """
        device, dtype = self.memory.memory.device, getattr(self.model, "cache_dtype", torch.float32)
        return RecurrentState.empty(self.layout, batch_size, device=device, cache_dtype=dtype)

    def save_state(self, state: RecurrentState, directory: str | os.PathLike[str]) -> None:
        """Write a state of this model to a directory, with a fingerprint of the weights.

        Args:
            state: What to save.
            directory: Where to. It is replaced only when the new one is complete.
        """
        require_state_type(state, RecurrentState)
        self.layout.require_same(state.layout, "The memory state")
        state.save(os.fspath(directory), fingerprint=model_fingerprint(self))

    def load_state(self, directory: str | os.PathLike[str]) -> RecurrentState:
        """Read a state that these weights have made.

        Args:
            directory: Where `save_state` has written it.

        Returns:
            The state, on the model's device.
        """
        return RecurrentState.load(
            os.fspath(directory),
            self.layout,
            fingerprint=model_fingerprint(self),
            device=self.memory.memory.device,
        )

    def forward(
        self,
        input_ids: Int[Tensor, "batch tokens"],
        *,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        targets: Int[Tensor, "batch tokens"] | None = None,
        state: RecurrentState | None = None,
        document_start: Bool[Tensor, " batch"] | None = None,
        logits_to_keep: int | None = None,
        num_items_in_batch: Tensor | int | None = None,
    ) -> RecurrentOutput:
        """Read texts segment by segment.

        Args:
            input_ids: Text of each row, without special tokens for encoders.
            attention_mask: `[batch, tokens]`, 1 for text and 0 for padding before or behind it;
                `None` for no padding. A row without text keeps its memory.
            labels: As Hugging Face models take them: for language models `[batch, tokens]`, the
                token at each place or -100, shifted here; for classifiers `[batch]`; for
                encoder-decoders `[batch, answer]`.
            targets: For language models instead of `labels`: what follows each token, not shifted
                here. So the last token of a piece can be asked what the next piece begins with.
            state: What the rows have read; `None` for nothing.
            document_start: Rows that begin a new document: they forget the one before.
            logits_to_keep: Language models: input columns, counted from the end, whose logits are
                returned; `None` for all if there are no labels, and for none otherwise.
            num_items_in_batch: What the sum of losses is divided by, if not by their number; for
                gradient accumulation.

        Returns:
            Loss and logits, and the memory to commit.

        Raises:
            ValueError: If an argument does not fit the model or the others.
        """
        require_known_labels(self.model, attention_mask, labels=labels, targets=targets)

        def head(text: RowText) -> Head:
            return make_head(
                self.kind,
                text,
                labels=labels,
                targets=targets,
                logits_to_keep=logits_to_keep,
                problem_type=getattr(self.config, "problem_type", None),
                may_lack_labels=num_items_in_batch is not None,
            )

        result, entries = self._read(
            input_ids, attention_mask, state, document_start, head, num_items_in_batch
        )
        return RecurrentOutput(**result, new_entries=entries)

    def encode(
        self,
        input_ids: Int[Tensor, "batch tokens"],
        *,
        attention_mask: Tensor | None = None,
        state: RecurrentState | None = None,
        document_start: Bool[Tensor, " batch"] | None = None,
    ) -> tuple[Float[Tensor, "batch window embed_dim"], Bool[Tensor, "batch window"], NewMemory]:
        """Read texts with the encoder of an encoder-decoder, to answer them.

        Args:
            input_ids: As in `forward`.
            attention_mask: As in `forward`.
            state: As in `forward`.
            document_start: As in `forward`.

        Returns:
            The encoder's states over the last segment of each row, memory included; which of them
            are real; and the memory to commit.

        Raises:
            ValueError: If the model is no encoder-decoder, or an argument does not fit.
        """
        if self.kind != "encoder-decoder":
            msg = f"encode is for encoder-decoders, got {type(self.model).__name__}. Call forward."
            raise ValueError(msg)
        result, entries = self._read(
            input_ids, attention_mask, state, document_start, EncoderHead, None
        )
        return result["hidden"], result["mask"], entries

    def generate(
        self, input_ids: Int[Tensor, "batch tokens"], **options: Any
    ) -> tuple[Int[Tensor, "batch new"], RecurrentState]:
        """Continue texts, or answer them, see `byheart.adapters.recurrent_generate.generate`.

        Args:
            input_ids: The text, or its next piece.
            options: `attention_mask`, `state`, `max_new_tokens`, and options of Hugging Face's
                `generate`, or for a `Decoder` those named there.

        Returns:
            The new tokens, and the state after them.
        """
        from byheart.adapters.recurrent_generate import generate

        return generate(self, input_ids, **options)

    def read_documents(
        self, documents: "Iterable[DocumentTokens]", **options: Any
    ) -> "Iterator[DocumentRead]":
        """Read many documents side by side, see `byheart.adapters.recurrent_reading`.

        Args:
            documents: Their tokens, or what gives them piece by piece; of any lengths.
            options: `rows`, `segments_per_call`, `cuda_graphs` and `on_tokens`.

        Returns:
            Scores and state of each document, as its end is reached.
        """
        from byheart.adapters.recurrent_reading import read_documents

        return read_documents(self, documents, **options)

    def save_pretrained(
        self, directory: str | os.PathLike[str], *, with_model: bool = False
    ) -> None:
        """Write the added weights and the config to a directory.

        Args:
            directory: Where to. It is replaced only when the new one is complete.
            with_model: Write the model inside, too; for models whose own weights were trained.
        """
        from byheart.adapters.recurrent_saving import save_recurrent

        save_recurrent(self, directory, with_model=with_model)

    @classmethod
    def from_pretrained(
        cls, model: PreTrainedModel | SegmentModel | None, directory: str | os.PathLike[str]
    ) -> "RecurrentMemory":
        """Put saved memory around a model, see `byheart.adapters.recurrent_saving`.

        Args:
            model: What it was saved from; `None` for the one saved along.
            directory: Where `save_pretrained` has written.

        Returns:
            The model with memory, in evaluation mode.
        """
        from byheart.adapters.recurrent_saving import load_recurrent

        return load_recurrent(model, directory)

    def _read(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        state: RecurrentState | None,
        document_start: Tensor | None,
        make: Callable[[RowText], Head],
        num_items: Tensor | int | None,
    ) -> tuple[dict[str, Tensor], NewMemory]:
        require_token_ids(input_ids)
        if state is None:
            state = self.new_state(len(input_ids))
        require_state_type(state, RecurrentState)
        self.layout.require_same(state.layout, "The memory state")
        if document_start is None:
            document_start = torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)
        require_input(self.model, input_ids, state)
        before = state.start_documents(document_start)
        text = gather_text(input_ids, attention_mask, before)
        head = make(text)
        config = self.memory_config
        steps = plan_steps(
            text.num_tokens,
            config.segment_length,
            config.alignment,
            every_row=before.inner is not None,
        )
        wanted = [(step, head.request(step)) for step in steps]
        # an unfinished segment of which nothing is wanted changes nothing
        wanted = [(step, request) for step, request in wanted if request or any(self._whole(step))]
        read_steps = [step for step, _ in wanted]
        require_room(self.model, before.inner, read_steps, config.num_memory_tokens)
        segments = [self._segment(step, text, request) for step, request in wanted]
        read = self.memory.unroll(
            window_model(self.model, before.inner), segments, self.first_memory(before)
        )
        entries = new_memory(
            text, before, read.memory, document_start, keep_unfinished=config.alignment == "left"
        )
        if isinstance(read.reader, SegmentReader):
            entries = replace(entries, inner=read.reader.state, inner_entries=read.reader.entries)
        result = head.collect(read_steps, read.outputs, num_items)
        if read.write_share is not None:
            result["write_share"] = read.write_share
        return result, entries

    def first_memory(self, state: RecurrentState) -> Float[Tensor, "batch memory embed_dim"]:
        """Return the memory that the next segment of each row reads.

        Args:
            state: What the rows have read.

        Returns:
            The state's memory, or the learned first one for rows that have read no segment.
        """
        fresh = (state.num_segments == 0)[:, None, None]
        return torch.where(fresh, self.memory.memory.float(), state.memory)

    def _whole(self, step: Step) -> list[bool]:
        """Return whether the segment of each row of a step is complete."""
        if self.memory_config.alignment != "left":
            return [True] * len(step.rows)
        length = self.memory_config.segment_length
        return [stop - start == length for start, stop in step.spans]

    def _segment(self, step: Step, text: RowText, request: Any) -> Segment:
        ids, num_tokens = step.take(text.input_ids)
        whole = self._whole(step)
        complete = None if all(whole) else torch.tensor(whole, device=ids.device)
        return Segment(
            input_ids=ids,
            num_tokens=num_tokens,
            rows=None if len(step.rows) == len(text.num_tokens) else step.row_ids(ids),
            writes_memory=complete,
            request=request.content if request is not None else None,
            has_loss=request is not None and request.has_loss,
        )
