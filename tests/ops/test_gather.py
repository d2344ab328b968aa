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

from byheart.ops import gather, reference
from byheart.ops.attention import EXCLUDED
from byheart.ops.gather import gather_attend
from byheart.ops.search import Neighbours

TOP_K = 7


def find(queries, keys, valid):
    """Search as the contract says: descending, the tail without an entry marked invalid."""
    repeated = keys.to(queries.dtype).repeat_interleave(HEADS // KV_HEADS, dim=1)
    scores = queries.detach() @ repeated.transpose(-1, -2)
    scores = scores.masked_fill(~valid[:, None, None], EXCLUDED)
    scores, slots = scores.topk(TOP_K)
    return Neighbours(scores, slots, scores > EXCLUDED)


def some_entries():
    """The first row is empty, the second holds fewer entries than are asked for."""
    return torch.arange(ENTRIES) < torch.tensor([[0], [TOP_K - 4], [ENTRIES]])


@pytest.mark.parametrize("empty_as_zero", [False, True])
@pytest.mark.parametrize("chunk_bytes", [1, 2 * 4 * QUERIES * TOP_K * HEAD_DIM, 1 << 20])
def test_gather_attend_equals_its_twin(monkeypatch, chunk_bytes, empty_as_zero):
    # pieces of one (row, head) pair, of two, and all at once
    monkeypatch.setitem(gather._CHUNK_BYTES, "cpu", chunk_bytes)
    queries, scale, keys, values = make_inputs()
    found = find(queries, keys, some_entries())
    fast = gather_attend(queries, scale, keys, values, found, empty_as_zero=empty_as_zero)
    slow = reference.gather_attend(queries, scale, keys, values, found, empty_as_zero=empty_as_zero)
    assert_same_with_gradients(fast, slow, queries, scale)


@pytest.mark.parametrize("empty_as_zero", [False, True])
def test_bias_counts_for_entries_alone(empty_as_zero):
    queries, scale, keys, values = make_inputs()
    found = find(queries, keys, some_entries())
    bias = torch.randn_like(found.scores)
    arguments = {"bias": bias, "empty_as_zero": empty_as_zero}
    fast = gather_attend(queries, scale, keys, values, found, **arguments)
    slow = reference.gather_attend(queries, scale, keys, values, found, **arguments)
    assert_same_with_gradients(fast, slow, queries, scale)


@pytest.mark.parametrize("store_dtype", [torch.bfloat16, torch.float16])
def test_half_precision_memory_is_read_in_float32(store_dtype):
    queries, scale, keys, values = make_inputs(torch.float32, store_dtype)
    found = find(queries, keys, some_entries())
    fast = gather_attend(queries, scale, keys, values, found)
    assert fast.output.dtype == torch.float32
    slow = reference.gather_attend(queries, scale, keys, values, found)
    assert_same_with_gradients(fast, slow, queries, scale)


def test_output_has_the_dtype_of_the_queries():
    queries, scale, keys, values = make_inputs(torch.float32)
    found = find(queries, keys, some_entries())
    wide = gather_attend(queries, scale, keys, values, found).output
    half = gather_attend(queries.bfloat16(), scale, keys, values, found).output
    # the scores are those of the search: only the result is rounded
    torch.testing.assert_close(half, wide.bfloat16())


def test_gradient_of_output_and_logsumexp_is_that_of_finite_differences():
    queries, scale, keys, values = make_inputs()
    valid = some_entries()[1:]
    queries, keys, values = (side[1:].detach() for side in (queries, keys, values))
    slots = find(queries, keys, valid).slots

    def attend(queries, scale):
        repeated = keys.repeat_interleave(HEADS // KV_HEADS, dim=1)
        scores = (queries.detach() @ repeated.transpose(-1, -2)).gather(-1, slots)
        found = Neighbours(
            scores,
            slots,
            valid[:, None, None].expand(scores.shape[0], HEADS, QUERIES, ENTRIES).gather(-1, slots),
        )
        return tuple(gather_attend(queries, scale, keys, values, found))

    assert torch.autograd.gradcheck(attend, (queries.requires_grad_(), scale))


def test_row_without_entries_gives_zeros_and_no_gradient():
    queries, scale, keys, values = make_inputs()
    found = find(queries, keys, torch.zeros(BATCH, ENTRIES, dtype=torch.bool))
    attended = gather_attend(queries, scale, keys, values, found)
    assert (attended.output == 0).all()
    assert (attended.logsumexp == EXCLUDED).all()
    for gradient in torch.autograd.grad(
        attended.output.sum() + attended.logsumexp.sum(), (queries, scale)
    ):
        assert (gradient == 0).all()


def test_memory_gets_no_gradient():
    queries, scale, keys, values = make_inputs()
    found = find(queries, keys, some_entries())
    keys.requires_grad_()
    values.requires_grad_()
    gather_attend(queries, scale, keys, values, found).output.sum().backward()
    assert keys.grad is None
    assert values.grad is None
    assert queries.grad.abs().sum() > 0


def test_what_empty_slots_hold_does_not_matter():
    queries, scale, keys, values = make_inputs()
    valid = some_entries()
    found = find(queries, keys, valid)
    before = gather_attend(queries, scale, keys, values, found)
    for side in (keys, values):
        side.transpose(1, 2)[~valid] = 1e30
    after = gather_attend(queries, scale, keys, values, found)
    for mine, theirs in zip(before, after, strict=True):
        assert torch.equal(mine, theirs)


def test_scores_of_any_memory_format_are_read_right():
    queries, scale, keys, values = make_inputs()
    found = find(queries, keys, some_entries())
    permuted = Neighbours(*(side.transpose(0, 2).contiguous().transpose(0, 2) for side in found))
    assert not permuted.scores.is_contiguous()
    assert_same_with_gradients(
        gather_attend(queries, scale, keys, values, permuted),
        gather_attend(queries, scale, keys, values, found),
        queries,
        scale,
    )


@pytest.mark.parametrize("overwritten", [2, 3], ids=["keys", "values"])
def test_backward_refuses_a_memory_that_was_written_since(overwritten):
    inputs = make_inputs()
    found = find(inputs[0], inputs[2], some_entries())
    output = gather_attend(*inputs, found).output
    inputs[overwritten][:, :, 0] = 0.0
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()
