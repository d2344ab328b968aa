"""Try with the model itself what recurrent memory stands on: families differ in unforeseen ways."""

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from byheart.adapters.families import Kind, max_positions
from byheart.models.eval_mode import eval_mode

__all__ = ["MIXED_PADDING", "generates_behind_padding", "require_reads_embeddings"]

MIXED_PADDING = (
    "Padding must change nothing, but {family} mixes it with the text, so that rows would depend "
    "on the others of their batch. Use another encoder."
)
"""Why such a model is refused."""

_NUM_TOKENS = 4
_NUM_PADDING = 2
# of the largest score: what matters moves it by more, and rounding by less
_TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-3}
_TOLERANCE_OF_HALVES = 5e-2


@torch.no_grad()
def require_reads_embeddings(model: PreTrainedModel, kind: Kind) -> None:
    """Refuse a model to which a memory cannot be given as the vectors of more tokens.

    Args:
        model: The model.
        kind: How it reads.

    Raises:
        ValueError: If it reads vectors other than tokens, or passes padding on to the text.
        OutOfMemoryError: If there is no room to try it.
    """
    embedding = model.get_input_embeddings()
    if embedding.weight.is_meta:
        return  # nothing to try it with
    ids = _some_tokens(model)
    vectors = embedding(ids)
    # no word has this vector, as it is with a memory
    memory = vectors.mean(dim=1, keepdim=True)
    family = model.config.model_type
    with eval_mode(model):
        try:
            expected = _scores(model, kind, input_ids=ids)
            found = _scores(model, kind, inputs_embeds=vectors)
            _scores(model, kind, inputs_embeds=torch.cat([memory, vectors], dim=1))
            is_alone = kind == "decoder" or _ignores_padding(model, kind, vectors)
        except torch.OutOfMemoryError:
            raise  # which says nothing about the family
        except Exception as error:
            msg = (
                f"A model must read vectors in the place of tokens (inputs_embeds), but {family} "
                f"fails with {type(error).__name__}: {error}. Use another model."
            )
            raise ValueError(msg) from error
        if not _same(found, expected):
            msg = (
                f"A model must read the vectors of tokens as it reads tokens, but {family} does "
                "more with tokens than to look them up, such as to scale them or to add positions. "
                "Use a model, or options of it (scale_embedding, embedding_multiplier), without."
            )
            raise ValueError(msg)
        if not is_alone:
            raise ValueError(MIXED_PADDING.format(family=family))


@torch.no_grad()
def generates_behind_padding(model: PreTrainedModel) -> bool:
    """Find out whether rows of different lengths can be generated together.

    Args:
        model: A causal language model.

    Returns:
        Whether its `generate` computes the same behind padding as without.

    Raises:
        ValueError: If it cannot begin behind vectors, or does not compute what a forward pass does
            already without padding.
        OutOfMemoryError: If there is no room to try it.
    """
    embedding = model.get_input_embeddings()
    ids = _some_tokens(model, room=_NUM_PADDING + 1)
    # two rows: with a state of its own a family may mix them
    vectors = embedding(torch.cat([ids, ids.flip(1)]))
    family = model.config.model_type
    with eval_mode(model):
        try:
            is_right = _generates(model, vectors, 0)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            msg = (
                f"generate must begin behind vectors (inputs_embeds), but that of {family} fails "
                f"with {type(error).__name__}: {error}. Use another model, or forward."
            )
            raise ValueError(msg) from error
        if not is_right:
            msg = (
                f"generate must compute what a forward pass does, but that of transformers does "
                f"not for {family}: it gives tokens other positions, or mixes rows. Use another "
                "model, or forward."
            )
            raise ValueError(msg)
        return _generates(model, vectors, _NUM_PADDING)


def _generates(
    model: PreTrainedModel, vectors: Float[Tensor, "rows tokens width"], num_padding: int
) -> bool:
    """Compare the scores of two generated tokens with those of a forward pass.

    Returns:
        Whether they are the same.
    """
    padding = vectors[:, :1].expand(-1, num_padding, -1)
    mask = torch.ones(len(vectors), num_padding + vectors.shape[1], device=vectors.device).long()
    mask[:, :num_padding] = 0
    made: Any = model.generate(
        inputs_embeds=torch.cat([padding, vectors], dim=1),
        attention_mask=mask,
        max_new_tokens=2,
        min_new_tokens=2,
        do_sample=False,
        # the model's own may be others; scores are compared before any of them
        num_beams=1,
        repetition_penalty=1.0,
        encoder_repetition_penalty=1.0,
        pad_token_id=0,
        output_logits=True,
        return_dict_in_generate=True,
    )
    first = model.get_input_embeddings()(made.sequences[:, -2:-1])
    whole = torch.cat([vectors, first.to(vectors.dtype)], dim=1)
    expected = model(inputs_embeds=whole, use_cache=False).logits[:, -2:]
    return _same(torch.stack(made.logits, dim=1), expected)


def _some_tokens(model: PreTrainedModel, room: int = 1) -> Int[Tensor, "1 tokens"]:
    """Choose different tokens that are no padding.

    Args:
        model: Reads them.
        room: Places that have to be left in its window.

    Returns:
        As many as are tried, or as fit.
    """
    weight = model.get_input_embeddings().weight
    limit = max_positions(model)
    count = _NUM_TOKENS if limit is None else max(1, min(_NUM_TOKENS, limit - room))
    pad = getattr(model.config.get_text_config(), "pad_token_id", None)
    ids = torch.linspace(1, len(weight) - 1, count + 1, device=weight.device).long()
    return ids[ids != (-1 if pad is None else pad)][None, :count]


def _scores(model: PreTrainedModel, kind: Kind, **arguments: Any) -> Tensor:
    if kind == "decoder":
        return model(use_cache=False, **arguments).logits  # type: ignore[no-any-return]
    # heads see one token, or what a pooler has made of it
    body = model.base_model if kind == "encoder" else model.get_encoder()
    return body(**arguments)[0]  # type: ignore[no-any-return]


def _ignores_padding(
    model: PreTrainedModel, kind: Kind, vectors: Float[Tensor, "1 tokens width"]
) -> bool:
    alone = _scores(model, kind, inputs_embeds=vectors)
    padded = torch.cat([vectors, vectors[:, :1]], dim=1)
    mask = torch.ones(padded.shape[:2], dtype=torch.long, device=padded.device)
    mask[:, -1] = 0
    together = _scores(model, kind, inputs_embeds=padded, attention_mask=mask)
    return _same(together[:, : alone.shape[1]], alone)


def _same(found: Tensor, expected: Tensor) -> bool:
    share = _TOLERANCE.get(expected.dtype, _TOLERANCE_OF_HALVES)
    found, expected = found.float(), expected.float()
    return bool((found - expected).abs().max() <= share * expected.abs().max())
