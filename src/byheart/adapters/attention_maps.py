"""What every position of every segment attends to, from an encoder with recurrent memory."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from byheart.adapters.recurrent import RecurrentMemory
from byheart.adapters.window_models import HuggingFaceReader
from byheart.models.eval_mode import eval_mode
from byheart.models.segmentation import plan_steps
from byheart.models.window import Window
from byheart.models.window_model import Encoded, Segment


class SegmentAttention(NamedTuple):
    """What a segment attended to, and what it left in the memory. Float32 on the CPU."""

    weights: Float[Tensor, "layers heads window _window"]
    """Attention of each query (third axis) over all keys (fourth); no gradient."""
    opened: Float[Tensor, " memory"] | None
    """How much of each memory token the segment has rewritten, from 0 to 1: how far its gate
    opened. `None` without gates."""


def segment_attention(
    memory_model: RecurrentMemory, input_ids: Int[Tensor, " tokens"]
) -> list[SegmentAttention]:
    """Read a document and note the attention in each segment.

    A window is `[start ; memory ; separator ; text ; end]`. Attention is computed in the plain way,
    whatever the model uses otherwise; that is restored at the end.

    Args:
        memory_model: An encoder with memory.
        input_ids: The document.

    Returns:
        An entry per segment.

    Raises:
        ValueError: If the model is no encoder, or the document is empty.
    """
    if memory_model.kind != "encoder":
        msg = (
            "Attention maps need an encoder for sequence classification, got a model of kind "
            f"{memory_model.kind!r}."
        )
        raise ValueError(msg)
    if not len(input_ids):
        msg = "input_ids must hold at least one token, got none."
        raise ValueError(msg)
    config, core = memory_model.memory_config, memory_model.memory
    tokens = input_ids.to(core.memory.device)[None]
    memory = core.memory.float()[None]
    reader = _AttentionReader(memory_model.model)
    found = []
    with _plain_attention(memory_model), torch.no_grad():
        for step in plan_steps((len(input_ids),), config.segment_length, config.alignment):
            text, _ = step.take(tokens)
            segment = Segment(
                input_ids=text,
                num_tokens=None,
                rows=None,
                writes_memory=None,
                request=None,
                has_loss=False,
            )
            stepped = core.step(reader, segment, memory)
            memory = stepped.memory
            opened = None if stepped.opened is None else stepped.opened[0].float().cpu()
            found.append(SegmentAttention(stepped.output, opened))
    return found


class _AttentionReader(HuggingFaceReader):
    """A reader of windows whose output is their attention."""

    writes = False
    has_memory = False

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__(model)
        self.embed_dim: int = model.config.hidden_size

    def __call__(self, window: Window, request: Any) -> Encoded:
        output = self.model.base_model(inputs_embeds=window.embeddings, output_attentions=True)
        return Encoded(output[0], torch.cat(output.attentions).float().cpu())


@contextmanager
def _plain_attention(memory_model: RecurrentMemory) -> Iterator[None]:
    # the fast implementations do not give their weights away
    model = memory_model.model
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        with eval_mode(memory_model):
            yield
    finally:
        model.set_attn_implementation(before)
