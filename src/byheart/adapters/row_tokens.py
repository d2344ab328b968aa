"""Which columns of a batch are real tokens."""

from dataclasses import dataclass

import torch
from jaxtyping import Int, Shaped
from torch import Tensor

from byheart.models.decoder import require_columns
from byheart.ops import known


@dataclass(frozen=True, kw_only=True, eq=False)
class RowTokens:
    """The real tokens of each row: one run of columns."""

    num_tokens: Int[Tensor, " batch"]
    """Tokens of each row."""
    first_column: Int[Tensor, " batch"] | None
    """Column of each row's first token; `None` if it is known to be 0 everywhere."""
    columns: Int[Tensor, "batch tokens"]
    """Number of the token in each column, counted from the row's first; 0 before it."""
    mask: Int[Tensor, "batch tokens"] | None
    """What the model is given; `None` if all columns are known to be real."""
    is_full: bool = False
    """Whether all columns are real, because nothing says otherwise."""

    @property
    def batch(self) -> int:
        """Rows."""
        return self.num_tokens.shape[0]

    @classmethod
    def of(
        cls,
        inputs: Shaped[Tensor, "batch tokens *vector"],
        attention_mask: Shaped[Tensor, "batch tokens"] | None,
        num_tokens: Int[Tensor, " batch"] | None,
    ) -> "RowTokens":
        """Find the real tokens.

        Args:
            inputs: The batch: token ids, or a vector in the place of each.
            attention_mask: Real tokens, one run in each row; `None` for all.
            num_tokens: Tokens of each row, the first so many columns, instead of a mask.

        Returns:
            The tokens.

        Raises:
            ValueError: If mask and numbers are both given, or do not fit. Where values are not
                known, the device checks them.
        """
        batch, width = inputs.shape[:2]
        columns = torch.arange(width, device=inputs.device).expand(batch, -1)
        if attention_mask is None:
            if num_tokens is None:
                num_tokens = torch.full((batch,), width, device=inputs.device)
                return cls(
                    num_tokens=num_tokens, first_column=None, columns=columns, mask=None,
                    is_full=True,
                )  # fmt: skip
            require_columns(num_tokens, width)
            # a row without tokens would attend to nothing
            real = columns < num_tokens.clamp(min=1)[:, None]
            mask = None if known.known_none(~real) else real.long()
            return cls(num_tokens=num_tokens, first_column=None, columns=columns, mask=mask)
        if num_tokens is not None:
            msg = "attention_mask and num_tokens must not both be given. Leave one out."
            raise ValueError(msg)
        if attention_mask.shape != inputs.shape[:2]:
            msg = (
                f"attention_mask must have the shape of input_ids, {[batch, width]}, got "
                f"{list(attention_mask.shape)}."
            )
            raise ValueError(msg)
        return cls._of_mask(attention_mask, columns)

    @classmethod
    def _of_mask(cls, attention_mask: Tensor, columns: Tensor) -> "RowTokens":
        real = attention_mask.bool()
        num_tokens, first = real.sum(1), real.long().argmax(1)
        is_run = (columns >= first[:, None]) & (columns < (first + num_tokens)[:, None])

        def error() -> ValueError:
            row = int((real != is_run).any(1).long().argmax())
            return ValueError(
                "The real tokens of a row must be one run of columns, but attention_mask has a gap "
                f"in row {row}. Move its tokens together."
            )

        known.require(real == is_run, error, "the real tokens of a row must be one run of columns")
        mask = attention_mask.long()
        if not known.known_none(num_tokens == 0):
            mask = torch.where((num_tokens == 0)[:, None] & (columns == 0), 1, mask)
        is_left = not known.known_none(first > 0)
        return cls(
            num_tokens=num_tokens,
            first_column=first if is_left else None,
            columns=(columns - first[:, None]).clamp(min=0) if is_left else columns,
            mask=mask,
        )
