"""One pass of a pretrained decoder over the next tokens of each row, with its memory in sight."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from byheart.adapters.attention_hook import VIEW
from byheart.adapters.memory_context import MemoryContext
from byheart.adapters.memory_view import MemoryView
from byheart.adapters.row_tokens import RowTokens
from byheart.memory.state import MemoryState, NewEntries
from byheart.models.decoder import require_inside_segment

if TYPE_CHECKING:
    from byheart.adapters.memory_model import MemoryModel


@dataclass(frozen=True, kw_only=True, eq=False)
class MemoryPass:
    """What a pass gives to the model, and what it leaves to be committed."""

    rows: RowTokens
    """Which columns are tokens."""
    before: MemoryState
    """What the rows have read; rows that start a document are reset already."""
    document_start: Bool[Tensor, " batch"]
    """Rows that begin a document."""
    view: MemoryView
    """What the attention layers see."""
    position_ids: Int[Tensor, "batch tokens"] | None
    """Positions of the tokens; `None` for those that the model gives."""

    @classmethod
    def of(
        cls,
        memory_model: "MemoryModel",
        rows: RowTokens,
        state: MemoryState | None,
        document_start: Bool[Tensor, " batch"] | None = None,
    ) -> "MemoryPass":
        """Prepare a pass.

        Args:
            memory_model: The model.
            rows: Which columns are tokens.
            state: What the rows have read; `None` for nothing.
            document_start: Rows that begin a new document; `None` for none.

        Returns:
            The pass.

        Raises:
            MemoryStateError: If the state is used up or was made for another model.
            ValueError: If a row crosses the end of its segment or the model's last position, the
                state has other rows, or the memory was taken off.
        """
        memory_model.require_attached()
        device = rows.num_tokens.device
        if state is None:
            state = memory_model.new_state(rows.batch, device=device)
        if document_start is None:
            document_start = torch.zeros(rows.batch, dtype=torch.bool, device=device)
        before = memory_model.require_state(state, rows.batch, document_start)
        require_inside_segment(before, rows.num_tokens)
        memory_model.require_room(before, rows.num_tokens)
        context = MemoryContext.of(
            before, memory_model.layers, memory_model.memory_config, memory_model.hidden_dtype
        )
        view, position_ids = context.view(rows.columns, first_column=rows.first_column)
        return cls(
            rows=rows,
            before=before,
            document_start=document_start,
            view=view,
            position_ids=position_ids,
        )

    @property
    def arguments(self) -> dict[str, Any]:
        """What the model is given besides tokens or their vectors."""
        given = {} if self.position_ids is None else {"position_ids": self.position_ids}
        return {"attention_mask": self.rows.mask, **given, VIEW: self.view}

    def new_entries(self) -> NewEntries:
        """Return what to commit, once the model has read."""
        staged = self.view.staged
        return NewEntries(
            layers=tuple(staged[index] for index in range(self.before.layout.num_layers)),
            num_tokens=self.rows.num_tokens,
            document_start=self.document_start,
            position=self.before.position,
            starts_segment=self.before.pending is None,
            is_full=self.rows.is_full,
        )
