"""Cross entropy per position, chunked over the vocabulary, and the losses of classifiers."""

import math
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from byheart.ops import known

IGNORED = -100
"""Label of a position that is not predicted."""


def cross_entropy(
    hidden: Float[Tensor, "tokens embed_dim"],
    weight: Float[Tensor, "vocab embed_dim"],
    labels: Int[Tensor, " tokens"],
    *,
    chunk_size: int = 8192,
) -> Float[Tensor, " tokens"]:
    """Compute the loss of each position without holding all logits.

    Logits are `hidden @ weight.T`, multiplied in the dtype of `hidden` (of autocast, where it is
    on) and in float32 from there on. With more than `chunk_size`
    vocabulary entries the logits of one chunk are held at a time, and backward computes them again.

    Args:
        hidden: Last hidden states.
        weight: Output embedding.
        labels: Index of the true entry, or `IGNORED`.
        chunk_size: Vocabulary entries per chunk.

    Returns:
        Negative log likelihood in nats; 0 where the label is `IGNORED`.

    Raises:
        ValueError: If `chunk_size` is below 1, or a label on the CPU is no entry of the vocabulary;
            on CUDA such a label stops the program with an assertion.
    """
    if chunk_size < 1:
        msg = f"chunk_size must be at least 1, got {chunk_size}. Raise chunk_size."
        raise ValueError(msg)
    require_labels(labels, weight.shape[0], "Use the tokenizer of the model.")
    kind = hidden.device.type
    if torch.is_autocast_enabled(kind):
        hidden = hidden.to(torch.get_autocast_dtype(kind))
    # backward runs outside of autocast, and must compute the logits that forward has computed
    with torch.autocast(kind, enabled=False):
        if weight.shape[0] <= chunk_size:
            return functional.cross_entropy(
                _logits(hidden, weight), labels, ignore_index=IGNORED, reduction="none"
            )
        loss: Tensor = _ChunkedCrossEntropy.apply(  # type: ignore[no-untyped-call]
            hidden, weight, labels, chunk_size
        )
        return loss


_CACHED_LOGITS = 1 << 18
"""Logits whose logarithms a core's cache holds."""


def token_losses(
    logits: Float[Tensor, "*tokens vocab"], labels: Int[Tensor, "*tokens"]
) -> Float[Tensor, "*tokens"]:
    """Compute the loss of each position from its logits, in float32.

    Without a gradient a CPU takes a few positions at a time: of all at once it would write
    logarithms as large as the logits, into memory that the system has to clear first.

    Args:
        logits: Scores of the vocabulary.
        labels: Index of the true entry, or `IGNORED`.

    Returns:
        Negative log likelihood in nats; 0 where the label is `IGNORED`.
    """
    scores, places = logits.flatten(0, -2), labels.flatten()
    is_whole = torch.compiler.is_compiling() or scores.device.type != "cpu"
    has_gradient = torch.is_grad_enabled() and scores.requires_grad
    num_rows = len(scores) if is_whole or has_gradient else _CACHED_LOGITS // scores.shape[1]
    pieces = (torch.split(tensor, max(num_rows, 1)) for tensor in (scores, places))
    parts = [
        functional.cross_entropy(part.float(), place, ignore_index=IGNORED, reduction="none")
        for part, place in zip(*pieces, strict=True)
    ]
    return torch.cat(parts).view_as(labels)


