"""A pretrained decoder with a kNN memory and an XL cache: `MemoryModel`."""

import os
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import ModelOutput, PushToHubMixin

from byheart.adapters.attach_checks import require_fits, require_possible, require_same_in_pieces
from byheart.adapters.attach_config import AttachConfig
from byheart.adapters.attached_memory import AttachedMemory
from byheart.adapters.attention_hook import hook_of
from byheart.adapters.attention_layers import AttentionLayers, prepare_attentions
from byheart.adapters.families import max_positions
from byheart.adapters.memory_pass import MemoryPass
from byheart.adapters.memory_view import MEMORY
from byheart.adapters.row_tokens import RowTokens
from byheart.adapters.tied import keep_tied_weights_once
from byheart.adapters.trainer_face import TrainerFace
from byheart.adapters.window_models import read_causal
from byheart.memory.layout import MemoryLayout
from byheart.memory.state import MemoryState, NewEntries
from byheart.models.arguments import require_arguments
from byheart.models.fingerprint import weight_sums
from byheart.models.segment_model import SegmentModel, WindowRead, layer_metrics
from byheart.models.text_output import TextRequest
from byheart.models.window import Window
from byheart.ops.losses import IGNORED, token_losses


@dataclass
class MemoryOutput(ModelOutput):  # type: ignore[misc]
    """What a forward pass returns."""

    loss: Float[Tensor, ""] | None = None
    """Mean negative log likelihood of the labelled tokens, in nats."""
    logits: Float[Tensor, "batch tokens vocab"] | None = None
    """Scores of the next token."""
    token_losses: Float[Tensor, "batch tokens"] | None = None
    """Negative log likelihood of each target, in nats; 0 where it is -100."""
    new_entries: NewEntries | None = None
    """What to give to `state.commit` after backward."""


