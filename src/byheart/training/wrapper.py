"""A model as the Hugging Face Trainer wants it."""

from typing import Any

from jaxtyping import Bool, Int
from torch import Tensor, nn

from byheart.memory.state import MemoryState
from byheart.models.segment_model import SegmentModel
from byheart.training.compiled import compiled
from byheart.training.config import Compile

__all__ = ["TrainedModel"]


class TrainedModel(nn.Module):
    """A model as the Trainer wants it.

    The Trainer writes into `model.config` and asks `accepts_loss_kwargs` whether to count the
    predicted tokens of a step, so the model is kept one level below.
    """

    accepts_loss_kwargs = True

    def __init__(self, model: SegmentModel, mode: Compile = "no") -> None:
        super().__init__()
        self.reader = model
        # a function, not a module: names of weights stay as they are
        self._read = compiled(_read, mode)

    def forward(
        self,
        input_ids: Int[Tensor, "batch query"],
        labels: Int[Tensor, "batch query"],
        num_tokens: Int[Tensor, " batch"],
        document_start: Bool[Tensor, " batch"] | None = None,
        *,
        state: MemoryState,
    ) -> Any:
        """Read a segment per row.

        Args:
            input_ids: Tokens.
            labels: The token after each of them, -100 where nothing is predicted.
            num_tokens: Real tokens per row.
            document_start: Rows that begin a document.
            state: What the rows have read.

        Returns:
            The model's output, with the losses of all tokens.

        Raises:
            ValueError: If it is not said which rows begin a document.
        """
        if document_start is None:
            msg = (
                "document_start must be given: without it a document would be read with the memory "
                "of the one before. SegmentDataset has it in every item."
            )
            raise ValueError(msg)
        return self._read(
            self.reader,
            input_ids,
            state=state,
            document_start=document_start,
            num_tokens=num_tokens,
            targets=labels,
        )


def _read(model: SegmentModel, input_ids: Tensor, **inputs: Any) -> Any:
    return model(input_ids, **inputs)
