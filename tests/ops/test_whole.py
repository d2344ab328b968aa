"""Reading a whole memory equals attending to what a search for all entries has found."""

import pytest
import torch
from attend_setup import (
    BATCH,
    ENTRIES,
    HEAD_DIM,
    HEADS,
    KV_HEADS,
    QUERIES,
    assert_same_with_gradients,
    make_inputs,
)

from byheart.memory.dense import DenseStore
from byheart.ops import reference, whole
from byheart.ops.attention import EXCLUDED
from byheart.ops.search import Neighbours
from byheart.ops.whole import attend_to_all


def some_entries():
    """The first row is empty, the second has gaps, the third is full."""
    valid = torch.zeros(BATCH, ENTRIES, dtype=torch.bool)
    valid[1, ::3] = True
    valid[2] = True
    return valid


def everything(valid):
    shape = (BATCH, HEADS, QUERIES, ENTRIES)
    slots = torch.arange(ENTRIES).expand(shape)
    return Neighbours(torch.zeros(shape), slots, valid[:, None, None].expand(shape))


# queries of one head in pieces, heads one by one, rows one by one, and all at once
@pytest.mark.parametrize("pieces", [1, 3, 2 * QUERIES, 2 * QUERIES * KV_HEADS, 10_000])
@pytest.mark.parametrize("with_bias", [False, True])
def test_attend_to_all_equals_its_twin(monkeypatch, pieces, with_bias):
    monkeypatch.setitem(whole._CHUNK_BYTES, "cpu", 4 * ENTRIES * pieces)
    queries, scale, keys, values = make_inputs()
    valid = some_entries()
    bias = torch.randn(BATCH, ENTRIES, dtype=queries.dtype) if with_bias else None
    fast = attend_to_all(queries, scale, keys, values, valid, bias=bias)
    per_query = None
    if bias is not None:
        per_query = bias[:, None, None].expand(-1, HEADS, QUERIES, -1)
    slow = reference.gather_attend(queries, scale, keys, values, everything(valid), bias=per_query)
    assert_same_with_gradients(fast, slow, queries, scale)


@pytest.mark.parametrize("store_dtype", [torch.bfloat16, torch.float16])
def test_half_precision_memory_is_read_in_float32(store_dtype):
    queries, scale, keys, values = make_inputs(torch.float32, store_dtype)
    valid = some_entries()
    with torch.autocast("cpu", torch.bfloat16):
        fast = attend_to_all(queries, scale, keys, values, valid)
    slow = reference.gather_attend(queries, scale, keys, values, everything(valid))
    assert_same_with_gradients(fast, slow, queries, scale)
    half = attend_to_all(queries.bfloat16(), scale, keys, values, valid)
    assert half.output.dtype == torch.bfloat16
    assert half.logsumexp.dtype == torch.float32


def test_a_row_without_entries_gives_zeros_and_passes_nothing():
    queries, scale, keys, values = make_inputs()
    keys[0], values[0] = 1e4, torch.nan  # what is left in slots does not matter
    read = attend_to_all(queries, scale, keys, values.nan_to_num(), some_entries())
    assert (read.output[0] == 0).all()
    assert (read.logsumexp[0] == EXCLUDED).all()
    gradient = torch.autograd.grad(read.output.sum() + read.logsumexp[1:].sum(), queries)[0]
    assert (gradient[0] == 0).all()
    assert torch.isfinite(gradient).all()


@pytest.mark.parametrize("age_slope", [0.0, 0.5])
@pytest.mark.parametrize("written", [0, 4, 23])
def test_a_store_asked_for_all_entries_does_not_search(monkeypatch, age_slope, written):
    store = DenseStore.empty(2, KV_HEADS, ENTRIES, HEAD_DIM)
    keys, values = torch.randn(2, 2, KV_HEADS, written, HEAD_DIM)
    keep = torch.ones(2, written, dtype=torch.bool)
    keep[0, 3:] = False
    store = store.append(keys, values, keep)
    queries = torch.randn(2, HEADS, QUERIES, HEAD_DIM)
    scale = torch.rand(HEADS) + 0.5
    with monkeypatch.context() as patch:
        patch.setattr(DenseStore, "_search", None)
        read = store.attend(queries, scale, ENTRIES, age_slope)
    assert read.found is None
    assert read.has_entries.tolist() == [written > 0] * 2
    # with a slot more, the same entries are searched for
    larger = DenseStore.empty(2, KV_HEADS, ENTRIES + 1, HEAD_DIM)
    if written <= ENTRIES:
        searched = larger.append(keys, values, keep).attend(queries, scale, ENTRIES, age_slope)
        assert searched.found is not None
        torch.testing.assert_close(read.output, searched.output)
        torch.testing.assert_close(read.logsumexp, searched.logsumexp)


def test_a_memory_written_before_the_backward_pass_is_noticed():
    store = DenseStore.empty(1, KV_HEADS, ENTRIES, HEAD_DIM)
    keep = torch.ones(1, 4, dtype=torch.bool)
    store = store.append(*torch.randn(2, 1, KV_HEADS, 4, HEAD_DIM), keep)
    queries = torch.randn(1, HEADS, QUERIES, HEAD_DIM, requires_grad=True)
    read = store.attend(queries, torch.ones(HEADS), ENTRIES)
    store.append(*torch.randn(2, 1, KV_HEADS, 4, HEAD_DIM), keep)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        read.output.sum().backward()