class MemoryModel(TrainerFace, SegmentModel, PushToHubMixin):  # type: ignore[misc]
    """A pretrained decoder that remembers.

    Forward reads memory and never writes it:

        state = memory_model.new_state(batch_size=4)
        out = memory_model(input_ids, state=state, document_start=first, targets=targets)
        out.loss.backward()
        state = state.commit(out.new_entries)

    Source:
        Wu et al. 2022, Memorizing Transformers, "Fine-tuning a non-memory model"
        (arXiv:2203.08913); Dai et al. 2019, Transformer-XL.
    """

    def __init__(self, model: PreTrainedModel, config: AttachConfig) -> None:
        """Put memory on a model.

        Args:
            model: A causal language model with its weights. Its attention layers are changed until
                `detach`.
            config: The memory.

        Raises:
            ValueError: If the model cannot use this memory. It is not changed then.
        """
        super().__init__()
        require_possible(model, config)
        config = config.resolve(model.config.get_text_config().num_hidden_layers)
        self.model: Any = model
        self.memory_config = config
        self.layers: AttentionLayers = prepare_attentions(model, config.reach)
        self._memories: dict[int, AttachedMemory] = {}
        self._is_attached = True
        try:
            require_fits(model, config, self.layers)
            self._layout = _layout(config, self.layers, model.config.model_type)
            if config.xl_cache_length and not self.layers.has_rotation:
                self.max_document_tokens = max_positions(model)
            self._add_memories(model, config)
            require_same_in_pieces(model, self)
        except BaseException:
            self.detach()
            raise
        self._sums = weight_sums(model, is_added)
        # set where memory is loaded: the model's weights may be nowhere else
        self.was_saved_along = False
        keep_tied_weights_once(self)

    def _add_memories(self, model: PreTrainedModel, config: AttachConfig) -> None:
        """Put the weights of the memory below the attention modules that read it."""
        weight = model.get_input_embeddings().weight
        for layer in config.knn.layers if config.knn is not None else ():
            module, layers = self.layers.modules[layer], self.layers
            rotation = layers.hooks[layer].rotation
            # keys in memory have lost what the rotation makes them longer by; queries have kept it
            # where they are rotated
            stretch = 1.0 if rotation is None else rotation.stretch
            power = 2 if config.memory_position == "none" else 1
            scaling = layers.scaling[layer] * stretch**power
            like = next(module.parameters(), weight)
            memory = AttachedMemory(config, layers.num_heads, layers.head_dim, scaling, like)
            setattr(module, MEMORY, memory)
            self._memories[layer] = memory

    @property
    def config(self) -> Any:
        """The model's config."""
        return self.model.config

    @property
    def memory_layout(self) -> MemoryLayout:
        """The shape of its memory."""
        self.require_attached()
        return self._layout

    @property
    def cache_dtype(self) -> torch.dtype:
        """Precision of the XL caches: the model's."""
        dtype: torch.dtype = self.model.dtype
        return dtype

    @property
    def hidden_dtype(self) -> torch.dtype:
        """Precision of the model's hidden states."""
        dtype: torch.dtype = self.model.get_input_embeddings().weight.dtype
        return dtype

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        device: torch.device = self.model.get_input_embeddings().weight.device
        return device

    @property
    def vocab_size(self) -> int:
        """Tokens that it can predict."""
        size: int = self.model.get_output_embeddings().weight.shape[0]
        return size

    def input_embedding(self) -> Any:
        """Return what turns token ids into vectors."""
        return self.model.get_input_embeddings()

    def require_attached(self) -> None:
        """Refuse to go on without the memory.

        Raises:
            ValueError: If it was taken off.
        """
        if not self._is_attached:
            msg = (
                "The memory was taken off the model with detach(). Put it on again with "
                "byheart.attach, or load it with MemoryModel.from_pretrained."
            )
            raise ValueError(msg)

    def memories(self) -> dict[int, Any]:
        """Return what the memory layers have learned, by layer; PEFT may have wrapped it."""
        self.require_attached()
        return {layer: getattr(self.layers.modules[layer], MEMORY) for layer in self._memories}

    def memory_parameters(self) -> list[nn.Parameter]:
        """Return the added weights, for an optimizer that trains them alone or faster."""
        return [weight for memory in self.memories().values() for weight in memory.parameters()]

    def memory_metrics(self) -> dict[str, float]:
        """Return the gates and scales of the memory layers, for logs."""
        metrics: dict[str, float] = {}
        for layer, memory in self.memories().items():
            metrics |= layer_metrics(layer, memory.log_scale, memory.gate())
        return metrics

    @property
    def has_learned(self) -> bool:
        """Whether the model's own weights are others than when memory was put on it."""
        return weight_sums(self.model, is_added) != self._sums

    def generate(self, input_ids: Any = None, generation_config: Any = None, **options: Any) -> Any:
        """Continue prompts as transformers' `generate` does, with the memory in sight.

        Args:
            input_ids: Prompts of any length, or what follows that which `state` has read.
            generation_config: As transformers takes it.
            options: `attention_mask`, `state`, and what transformers' `generate` takes, such as
                `max_new_tokens`, `do_sample`, `num_beams`, `num_return_sequences`.

        Returns:
            What transformers' `generate` returns: the prompts with their continuations.
        """
        from byheart.adapters.memory_generate import generate_with_memory

        return generate_with_memory(self, input_ids, generation_config, **options)

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        *,
        with_model: bool | None = None,
        is_main_process: bool = True,
        max_shard_size: int | str = "50GB",
        **options: Any,
    ) -> None:
        """Write the added weights and the config; see `byheart.adapters.memory_saving`.

        Args:
            save_directory: Where to. It is replaced only when the new one is complete.
            with_model: Write the model, too; `None`: if its own weights are nowhere else, see
                `save_attached`.
            is_main_process: Whether this process of several writes.
            max_shard_size: Largest file of the model's own weights.
            options: None of those that transformers' own models take.

        Raises:
            TypeError: If there are others.
        """
        from byheart.adapters.memory_saving import save_attached

        if options:
            msg = (
                "save_pretrained takes with_model, is_main_process and max_shard_size, got "
                f"{', '.join(options)}. Leave it out; to publish a memory use push_to_hub."
            )
            raise TypeError(msg)
        if is_main_process:
            save_attached(
                self, save_directory, with_model=with_model, max_shard_size=max_shard_size
            )

    @classmethod
    def from_pretrained(
        cls,
        model: PreTrainedModel | None,
        source: str | os.PathLike[str],
        *,
        check_model: bool = True,
    ) -> "MemoryModel":
        """Put saved memory on a model; see `byheart.adapters.memory_saving`.

        Args:
            model: The model it was saved from; `None` for the one saved along.
            source: A directory, or a repository of the Hugging Face hub.
            check_model: Refuse a model with other weights.

        Returns:
            The model with memory, in evaluation mode.
        """
        from byheart.adapters.memory_saving import load_attached

        return load_attached(model, source, check_model=check_model)

    def detach(self) -> PreTrainedModel:
        """Take the memory off again; this model with memory is of no use then.

        Returns:
            The model as it was, with the weights that it has now.
        """
        self.layers.uninstall()
        for layer in list(self._memories):
            module = self.layers.modules[layer]
            # another memory may have been attached since this one was taken off
            if hook_of(module) is None and hasattr(module, MEMORY):
                delattr(module, MEMORY)
        self._memories, self._is_attached = {}, False
        model: PreTrainedModel = self.model
        return model

    def forward(
        self,
        input_ids: Int[Tensor, "batch tokens"],
        *,
        attention_mask: Shaped[Tensor, "batch tokens"] | None = None,
        num_tokens: Int[Tensor, " batch"] | None = None,
        state: MemoryState | None = None,
        document_start: Bool[Tensor, " batch"] | None = None,
        labels: Int[Tensor, "batch tokens"] | None = None,
        targets: Int[Tensor, "batch tokens"] | None = None,
        num_items_in_batch: Tensor | int | None = None,
    ) -> MemoryOutput:
        """Read the next tokens of each row's document.

        All tokens of a row must lie in one segment; `byheart.read_tokens` cuts longer inputs.

        Args:
            input_ids: The next tokens of each row.
            attention_mask: Real tokens, one run in each row; `None` for all.
            num_tokens: Real tokens of each row, the first so many columns, instead of a mask.
            state: What the rows have read; `None` for nothing.
            document_start: Rows that begin a new document: they forget the one before. `None` means
                that all rows go on where they were, and with an empty state begin.
            labels: As Hugging Face models take them: the tokens themselves, -100 where nothing is
                predicted.
            targets: The token after each input instead, -100 where nothing is predicted.
            num_items_in_batch: What the sum of the losses is divided by; `None` for the number of
                targets.

        Returns:
            Loss, logits, and the entries to commit.

        Raises:
            MemoryStateError: If the state is used up or was made for another model.
            ValueError: If a row crosses the end of its segment or the model's last position, the
                arguments do not fit together, or the memory was taken off.
        """
        require_arguments(
            input_ids, len(self.input_embedding().weight), self.vocab_size, num_tokens=num_tokens,
            document_start=document_start, labels=labels, targets=targets,
        )  # fmt: skip
        rows = RowTokens.of(input_ids, attention_mask, num_tokens)
        reading = MemoryPass.of(self, rows, state, document_start)
        logits = self.model(input_ids=input_ids, use_cache=False, **reading.arguments).logits
        if labels is not None:
            targets = _targets(labels, targets)
        losses = loss = None
        if targets is not None:
            losses = token_losses(logits, targets)
            predicted = (targets != IGNORED).sum().clamp(min=1)
            loss = losses.sum() / (predicted if num_items_in_batch is None else num_items_in_batch)
        return MemoryOutput(
            loss=loss,
            logits=logits,
            token_losses=losses,
            new_entries=reading.new_entries(),
        )

    def read_window(
        self, window: Window, request: TextRequest | None, *, state: MemoryState | None
    ) -> WindowRead:
        """Read vectors in the place of tokens, see `SegmentModel`.

        Returns:
            Hidden states, what was requested, and the entries to commit.
        """
        rows = RowTokens.of(window.embeddings, None, window.num_tokens)
        reading = MemoryPass.of(self, rows, state)
        hidden, output = read_causal(self.model, window, request, reading.arguments)
        return WindowRead(hidden, output, reading.new_entries())


def is_added(name: str) -> bool:
    """Say whether a weight was added to the model below.

    Args:
        name: Its name.

    Returns:
        Whether it belongs to the memory.
    """
    return MEMORY in name.split(".")


def _layout(config: AttachConfig, layers: AttentionLayers, model_type: str) -> MemoryLayout:
    return MemoryLayout(
        num_layers=len(layers.modules),
        num_kv_heads=layers.num_kv_heads,
        head_dim=layers.head_dim,
        segment_length=config.segment_length,
        xl_cache_length=config.xl_cache_length,
        knn_memory=config.knn,
        unit_keys=config.normalize_qk,
        model_type=model_type,
    )


def _targets(labels: Tensor, targets: Tensor | None) -> Tensor:
    """Turn the token at each place into the token after it.

    Returns:
        Targets; -100 in the last column.

    Raises:
        ValueError: If there are targets already.
    """
    if targets is not None:
        msg = "labels and targets must not both be given: targets are labels moved by one."
        raise ValueError(msg)
    return nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORED)