def require_labels(labels: Int[Tensor, "*shape"], num_entries: int, remedy: str) -> None:
    """Refuse labels that are no index of an entry, without waiting for a GPU.

    Args:
        labels: Index of the true entry, or `IGNORED`.
        num_entries: Entries of the vocabulary, or classes.
        remedy: What to do about it, as a sentence.

    Raises:
        ValueError: If a label on the CPU is no entry; on CUDA such a label stops the program with
            an assertion.
    """

    def error() -> ValueError:
        return ValueError(
            f"labels must be {IGNORED} or between 0 and {num_entries - 1}, got "
            f"{int(labels.min())} to {int(labels.max())}. {remedy}"
        )

    known.require(
        (labels == IGNORED) | ((labels >= 0) & (labels < num_entries)),
        error,
        "labels must be in the vocabulary, or among the classes",
    )


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, chunk_size: int
    ) -> Tensor:
        logsumexp = hidden.new_full(labels.shape, -torch.inf, dtype=torch.float32)
        label_logit = torch.zeros_like(logsumexp)
        for start in range(0, weight.shape[0], chunk_size):
            logits = _logits(hidden, weight[start : start + chunk_size])
            logsumexp = torch.logaddexp(logsumexp, torch.logsumexp(logits, dim=-1))
            inside, local = _labels_inside(labels, start, logits.shape[1])
            label_logit += logits.gather(1, local[:, None]).squeeze(1) * inside
        ctx.save_for_backward(hidden, weight, labels, logsumexp)
        ctx.chunk_size = chunk_size
        return (logsumexp - label_logit) * (labels != IGNORED)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, labels, logsumexp = ctx.saved_tensors
        chunk_size: int = ctx.chunk_size
        grad_row = (grad_loss * (labels != IGNORED))[:, None]
        grad_hidden = torch.zeros_like(hidden, dtype=torch.float32)
        grad_weight = torch.empty_like(weight)
        for start in range(0, weight.shape[0], chunk_size):
            chunk = weight[start : start + chunk_size]
            grad_logits = torch.exp(_logits(hidden, chunk) - logsumexp[:, None])
            inside, local = _labels_inside(labels, start, chunk.shape[0])
            grad_logits.scatter_add_(1, local[:, None], -inside.float()[:, None])
            grad_logits *= grad_row
            narrow = grad_logits.to(hidden.dtype)
            grad_hidden += narrow @ chunk.to(hidden.dtype)
            grad_weight[start : start + chunk_size] = narrow.T @ hidden
        return grad_hidden.to(hidden.dtype), grad_weight, None, None


def _logits(hidden: Tensor, weight: Tensor) -> Tensor:
    return (hidden @ weight.to(hidden.dtype).T).float()


def _labels_inside(labels: Tensor, start: int, size: int) -> tuple[Tensor, Tensor]:
    local = labels - start
    inside = (local >= 0) & (local < size)
    return inside, local.clamp(0, size - 1)


def class_loss(
    logits: Float[Tensor, "rows classes"],
    labels: Tensor,
    problem_type: str | None,
    *,
    may_lack_labels: bool = False,
) -> tuple[Tensor, Tensor | int]:
    """Compute the loss that Hugging Face's classifiers compute for such labels.

    Args:
        logits: Scores of the classes of each row.
        labels: A class per row, -100 for none, or a number per class.
        problem_type: What labels mean, as in the classifier's config; `None` to tell by them.
        may_lack_labels: Whether the sum is wanted of rows without a label, too: it is 0.

    Returns:
        Its sum over rows, or rows and classes, and how many of them have a label.

    Raises:
        ValueError: If the labels are of another shape or no class, or no row has one.
    """
    if problem_type is None and logits.shape[1] == 1:
        problem_type = "regression"
    is_mean_square = problem_type == "regression"
    several = problem_type == "multi_label_classification"
    per_class = is_mean_square or several or labels.dtype.is_floating_point
    expected = list(logits.shape) if per_class else [len(logits)]
    if labels.numel() != math.prod(expected):
        msg = (
            f"labels must have the shape {expected}, got {list(labels.shape)}: one class per row, "
            "or for regression and several classes at once a float for each class."
        )
        raise ValueError(msg)
    if per_class:
        labels = labels.float().view_as(logits)
        if is_mean_square:
            return functional.mse_loss(logits, labels, reduction="sum"), labels.numel()
        loss = functional.binary_cross_entropy_with_logits(logits, labels, reduction="sum")
        return loss, labels.numel()
    require_labels(labels, logits.shape[1], "Load the model with as many classes (num_labels).")
    labelled = labels != IGNORED
    if not may_lack_labels and not bool(labelled.any()):
        msg = f"At least one row must have a label that is not {IGNORED}, got none."
        raise ValueError(msg)
    labels = labels.view(-1).long()
    return functional.cross_entropy(logits, labels, reduction="sum"), labelled.sum()
