"""Signatures are true while the tests run: tensors of another shape are refused."""

import jaxtyping
import pytest
import torch

from byheart.memory.ring import RingCursor
from byheart.ops.merge import merge_by_gate


def test_arguments_of_another_shape_are_refused():
    with pytest.raises(jaxtyping.TypeCheckError, match="gate"):
        merge_by_gate(torch.zeros(2, 3, 5, 7), torch.zeros(2, 3, 5, 7), torch.zeros(3, 3, 5))


def test_fields_of_another_shape_are_refused():
    with pytest.raises(jaxtyping.TypeCheckError, match="num_written"):
        RingCursor(memory_size=5, num_written=torch.zeros(2, 3, dtype=torch.long))
