"""The documents of a training step, and what was read before them."""

from collections.abc import Sequence
from typing import Literal, TypeAlias

import numpy as np
import torch

from byheart.adapters.recurrent import RecurrentMemory
from byheart.data.tasks import BurnIn, Task, TaskSample, draw_burn_in
from byheart.memory.recurrent import RecurrentState
from byheart.models.eval_mode import eval_mode
from byheart.training.curriculum import Curriculum

__all__ = ["draw_documents", "read_beginnings"]

# segments of a call, which all rows have
_PIECE = 64

_Precision: TypeAlias = Literal["float32", "bfloat16"]


def draw_documents(
    memory_model: RecurrentMemory,
    task: Task,
    indices: Sequence[int],
    curriculum: Curriculum,
    *,
    seed: int,
    step: int,
    precision: _Precision,
) -> tuple[list[TaskSample], RecurrentState | None, int]:
    """Draw the documents of a step.

    Args:
        memory_model: Reads what stands before them.
        task: The documents.
        indices: Which of them.
        curriculum: Chooses how many segments they have, and how many stand before.
        seed: Of the run.
        step: Optimizer steps done before.
        precision: Of the matrix products.

    Returns:
        The documents, the state before them, `None` for a new one, and the tokens read for it.
    """
    num_segments = curriculum.num_segments(seed, step)
    burn_in_segments = curriculum.num_burn_in(seed, step)
    if not burn_in_segments:
        return [task.sample(index, num_segments) for index in indices], None, 0
    documents = draw_burn_in(
        task,
        indices,
        (seed, step, indices[0]),
        num_beginnings=curriculum.config.burn_in_rows,
        burn_in_segments=burn_in_segments,
        num_segments=num_segments,
    )
    state = read_beginnings(memory_model, documents, precision=precision)
    return documents.endings, state, sum(b.num_tokens for b in documents.beginnings)


@torch.no_grad()
def read_beginnings(
    memory_model: RecurrentMemory, documents: BurnIn, *, precision: _Precision
) -> RecurrentState:
    """Read the beginnings of documents, each once, as evaluation does: without dropout or noise.

    Args:
        memory_model: The model; it is left in the mode it is in.
        documents: Documents in two parts.
        precision: Of the matrix products.

    Returns:
        What was read before each ending.
    """
    beginnings = documents.beginnings
    state = memory_model.new_state(len(beginnings))
    device = state.memory.device
    num_tokens = beginnings[0].num_tokens
    piece = _PIECE * memory_model.memory_config.segment_length
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=precision == "bfloat16")
    with eval_mode(memory_model), autocast:
        for start in range(0, num_tokens, piece):
            stop = min(start + piece, num_tokens)
            rows = np.stack([beginning.tokens(start, stop) for beginning in beginnings])
            ids = torch.from_numpy(rows.astype(np.int64)).to(device)
            state = state.commit(memory_model(ids, state=state).new_entries)
    return state.select_rows(torch.tensor(documents.groups, device=device))
