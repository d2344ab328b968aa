"""What is wanted of each segment, and what the outputs of all segments amount to."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Int, Shaped
from torch import Tensor
from torch.nn import functional

from byheart.adapters.families import Kind
from byheart.adapters.window_models import AnswerRequest
from byheart.models.recurrent_text import RowText, kept_columns, new_columns
from byheart.models.segmentation import Step
from byheart.models.text_output import TextOutput, TextRequest
from byheart.ops.losses import IGNORED, class_loss


@dataclass(frozen=True, kw_only=True, eq=False)
class Request:
    """What is wanted of a segment."""

    content: Any
    """In the terms of the model's reader."""
    has_loss: bool
    """Whether a gradient can start there."""


@runtime_checkable
class Head(Protocol):
    """Turns the arguments of a pass into requests, and their answers into its result."""

    def request(self, step: Step) -> Request | None:
        """Return what is wanted of a step; `None` for the memory alone."""
        ...

    def collect(
        self, steps: Sequence[Step], outputs: Sequence[Any], num_items: Tensor | int | None
    ) -> dict[str, Tensor]:
        """Return loss and logits by their names."""
        ...


def make_head(
    kind: Kind,
    text: RowText,
    *,
    labels: Tensor | None,
    targets: Tensor | None,
    logits_to_keep: int | None,
    problem_type: str | None = None,
    may_lack_labels: bool = False,
) -> Head:
    """Make the head for a kind of model.

    Args:
        kind: How the model reads.
        text: The text of the pass.
        labels: As Hugging Face models take them.
        targets: What follows each token, for language models.
        logits_to_keep: Input columns, from the end, whose logits a language model returns.
        problem_type: What a classifier's labels mean, as in its config; `None` to tell by them.
        may_lack_labels: Whether labels may all be -100: a part of a larger batch has the loss 0.

    Returns:
        The head.

    Raises:
        ValueError: If an argument does not fit the kind or the text.
    """
    if kind == "decoder":
        return LanguageHead(text, labels, targets, logits_to_keep, may_lack_labels=may_lack_labels)
    if targets is not None or logits_to_keep is not None:
        msg = f"targets and logits_to_keep are for language models, got a model of kind {kind!r}."
        raise ValueError(msg)
    _require_text(text)
    if labels is not None and len(labels) != len(text.num_tokens):
        msg = f"labels must have one entry per row ({len(text.num_tokens)}), got {len(labels)}."
        raise ValueError(msg)
    if kind == "encoder":
        return ClassifierHead(labels, problem_type, may_lack_labels=may_lack_labels)
    return AnswerHead(labels, may_lack_labels=may_lack_labels)


