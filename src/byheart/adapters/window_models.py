"""Hugging Face models as readers of windows."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from byheart.models.text_output import TextOutput, TextRequest
from byheart.models.window import Window
from byheart.models.window_model import Encoded
from byheart.ops.losses import token_losses


class HuggingFaceReader:
    """What all readers have in common."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model: Any = model
        self.embedding: Any = model.get_input_embeddings()

    def parameters(self) -> Iterator[nn.Parameter]:
        """Return the model's parameters."""
        yield from self.model.parameters()


class CausalWindowModel(HuggingFaceReader):
    """A decoder with a language-model head.

    The memory is what the head would read: a hook in front of the head takes it, because base
    models differ in what they return (OPT-350m's is not in embedding space), and passes on only
    the columns whose logits are wanted.
    """

    writes = True
    has_memory = False

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__(model)
        self.embed_dim = model.get_output_embeddings().weight.shape[1]

    def __call__(self, window: Window, request: TextRequest | None) -> Encoded:
        """Read a window.

        Returns:
            Hidden states and, if requested, a `TextOutput`.
        """
        return Encoded(*read_causal(self.model, window, request, {"attention_mask": _mask(window)}))


def read_causal(
    model: PreTrainedModel,
    window: Window,
    request: TextRequest | None,
    arguments: dict[str, Any],
) -> tuple[Float[Tensor, "rows window embed_dim"], TextOutput | None]:
    """Read a window with a decoder that has a language-model head.

    Args:
        model: The decoder.
        window: The window.
        request: What is wanted of the text; `None` for nothing.
        arguments: What the model is given besides the window's embeddings.

    Returns:
        Hidden states as the head reads them, and what was requested.
    """
    start = window.text_start
    # the head of a large vocabulary costs more than a small model: for nothing it gets nothing
    stop = start + (request.num_columns if request is not None else 0)
    taken: list[Tensor] = []

    def take(_: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        taken.append(inputs[0])
        text = inputs[0][:, start:stop]
        return (text if request is None else request.of(text), *inputs[1:])

    with _hook(model.get_output_embeddings().register_forward_pre_hook, take):
        logits = model(inputs_embeds=window.embeddings, use_cache=False, **arguments).logits
    if request is None:
        return taken[0], None
    losses = None
    if request.targets is not None:
        losses = token_losses(logits, request.targets)
    return taken[0], TextOutput(losses, logits if request.logits else None)


class ClassifierWindowModel(HuggingFaceReader):
    """An encoder with a head for whole texts, such as `BertForSequenceClassification`."""

    writes = False
    has_memory = False

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__(model)
        self.embed_dim = model.config.hidden_size

    def __call__(self, window: Window, request: bool | None) -> Encoded:
        """Read a window.

        Returns:
            Hidden states and, if requested, logits `[rows, labels]`.
        """
        if not request:
            return Encoded(self.model.base_model(**_inputs(window))[0], None)
        taken: list[Tensor] = []
        with _hook(
            self.model.base_model.register_forward_hook,
            lambda _, __, output: taken.append(output[0]),
        ):
            logits = self.model(**_inputs(window)).logits
        return Encoded(taken[0], logits)


@dataclass(frozen=True, kw_only=True, eq=False)
class AnswerRequest:
    """What is wanted of a segment, from an encoder-decoder."""

    labels: Int[Tensor, "rows answer"] | None
    """The answer that the decoder shall give, -100 behind its end; `None`: none is given, and the
    encoder's states are returned."""


class Seq2SeqWindowModel(HuggingFaceReader):
    """An encoder-decoder: the encoder has the memory, the decoder reads the last segment."""

    writes = False
    has_memory = False

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__(model)
        self.encoder = model.get_encoder()
        self.embed_dim = self.embedding.weight.shape[1]

    def __call__(self, window: Window, request: AnswerRequest | None) -> Encoded:
        """Read a window.

        Returns:
            Hidden states of the encoder and, if requested, logits `[rows, answer, vocab]`, or the
            encoder's states with their mask.
        """
        encoded = self.encoder(**_inputs(window))
        hidden = encoded[0]
        if request is None:
            return Encoded(hidden, None)
        mask = window.mask
        if mask is None:
            mask = torch.ones(hidden.shape[:2], dtype=torch.bool, device=hidden.device)
        if request.labels is None:
            return Encoded(hidden, (hidden, mask))
        logits = self.model(
            encoder_outputs=encoded, attention_mask=mask.long(), labels=request.labels
        ).logits
        return Encoded(hidden, logits)


def _mask(window: Window) -> Int[Tensor, "rows window"] | None:
    # without padding no mask is passed: that is plain causal attention to every backend
    return None if window.mask is None else window.mask.long()


def _inputs(window: Window) -> dict[str, Any]:
    return {"inputs_embeds": window.embeddings, "attention_mask": _mask(window)}


@contextmanager
def _hook(register: Callable[..., Any], function: Callable[..., Any]) -> Iterator[None]:
    handle = register(function)
    try:
        yield
    finally:
        handle.remove()