class LanguageHead:
    """Losses and logits of a causal language model."""

    def __init__(
        self,
        text: RowText,
        labels: Int[Tensor, "batch tokens"] | None,
        targets: Int[Tensor, "batch tokens"] | None,
        logits_to_keep: int | None,
        *,
        may_lack_labels: bool = False,
    ) -> None:
        self.text = text
        if labels is not None:
            if targets is not None:
                msg = "labels and targets must not both be given: targets are labels moved by one."
                raise ValueError(msg)
            targets = _shifted(labels, text)
        self._check_targets(targets)
        self.targets = None if targets is None else text.from_input(targets.long(), IGNORED)
        labelled = None if self.targets is None else (self.targets != IGNORED).cpu()
        self.lacks_labels = labelled is not None and not bool(labelled.any())
        if self.lacks_labels and not may_lack_labels:
            msg = (
                f"At least one token must have a label that is not {IGNORED}, got none"
                f"{' after moving them by one' if labels is not None else ''}."
            )
            raise ValueError(msg)
        self.labelled = labelled
        width = text.num_columns
        if logits_to_keep is not None and not 0 <= logits_to_keep <= width:
            msg = f"logits_to_keep must be between 0 and the {width} columns, got {logits_to_keep}."
            raise ValueError(msg)
        everything = width if targets is None else 0
        self.first_kept = width - (everything if logits_to_keep is None else logits_to_keep)

    def _check_targets(self, targets: Tensor | None) -> None:
        expected = (len(self.text.num_tokens), self.text.num_columns)
        if targets is not None and tuple(targets.shape) != expected:
            msg = (
                f"labels and targets must have one entry per input token, {list(expected)}, got "
                f"{list(targets.shape)}."
            )
            raise ValueError(msg)

    def request(self, step: Step) -> Request | None:
        """Return which losses and logits are wanted of a step."""
        has_loss = self.labelled is not None and any(
            bool(self.labelled[row, start:stop].any())
            for row, (start, stop) in zip(step.rows, step.spans, strict=True)
        )
        # a loss of 0 has a gradient, too: processes wait for it
        has_loss = has_loss or (self.lacks_labels and any(step.last))
        logits = any(
            stop > start and self.text.column(row, stop - 1) >= self.first_kept
            for row, (start, stop) in zip(step.rows, step.spans, strict=True)
        )
        if not has_loss and not logits:
            return None
        targets = self._targets(step) if has_loss else None
        width = max(stop - start for start, stop in step.spans)
        columns = None if has_loss else kept_columns(self.text, step, self.first_kept)
        content = TextRequest(num_columns=width, targets=targets, logits=logits, columns=columns)
        # without labels the caller's own loss is about the logits
        return Request(content=content, has_loss=has_loss or self.labelled is None)

    def _targets(self, step: Step) -> Int[Tensor, "rows text"]:
        assert self.targets is not None
        targets, num_tokens = step.take(self.targets)
        if num_tokens is None:
            return targets
        columns = torch.arange(targets.shape[1], device=targets.device)
        return targets.masked_fill(columns >= num_tokens[:, None], IGNORED)

    def collect(
        self,
        steps: Sequence[Step],
        outputs: Sequence[TextOutput | None],
        num_items: Tensor | int | None,
    ) -> dict[str, Tensor]:
        """Put the outputs together.

        Returns:
            Loss, losses of the tokens, and logits.
        """
        result: dict[str, Tensor] = {}
        if self.targets is not None and self.labelled is not None:
            parts = [None if output is None else output.token_losses for output in outputs]
            losses = self._place(steps, parts, 0)
            count = self.labelled.sum() if num_items is None else num_items
            result = {"loss": losses.sum() / count, "token_losses": losses}
        if self.first_kept < self.text.num_columns:
            logits = [None if output is None else output.logits for output in outputs]
            if any(part is not None for part in logits):
                result["logits"] = self._place(steps, logits, self.first_kept)
        return result

    def _place(
        self, steps: Sequence[Step], parts: Sequence[Tensor | None], first_column: int
    ) -> Tensor:
        """Put what segments have said of their tokens into the columns of the input.

        Returns:
            One entry per column from `first_column`; zeros where nothing was said.
        """
        like = next(part for part in parts if part is not None)
        shape = (len(self.text.num_tokens), self.text.num_columns - first_column)
        placed = like.new_zeros(*shape, *like.shape[2:])
        places, taken = [], []
        for step, part in zip(steps, parts, strict=True):
            if part is None:
                continue
            is_new, columns = new_columns(self.text, step, part.shape[1])
            kept = is_new & (columns >= first_column)
            rows = torch.tensor(step.rows)[:, None].expand_as(columns)
            places.append((rows[kept], columns[kept] - first_column))
            values = part.flatten(0, 1)
            taken.append(values if kept.all() else values[kept.flatten().to(part.device)])
        # all at once: each time costs a copy of the whole
        rows, columns = (torch.cat(group).to(placed.device) for group in zip(*places, strict=True))
        return placed.index_put((rows, columns), torch.cat(taken))


class ClassifierHead:
    """The class of each text, from its last segment."""

    def __init__(
        self, labels: Tensor | None, problem_type: str | None, *, may_lack_labels: bool = False
    ) -> None:
        self.labels = labels
        self.problem_type = problem_type
        self.may_lack_labels = may_lack_labels

    def request(self, step: Step) -> Request | None:
        """Ask for logits where a row ends.

        Returns:
            The request; `None` if no row ends.
        """
        if not any(step.last):
            return None
        return Request(content=True, has_loss=True)

    def collect(
        self,
        steps: Sequence[Step],
        outputs: Sequence[Tensor | None],
        num_items: Tensor | int | None,
    ) -> dict[str, Tensor]:
        """Put the outputs together.

        Returns:
            Logits, and the loss if there are labels.
        """
        logits = _of_last_segments(steps, outputs)
        if self.labels is None:
            return {"logits": logits}
        total, count = class_loss(
            logits.float(), self.labels, self.problem_type, may_lack_labels=self.may_lack_labels
        )
        return {"loss": total / (count if num_items is None else num_items), "logits": logits}


class AnswerHead:
    """The answer of an encoder-decoder to each text, from its last segment."""

    def __init__(
        self, labels: Int[Tensor, "batch answer"] | None, *, may_lack_labels: bool = False
    ) -> None:
        if labels is None:
            msg = "labels must be given for an encoder-decoder, got None. Use generate to answer."
            raise ValueError(msg)
        if labels.ndim != 2:
            msg = f"labels must be [batch, answer], got the shape {list(labels.shape)}."
            raise ValueError(msg)
        if not may_lack_labels and not bool((labels != IGNORED).any()):
            msg = f"At least one token must have a label that is not {IGNORED}, got none."
            raise ValueError(msg)
        self.labels = labels.long()

    def request(self, step: Step) -> Request | None:
        """Ask for the answers' logits where a row ends.

        Returns:
            The request; `None` if no row ends.
        """
        if not any(step.last):
            return None
        labels = self.labels[step.row_ids(self.labels)]
        return Request(content=AnswerRequest(labels=labels), has_loss=True)

    def collect(
        self,
        steps: Sequence[Step],
        outputs: Sequence[Tensor | None],
        num_items: Tensor | int | None,
    ) -> dict[str, Tensor]:
        """Put the outputs together.

        Returns:
            Loss and logits.
        """
        logits = _of_last_segments(steps, outputs)
        total = functional.cross_entropy(
            logits.float().flatten(0, 1), self.labels.flatten(), reduction="sum"
        )
        count = (self.labels != IGNORED).sum() if num_items is None else num_items
        return {"loss": total / count, "logits": logits}


class EncoderHead:
    """The encoder's states over the last segment of each text, for an answer to be generated."""

    def __init__(self, text: RowText) -> None:
        _require_text(text)

    def request(self, step: Step) -> Request | None:
        """Ask for the encoder's states where a row ends.

        Returns:
            The request; `None` if no row ends.
        """
        if not any(step.last):
            return None
        return Request(content=AnswerRequest(labels=None), has_loss=True)

    def collect(
        self,
        steps: Sequence[Step],
        outputs: Sequence[tuple[Tensor, Tensor] | None],
        num_items: Tensor | int | None,
    ) -> dict[str, Tensor]:
        """Put the outputs together.

        Returns:
            States, and which of them are real; rows that ended in shorter windows are padded.
        """
        width = max(output[0].shape[1] for output in outputs if output is not None)
        padded = [
            output
            and tuple(
                functional.pad(part, (0, 0) * (part.ndim - 2) + (0, width - part.shape[1]))
                for part in output
            )
            for output in outputs
        ]
        states = [None if output is None else output[0] for output in padded]
        masks = [None if output is None else output[1] for output in padded]
        return {"hidden": _of_last_segments(steps, states), "mask": _of_last_segments(steps, masks)}


def _require_text(text: RowText) -> None:
    """Refuse rows without text.

    Raises:
        ValueError: If a row is all padding.
    """
    if not all(text.num_new):
        row = text.num_new.index(0)
        msg = f"Every row must have text, row {row} is all padding. Leave it out."
        raise ValueError(msg)


def _of_last_segments(
    steps: Sequence[Step], outputs: Sequence[Tensor | None]
) -> Shaped[Tensor, "batch ..."]:
    """Take each row's output at the step where it ends.

    Returns:
        The outputs, in the order of the rows.
    """
    order, parts = [], []
    for step, output in zip(steps, outputs, strict=True):
        if output is None:
            continue
        ending = [index for index, last in enumerate(step.last) if last]
        order += [step.rows[index] for index in ending]
        parts.append(output if len(ending) == len(output) else output[ending])
    together = parts[0] if len(parts) == 1 else torch.cat(parts)
    if order == sorted(order):
        return together
    return together[torch.tensor(order, device=together.device).argsort()]


def _shifted(labels: Tensor, text: RowText) -> Tensor:
    """Turn the token at each place into the token after it.

    Returns:
        Targets; -100 for the last token of each row.
    """
    if tuple(labels.shape) != (len(text.num_tokens), text.num_columns):
        return labels  # refused by the caller, with the shape that was given
    moved = functional.pad(labels[:, 1:], (0, 1), value=IGNORED)
    columns = torch.arange(text.num_columns, device=labels.device)
    ends = torch.tensor(text.first_column) + torch.tensor(text.num_new)
    return moved.masked_fill(columns == ends[:, None].to(labels.device) - 1, IGNORED)
